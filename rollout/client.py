"""One vLLM server, seen through its HTTP routes. Only JSON travels; weights travel as files (`rollout.transfer`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from rollout.sampler import RolloutError
from rollout.server import SERVED_NAME, SERVERS_KEY


class ServerError(RolloutError):
    """A server did not answer, answered too late, or failed."""


class ServerTimeout(ServerError):
    """A server is there, but did not answer in time."""


class Server:
    """Control and queries of one server; sampling itself is asynchronous (`complete`).

    Args:
        url: http://host:port.
        key: Sent as a bearer token with every request.
        timeout: Seconds for one answer.
    """

    def __init__(self, url: str, key: str, timeout: float):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def healthy(self) -> bool:
        """Whether it answers, and its engine lives."""
        try:
            return httpx.get(f"{self.url}/health", headers=self.headers, timeout=10, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def version(self) -> str:
        """Of the weights it holds, as the last `load` called them."""
        return self._request("GET", "/weight_info")["weight_version"]

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

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """log p(token | those before it), nats, of all tokens but the first: (S, T - 1) for S sequences of T tokens."""
        body = {"model": SERVED_NAME, "prompt": [list(s) for s in sequences], "max_tokens": 1, "prompt_logprobs": 0}
        choices = self.post("/v1/completions", body)["choices"]
        rows = [
            [choice["prompt_logprobs"][i][str(sequence[i])]["logprob"] for i in range(1, len(sequence))]
            for sequence, choice in zip(sequences, choices, strict=True)
        ]
        return np.array(rows)

    def load(self, update: Mapping[str, Any], version: str) -> None:
        """Take over weights by the transfer engine that the server was started with, and forget cached prefixes.

        Args:
            update: What the engine is told; for `directory` the path.
            version: The name that `version` gives from now on.
        """
        self.post("/start_weight_update")
        self.post("/update_weights", {"update_info": dict(update)})
        self.finish_load(version)

    def finish_load(self, version: str) -> None:
        """End a weight update. Raises ServerError unless the server then says that it holds `version`."""
        self.post("/finish_weight_update", {"weight_version": version})
        if not self.post("/reset_prefix_cache")["success"]:
            raise ServerError(f"{self.url} could not drop its cached prefixes: is something else sampling from it?")
        if self.version() != version:
            raise ServerError(f"{self.url} took the weights {version} but says that it holds {self.version()}")

    def call(self, method: str, **arguments: str) -> list[Any]:
        """Results of a method of the server's worker processes, one per process."""
        return self.post("/collective_rpc", {"method": method, "kwargs": arguments})["results"]

    async def complete(self, client: httpx.AsyncClient, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """One completion. Raises ServerError when it cannot be had from this server, RolloutError when from none."""
        try:
            answer = await client.post(
                f"{self.url}/v1/completions",
                json={"model": SERVED_NAME, **request},
                headers=self.headers,
                timeout=self.timeout,
            )
        except (httpx.HTTPError, OSError) as error:
            raise self._failure("", error) from error
        choice = self._read(answer)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerError(f"{self.url} ended a sample with {choice['finish_reason']!r}")
        return choice

    def post(self, route: str, body: Any = None) -> Any:
        """Answer to a POST. Raises ServerError, or RolloutError where the server refuses."""
        return self._request("POST", route, body)

    def _request(self, method: str, route: str, body: Any = None) -> Any:
        try:
            answer = httpx.request(
                method, f"{self.url}{route}", json=body, headers=self.headers, timeout=self.timeout, trust_env=False
            )
        except httpx.HTTPError as error:
            raise self._failure(route, error) from error
        return self._read(answer)

    def _failure(self, route: str, error: Exception) -> ServerError:
        if isinstance(error, httpx.ReadTimeout):
            return ServerTimeout(f"{self.url}{route} did not answer within {self.timeout:.0f} s")
        return ServerError(f"{self.url}{route}: {type(error).__name__} {error}")

    def _read(self, answer: httpx.Response) -> Any:
        if answer.status_code == 401:
            raise RolloutError(
                f"{self.url} refuses the key: set {SERVERS_KEY} to the one that it was started with"
            )
        if answer.status_code == 404:
            raise RolloutError(f"{answer.url} does not exist: start the server by `paretune worker`")
        if answer.status_code >= 500:
            raise ServerError(f"{answer.url} failed ({answer.status_code}): {answer.text[:300]}")
        if answer.status_code >= 400:
            raise RolloutError(f"{answer.url} refused ({answer.status_code}): {answer.text[:300]}")
        return answer.json()
