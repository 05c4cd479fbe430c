"""Requests to other services: JSON over HTTP, with a key from the environment, one connection pool per reward."""

import asyncio
import json
import os
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from math import isfinite
from time import time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from rewards.execution import Later, Permanent

LONGEST_REASON = 300  # characters of an answer that are quoted in an error
CONNECT_TIMEOUT = 30.0  # seconds; how long an answer may take is decided by who calls
READY_TIMEOUT = 30.0  # seconds in which a service must show that it is there
AWAY = (502, 503, 504)  # statuses of a service that starts, or of the proxy before one that is not there
WORTH_ANOTHER_TRY = (408, 409, 425, 429)  # of the statuses that put the blame on the request

# Spellings of control tokens: `<|im_end|>`, `<|turn>`, `<turn|>`, their full-width form, `</s>`, `<end_of_turn>`, `[/INST]`.
_CONTROL = re.compile(
    r"<(?=[|｜][^<>\n]{1,64}>|[^<>\n|｜]{1,64}[|｜]>|/?(?:s|[be]o[sp]|sop|pad|unk|mask|cls|sep|image|\w{1,16}_of_\w{1,16})>"
    r"|/?(?:think|tool_call|tool_response)>|</?SYS>>)"
    r"|\[(?=/?(?:INST|THINK|ARGS|IMG|CLS|SEP|PAD|UNK|MASK|gMASK|[A-Z]{1,24}_[A-Z_]{1,24})\])"
)


class EndpointError(RuntimeError):
    """A service did not answer as it should."""


class EndpointBusy(Later, EndpointError):
    """A service wants to be asked again later."""


class EndpointRefused(EndpointError, Permanent):
    """A service will not answer this, however often it is asked."""


class Endpoint:
    """A service that answers JSON with JSON. Used in one event loop.

    Args:
        url: http(s)://host[:port][/path].
        key_variable: Environment variable that holds the key, sent as a bearer token; empty for none.

    Raises:
        ValueError: The url is none, or holds a password, or the variable is not set.
    """

    def __init__(self, url: str, key_variable: str):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {url!r} is not of the form http://host:port/path")
        if "@" in parts.netloc:
            raise ValueError(f"the url of {parts.hostname} holds a password, which errors would show: use key_variable")
        self._variable = key_variable
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        if key_variable and not self._key:
            raise ValueError(f"the key of {url} is wanted from the environment variable {key_variable}, which is not set")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._sessions: list[aiohttp.ClientSession] = []  # opened by the first request, in its event loop

    async def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """Answer to a POST.

        Raises:
            EndpointError: There was none, or none in JSON; EndpointRefused where asking again is in vain, EndpointBusy
                where the service says when to.
            ConnectionError: Nobody answers.
        """
        if not self._sessions:
            self._sessions.append(self._open())
        where = self.url + route
        try:
            async with self._sessions[0].post(where, json=body) as answer:
                text = await answer.text(errors="replace")
                if answer.status != 200:
                    raise self._failure(f"{where} answered {answer.status}: {self.quote(text)}", answer)
        except aiohttp.ClientError as error:
            raise ConnectionError(f"{where}: {_why(error)}") from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EndpointError(f"{where} did not answer with JSON: {self.quote(text)!r}") from error

    async def find(self, route: str, way_out: str) -> tuple[int, str]:
        """Status and text of the answer to a GET, whatever it is: somebody is there.

        Raises:
            ValueError: Nobody is, or the key is refused.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT), self._open() as session, session.get(self.url + route) as answer:
                status, text = answer.status, await answer.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ValueError(f"there is no service at {self.url} ({_why(error)}): {way_out}") from error
        if status in AWAY:
            raise ValueError(f"there is no service at {self.url} ({route} answered {status}): {way_out}")
        if status == 401:
            refused = f"refuses the key of {self._variable}" if self._key else "wants a key: give key_variable"
            raise ValueError(f"the service at {self.url} {refused}")
        return status, text

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)  # how many at once is decided by who calls
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        return aiohttp.ClientSession(headers=self._headers, connector=connector, timeout=timeout, proxy=_proxy(self.url))

    def quote(self, text: str) -> str:
        """The beginning of an answer, for an error; without the key, should the service have repeated it."""
        return (text.replace(self._key, "***") if self._key else text)[:LONGEST_REASON]

    def _failure(self, message: str, answer: aiohttp.ClientResponse) -> EndpointError:
        if answer.status == 401:
            ask = f"is {self._variable} the key that it was started with?" if self._key else "it wants one: key_variable"
            return EndpointRefused(f"{message} ({ask})")
        if 400 <= answer.status < 500 and answer.status not in WORTH_ANOTHER_TRY:
            return EndpointRefused(message)
        if wait := _seconds(answer.headers.get("Retry-After", "")):
            return EndpointBusy(message, wait)
        return EndpointError(message)

    async def close(self) -> None:
        """Close the connections."""
        for session in self._sessions:
            await session.close()
        self._sessions = []


def _why(error: BaseException) -> str:
    """What aiohttp says, without the state of TLS that it puts into the name of a host."""
    return f"{type(error).__name__} {error}".replace(" ssl:default", "").strip()


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a url (HTTP_PROXY, HTTPS_PROXY, NO_PROXY).

    Looked up once: aiohttp's own `trust_env` does so for every request, in another thread, and reads ~/.netrc as well.
    """
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def _seconds(retry_after: str) -> float:
    """How long a Retry-After header asks to wait, given as seconds or as a date; 0 where it says nothing."""
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            wait = parsedate_to_datetime(retry_after).timestamp() - time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, wait) if isfinite(wait) else 0.0


def sendable(text: str) -> str:
    """A text that every service can take: lone surrogates and NUL are replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def disarmed(text: str) -> str:
    """The text of a model for another model to read: a space in every control token that it spells out.

    Servers tokenise a conversation as one text, in which a spelt-out `<|im_end|>` becomes the token that ends a turn.
    """
    return _CONTROL.sub(r"\g<0> ", sendable(text))
