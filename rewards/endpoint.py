"""Requests to other services: JSON over HTTP, with a key from the environment, one connection pool per reward."""

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp

LONGEST_REASON = 300  # characters of an answer that are quoted in an error


class EndpointError(RuntimeError):
    """A service did not answer as it should."""


class Endpoint:
    """A service that answers JSON with JSON. Used in one event loop.

    Args:
        url: http(s)://host[:port][/path].
        key_variable: Environment variable that holds the key, sent as a bearer token; empty for none.

    Raises:
        ValueError: The url is none, or the variable is not set.
    """

    def __init__(self, url: str, key_variable: str):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {url!r} is not of the form http://host:port/path")
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(f"the key of {url} is wanted from the environment variable {key_variable}, which is not set")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {os.environ[key_variable]}"} if key_variable else {}
        self._sessions: list[aiohttp.ClientSession] = []  # opened by the first request, in its event loop

    async def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """Answer to a POST. Raises EndpointError when it is none, ConnectionError when nobody answers."""
        if not self._sessions:
            connector = aiohttp.TCPConnector(limit=0)  # how many at once is decided by who calls
            self._sessions.append(aiohttp.ClientSession(headers=self._headers, connector=connector, trust_env=True))
        where = self.url + route
        try:
            async with self._sessions[0].post(where, json=body) as answer:
                text = await answer.text(errors="replace")
                if answer.status != 200:
                    raise EndpointError(f"{where} answered {answer.status}: {text[:LONGEST_REASON]}")
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{where}: {type(error).__name__} {error}") from error
        try:
            return json.loads(text)
        except ValueError as error:
            raise EndpointError(f"{where} did not answer with JSON: {text[:LONGEST_REASON]!r}") from error

    async def close(self) -> None:
        """Close the connections."""
        for session in self._sessions:
            await session.close()
        self._sessions = []
