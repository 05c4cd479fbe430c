"""Sampler on one or many vLLM servers: token ids in, token ids and log-probabilities out."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import numpy as np

from rollout.client import Server, ServerError
from rollout.dispatch import Dispatcher, Job
from rollout.publish import Publisher, belongs_to_another
from rollout.sampler import NO_CHECK, Check, Gap, RolloutError, SamplingParams
from rollout.transfer import on_all
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

REQUESTS = 32  # per server, as far as there are samples: enough to spread evenly, and each costs a server milliseconds


@dataclass(frozen=True)
class Limits:
    """How much is asked of servers, and how long they are waited for.

    Args:
        concurrent: Samples in flight at one server from this process.
        patience: Seconds to wait for a server when there is none left.
    """

    concurrent: int
    patience: float


class VllmSampler:
    """Samples on vLLM servers.

    While `sample` runs in one thread, `close` may be called in another one.

    Args:
        servers: In any order, which decides between equals; they hold the same policy.
        publisher: This process's part in bringing policies to them.
        decode: Texts of lists of token ids, without special tokens.
        stop_token_ids: Tokens that end a completion.
        limits: See there.
        run: Sets this run's versions apart from those of others that used the same servers.
    """

    shares_weights = False

    def __init__(
        self,
        servers: Sequence[Server],
        publisher: Publisher,
        decode: Callable[[list[list[int]]], list[str]],
        stop_token_ids: Sequence[int],
        limits: Limits,
        run: str,
    ):
        self.servers = tuple(servers)
        self.publisher = publisher
        self._decode = decode
        self._stop = list(stop_token_ids)
        self._limits = limits
        self._run = run
        self._version = 0
        self._closed = False
        self._batch: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None  # that is being sampled

    def sync(self, weights: Iterable[tuple[str, Any]], version: int, check: Check = NO_CHECK) -> Gap:
        """See `Sampler.sync`. Raises RolloutError when no server can have the weights."""
        self._version = version
        return self.publisher.publish(weights, self._name, check)

    def differing(self) -> Sequence[str]:
        """See `Sampler.differing`."""
        return self.publisher.differing()

    def close(self) -> None:
        """Give up what is being sampled, and leave nothing behind."""
        self._closed = True
        if self._batch is not None:
            loop, task = self._batch
            loop.call_soon_threadsafe(task.cancel)
        self.publisher.close()

    @property
    def _name(self) -> str:
        return f"{self._run}-{self._version}"

    def _still_own(self) -> None:
        """Raise RolloutError when another run has changed a server's weights while samples were drawn."""
        for server in self.servers:
            try:
                version = server.version()
            except ServerError:
                continue  # gone or being started again; what it gave before was ours
            if belongs_to_another(version, self._name):
                raise RolloutError(
                    f"{server.url} holds the weights {version!r}: another run uses it, so samples cannot be told apart"
                )

    def _ready(self, server: Server) -> None:
        """Raise RolloutError unless a server answers and carries the version in force."""
        if (version := server.version()) != self._name:
            raise ServerError(f"{server.url} holds the weights {version!r} and not {self._name!r}; does another run use it?")

    # --- samples ------------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[SampleGroup]:
        """See `Sampler.sample`. Every sample has a seed of its own, so that it does not matter which server draws it.

        Raises:
            RolloutError: No server is left, or all refuse a request.
        """
        requests = self._requests(prompts, params)
        if self._closed:
            raise RolloutError("the sampler is closed")
        answers = asyncio.run(self._complete_all(requests, on_all(self.servers, self._ready)))
        self._still_own()
        size = params.samples_per_prompt
        repeats = size if params.temperature == 0 else 1
        choices = [choice for answer in answers for choice in answer for _ in range(repeats)]
        texts = self._decode([choice["token_ids"] for choice in choices])
        samples = [self._sample(choice, text, params) for choice, text in zip(choices, texts, strict=True)]
        return [SampleGroup(p, tuple(samples[i * size : (i + 1) * size])) for i, p in enumerate(prompts)]

    def _requests(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[dict[str, Any]]:
        """Several samples of a prompt to a request. Greedy ones, which are all equal, are made once: vLLM makes no more."""
        size = 1 if params.temperature == 0 else params.samples_per_prompt
        share = max(1, min(size, len(prompts) * size // (REQUESTS * len(self.servers))))
        return [
            self._request(prompt, seed + first, min(share, size - first), params)
            for prompt, seed in zip(prompts, _seeds(len(prompts), params), strict=True)
            for first in range(0, size, share)
        ]

    def _request(self, prompt: Prompt, seed: int, count: int, params: SamplingParams) -> dict[str, Any]:
        """For `count` samples; vLLM gives them the seeds from `seed` on."""
        request = {
            "prompt": list(prompt.token_ids),
            "n": count,
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

    async def _complete_all(
        self, requests: Sequence[dict[str, Any]], away: Iterable[Server]
    ) -> list[list[Mapping[str, Any]]]:
        """Completions of every request, in the order of the requests."""
        self._batch = asyncio.get_running_loop(), asyncio.current_task()
        limits, hopeless = self._limits, self.publisher.hopeless
        dispatcher = Dispatcher(self.servers, away, limits.concurrent, self._ready, hopeless, limits.patience)
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                jobs = [Job(_tokens(r), r["n"], partial(Server.complete, session=session, request=r)) for r in requests]
                return await dispatcher.run_all(jobs)
        finally:
            self._batch = None


def _tokens(request: Mapping[str, Any]) -> int:
    """What a request may take: tokens to read and to make."""
    return len(request["prompt"]) + request["n"] * request["max_tokens"]


def _seeds(count: int, params: SamplingParams) -> list[int]:
    """Seeds of 31 bits of the first samples of `count` prompts; those of the others follow it."""
    places = range(params.first, params.first + count * params.stride, params.stride)
    return [int(np.random.SeedSequence((params.seed, place)).generate_state(1)[0]) >> 1 for place in places]
