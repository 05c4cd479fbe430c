"""Sampler on one or many vLLM servers: requests spread by load, failures made good, weights pushed to all."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import numpy as np

from rollout.client import Server, ServerError, ServerTimeout
from rollout.dispatch import Dispatcher
from rollout.sampler import Gap, RolloutError, SamplingParams
from rollout.transfer import DirectoryTransfer, Transfer, on_all
from rollout.types import FinishReason, Prompt, Sample, SampleGroup


@dataclass(frozen=True)
class Limits:
    """How much is asked of servers, and how long they are waited for.

    Args:
        concurrent: Samples in flight at one server from this process.
        patience: Seconds to wait for a server when there is none left.
    """

    concurrent: int
    patience: float


@dataclass(frozen=True)
class Care:
    """What this process does for its servers.

    Args:
        revive: Called with the place of a failed server and whether it hangs; returns when it runs again, or when there is
            nothing to be done but to wait. Raises RolloutError when it cannot run again.
        release: Called at the end.
    """

    revive: Callable[[int, bool], None] = lambda index, hangs: None
    release: Callable[[], None] = lambda: None


class VllmSampler:
    """Samples on vLLM servers.

    While `sample` runs in one thread, `close` may be called in another one.

    Args:
        servers: In any order; they hold the same policy.
        transfer: Brings weights to them.
        decode: Texts of lists of token ids, without special tokens.
        stop_token_ids: Tokens that end a completion.
        limits: See there.
        care: What is this process's business when a server fails, and at the end.
        run: Sets this run's versions apart from those of others that used the same servers.
    """

    shares_weights = False

    def __init__(
        self,
        servers: Sequence[Server],
        transfer: Transfer,
        decode: Callable[[list[list[int]]], list[str]],
        stop_token_ids: Sequence[int],
        limits: Limits,
        care: Care,
        run: str,
    ):
        self.servers = tuple(servers)
        self.transfer = transfer
        self._decode = decode
        self._stop = list(stop_token_ids)
        self._limits = limits
        self._care = care
        self._run = run
        self._version = 0
        self._away: set[Server] = set()  # failed, and not back yet
        self._batch: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None  # that is being sampled

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"{self._run}-{self._version}"

    def sync(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Push weights to all servers; a server that fails is started again and gets them then.

        Raises:
            RolloutError: No server has them.
        """
        self._version = version
        errors = self.transfer.send(weights, self.servers, self._name)
        self._away = set(errors)
        for server, error in errors.items():
            try:
                self._bring_back(server, error)
                self._away.discard(server)
            except RolloutError as again:
                print(f"vLLM server {server.url} is left out: {error}; then {again}", flush=True)
        if len(self._away) == len(self.servers):
            raise RolloutError(f"no vLLM server took the weights: {next(iter(errors.values()))}")

    def verify(self, sequences: Sequence[Sequence[int]], expected: np.ndarray) -> Gap:
        """See `Sampler.verify`; the largest gaps of any server. Raises RolloutError when none answers."""
        gaps: dict[Server, np.ndarray] = {}

        def measure(server: Server) -> None:
            gaps[server] = np.abs(server.score(sequences) - expected)

        errors = on_all([server for server in self.servers if server not in self._away], measure)
        self._away |= set(errors)
        if not gaps:
            raise RolloutError(f"no vLLM server answers: {next(iter(errors.values()), 'all are away')}")
        return Gap(max(float(gap.mean()) for gap in gaps.values()), max(float(gap.max()) for gap in gaps.values()))

    def differing(self) -> Sequence[str]:
        """See `Sampler.differing`; known where the weights lie in files."""
        if not isinstance(self.transfer, DirectoryTransfer):
            return ()
        names: dict[str, None] = {}
        for server in self.servers:
            if server not in self._away:
                names |= dict.fromkeys(
                    name for part in server.call("differing_weights", path=self.transfer.path) for name in part
                )
        return tuple(names)

    def close(self) -> None:
        """Give up what is being sampled, and leave nothing behind."""
        if self._batch is not None:
            loop, task = self._batch
            loop.call_soon_threadsafe(task.cancel)
        self.transfer.close()
        self._care.release()

    # --- samples ------------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[SampleGroup]:
        """See `Sampler.sample`. Every sample has a seed of its own, so that it does not matter which server draws it.

        Raises:
            RolloutError: No server is left, or all refuse a request.
        """
        seeds = _seeds(len(prompts), params)
        requests = [self._request(p, seed, params) for p, row in zip(prompts, seeds, strict=True) for seed in row]
        choices = asyncio.run(self._complete_all(requests))
        texts = self._decode([choice["token_ids"] for choice in choices])
        samples = [self._sample(choice, text, params) for choice, text in zip(choices, texts, strict=True)]
        size = params.samples_per_prompt
        return [SampleGroup(p, tuple(samples[i * size : (i + 1) * size])) for i, p in enumerate(prompts)]

    def _request(self, prompt: Prompt, seed: int, params: SamplingParams) -> dict[str, Any]:
        request = {
            "prompt": list(prompt.token_ids),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stop_token_ids": self._stop,
            "ignore_eos": True,  # the model's own idea of an end; ours are the stop tokens
            "return_token_ids": True,
            "logprobs": 0 if params.log_probs else None,
            "repetition_penalty": params.repetition_penalty,
        }
        if params.temperature > 0:
            request |= {"seed": seed, "top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
        return request

    def _sample(self, choice: Mapping[str, Any], text: str, params: SamplingParams) -> Sample:
        log_probs = choice["logprobs"]["token_logprobs"] if params.log_probs else ()
        return Sample(
            tuple(choice["token_ids"]),
            tuple(float("nan") if value is None else value for value in log_probs),
            FinishReason(choice["finish_reason"]),
            self._version,
            text,
        )

    async def _complete_all(self, requests: Sequence[dict[str, Any]]) -> list[Mapping[str, Any]]:
        """Completions in the order of the requests."""
        self._batch = asyncio.get_running_loop(), asyncio.current_task()
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        dispatcher = Dispatcher(self.servers, self._away, self._limits.concurrent, self._bring_back, self._limits.patience)
        try:
            async with httpx.AsyncClient(limits=unlimited, trust_env=False) as client:
                jobs = [(_tokens(r), partial(Server.complete, client=client, request=r)) for r in requests]
                return await dispatcher.run_all(jobs)
        finally:
            self._away, self._batch = dispatcher.away, None

    def _bring_back(self, server: Server, error: RolloutError) -> None:
        """Make a failed server ready again. Raises RolloutError when it cannot be, or not yet."""
        self._care.revive(self.servers.index(server), isinstance(error, ServerTimeout))
        if not server.healthy():
            raise ServerError(f"{server.url} does not answer")
        if server.version() != self._name:
            self.transfer.resend(server, self._name)


def _tokens(request: Mapping[str, Any]) -> int:
    """What a request may take: tokens to read and to make."""
    return len(request["prompt"]) + request["max_tokens"]


def _seeds(count: int, params: SamplingParams) -> list[list[int]]:
    """A seed of 31 bits for every sample, G for each of `count` prompts."""
    places = range(params.first, params.first + count * params.stride, params.stride)
    states = [np.random.SeedSequence((params.seed, place)).generate_state(params.samples_per_prompt) for place in places]
    return [(state >> 1).tolist() for state in states]
