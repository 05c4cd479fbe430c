"""One vLLM server, seen through its HTTP routes. Only JSON travels; weights travel as files (`rollout.transfer`)."""

import asyncio
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np

from rollout.sampler import RolloutError
from rollout.server import SERVED_NAME, SERVERS_KEY

RESETS, RESET_SECONDS = 20, 0.25  # attempts at dropping cached prefixes: aborted requests hold theirs for a moment
HEALTH_SECONDS = 10.0  # for an answer that costs a server nothing
TELL_SECONDS = 30.0  # between two lines about a server that is waited for


class ServerError(RolloutError):
    """A server did not answer, answered too late, or failed."""


class ServerTimeout(ServerError):
    """A server is there, but did not answer in time."""


class Server:
    """Control and queries of one server; sampling itself is asynchronous (`complete`).

    Args:
        url: http://host:port; a /v1 at its end, as OpenAI's clients want it, is left out.
        key: Sent as a bearer token with every request.
        timeout: Seconds for one answer.
        advice: What to do when nobody answers, for the error.
    """

    def __init__(self, url: str, key: str, timeout: float, advice: str = ""):
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.timeout = timeout
        self.advice = advice
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def healthy(self) -> bool:
        """Whether it answers, and its engine lives."""
        try:
            self._request("GET", "/health", timeout=HEALTH_SECONDS)
        except RolloutError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Wait until it answers, and say why it does not, at once and now and then.

        Raises:
            RolloutError: It did not in time, or something answers that is no server of ours.
        """
        deadline, told = time.monotonic() + seconds, -math.inf
        while True:
            try:
                self._request("GET", "/health", timeout=HEALTH_SECONDS)
                return
            except ServerError as error:
                now = time.monotonic()
                if now >= deadline:
                    raise RolloutError(f"no vLLM server within rollout.engine.start_timeout: {error}") from error
                if now - told >= TELL_SECONDS:
                    left = f"{deadline - now:.0f} s more (rollout.engine.start_timeout)"
                    print(f"waiting for a vLLM server: {error}; {left}", flush=True)
                    told = now
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))

    def version(self, timeout: float = HEALTH_SECONDS) -> str:
        """The version that it carries. Asks the engine itself, so one that hangs does not answer.

        Raises:
            ServerTimeout: No answer within `timeout` seconds.
        """
        return self._request("GET", "/weight_info", timeout=timeout)["weight_version"]

    def carry(self, version: str) -> None:
        """Let it say from now on that it holds a version."""
        self.post("/update_weight_version", {"new_version": version})

    def context(self) -> int:
        """Tokens that its context holds."""
        models = self._request("GET", "/v1/models")["data"]
        return int(models[0]["max_model_len"])

    def world_size(self) -> int:
        """GPUs that share its model."""
        return int(self._request("GET", "/get_world_size")["world_size"])

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the server's tokenizer, without special tokens."""
        return self.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids by the server's tokenizer, special tokens included."""
        return self.post("/detokenize", {"tokens": list(ids)})["prompt"]

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """log p(token | those before it), nats, of all tokens but the first: (S, T - 1) for S sequences of T tokens."""
        body = {"model": SERVED_NAME, "prompt": [list(s) for s in sequences], "max_tokens": 1, "prompt_logprobs": 0}
        choices = self.post("/v1/completions", body)["choices"]
        rows = [
            [choice["prompt_logprobs"][i][str(sequence[i])]["logprob"] for i in range(1, len(sequence))]
            for sequence, choice in zip(sequences, choices, strict=True)
        ]
        return np.array(rows)

    def load(self, update: Mapping[str, Any]) -> None:
        """Take over weights by the transfer engine that the server was started with, and forget cached prefixes.

        Args:
            update: What the engine is told; for `directory` the path.
        """
        self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": dict(update)})
        self.finish_load()

    def finish_load(self) -> None:
        """End a weight update. Raises ServerError when cached prefixes of the old weights cannot be dropped."""
        self.post("/finish_weight_update")
        for _ in range(RESETS):
            if self.post("/reset_prefix_cache")["success"]:
                return
            time.sleep(RESET_SECONDS)
        raise ServerError(f"{self.url} cannot drop its cached prefixes: is something else sampling from it?")

    def call(self, method: str, **arguments: str) -> list[Any]:
        """Results of a method of the server's worker processes, one per process."""
        return self.post("/collective_rpc", {"method": method, "kwargs": arguments})["results"]

    async def complete(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The request's completions. Raises ServerError when this server cannot give them, RolloutError when none can."""
        answer = await self._ask(session, "POST", "/v1/completions", {"model": SERVED_NAME, **request}, self.timeout)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for choice in choices:
            if choice["finish_reason"] not in ("stop", "length"):
                raise ServerError(f"{self.url} ended a sample with {choice['finish_reason']!r}")
        return choices

    def post(self, route: str, body: Any = None) -> Any:
        """Answer to a POST. Raises ServerError, or RolloutError where the server refuses."""
        return self._request("POST", route, body)

    def _request(self, method: str, route: str, body: Any = None, timeout: float = 0.0) -> Any:
        async def ask() -> Any:
            async with aiohttp.ClientSession() as session:
                return await self._ask(session, method, route, body, timeout or self.timeout)

        return asyncio.run(ask())

    async def _ask(self, session: aiohttp.ClientSession, method: str, route: str, body: Any, timeout: float) -> Any:
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with session.request(method, self.url + route, json=body, headers=self.headers, timeout=limit) as answer:
                return self._read(route, answer.status, await answer.text())
        except TimeoutError as error:
            most = " (a sample may take rollout.engine.request_timeout)" if timeout == self.timeout else ""
            raise ServerTimeout(f"{self.url}{route} did not answer within {timeout:g} s{most}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError("; ".join(filter(None, (f"{self.url}: {_reason(error)}", self.advice)))) from error

    def _read(self, route: str, status: int, text: str) -> Any:
        where = self.url + route
        if status == 401:
            what = "refuses the key" if self.headers else f"wants a key, and {SERVERS_KEY} is not set"
            raise RolloutError(f"{self.url} {what}: set {SERVERS_KEY} to the one that it was started with")
        if status == 404:
            raise RolloutError(f"{where} does not exist: give servers that `paretune worker` started, as http://host:port")
        if status >= 500:
            raise ServerError(f"{where} failed ({status}): {text[:300]}")
        if status >= 400:
            raise RolloutError(f"{where} refused ({status}): {text[:300]}")
        try:
            return json.loads(text or "null")
        except ValueError as error:
            raise RolloutError(f"{where} does not answer as vLLM does: {text[:100]!r}") from error


def _reason(error: Exception) -> str:
    """Why nothing came, in words."""
    if not isinstance(error, aiohttp.ClientConnectorError):
        return f"{type(error).__name__} {error}"
    cause = error.os_error
    return os.strerror(cause.errno) if (cause.errno or 0) > 0 else str(cause.strerror or cause)
