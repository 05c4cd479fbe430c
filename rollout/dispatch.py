"""Spreads requests over servers by load; those of a server that fails go to the others, and to itself when it is back."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.client import Server, ServerError, ServerTimeout
from rollout.sampler import RolloutError

RETRY_SECONDS = 1.0  # between two looks at a server that is away
ATTEMPTS = 4  # times that one request is tried


@dataclass(frozen=True)
class Job:
    """One request.

    Args:
        tokens: That it may take.
        samples: That it makes at the same time.
        run: Does it on a server.
    """

    tokens: int
    samples: int
    run: Callable[[Server], Awaitable[Any]]


class Dispatcher:
    """Runs requests on the server that has least to do. Used for one batch, within one event loop.

    Args:
        servers: All of them.
        away: Those that cannot be used at first.
        concurrent: Samples in flight at one server; a request for more is sent to one that has nothing to do.
        ready: Whether a server can be used (again); called in a thread of its own. Raises RolloutError that says why not.
        hopeless: Why no server will come back; empty while one may.
        patience: Seconds to wait when no server is left.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        away: Iterable[Server],
        concurrent: int,
        ready: Callable[[Server], None],
        hopeless: Callable[[], str],
        patience: float,
    ):
        self.away: set[Server] = set()
        self._tokens = dict.fromkeys(servers, 0)  # that each server may still have to make
        self._running = dict.fromkeys(servers, 0)
        self._answered = dict.fromkeys(servers, -math.inf)  # when each last completed a request
        self._concurrent = concurrent
        self._ready = ready
        self._hopeless = hopeless
        self._patience = patience
        self._changed = asyncio.Condition()
        self._failure: RolloutError | None = None
        self._recoveries: list[asyncio.Task[None]] = []
        for server in away:
            self._lose(server)

    async def run_all(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the order of the jobs.

        The largest begin first, so that what is left at the end is small. Raises RolloutError when a job fails for good.
        """
        tasks: dict[int, asyncio.Task[Any]] = {}
        try:
            for i in sorted(range(len(jobs)), key=lambda i: -jobs[i].tokens):
                tasks[i] = asyncio.create_task(self._run(jobs[i]))
            await asyncio.gather(*tasks.values())
        finally:
            for task in (*tasks.values(), *self._recoveries):
                task.cancel()
            await asyncio.gather(*tasks.values(), *self._recoveries, return_exceptions=True)
        return [tasks[i].result() for i in range(len(jobs))]

    async def _run(self, job: Job) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            server = await self._take(job)
            try:
                result = await job.run(server)
                self._answered[server] = time.monotonic()
                return result
            except ServerError as error:
                busy = time.monotonic() - self._answered[server] < server.timeout
                if not (busy and isinstance(error, ServerTimeout)):  # slow with this one, but at work
                    self._lose(server)
                if attempt == ATTEMPTS:
                    raise RolloutError(f"a sample was tried {ATTEMPTS} times: {error}") from error
            finally:
                self._tokens[server] -= job.tokens
                self._running[server] -= job.samples
                async with self._changed:
                    self._changed.notify_all()
        raise AssertionError("the last attempt returns or raises")

    async def _take(self, job: Job) -> Server:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or self._free(job))
            if self._failure:
                raise self._failure
            server = min(self._free(job), key=self._tokens.__getitem__)
            self._tokens[server] += job.tokens
            self._running[server] += job.samples
            return server

    def _free(self, job: Job) -> list[Server]:
        most = max(0, self._concurrent - job.samples)
        return [s for s, count in self._running.items() if s not in self.away and count <= most]

    def _lose(self, server: Server) -> None:
        if server not in self.away:
            self.away.add(server)
            self._recoveries.append(asyncio.get_running_loop().create_task(self._wait_for(server)))

    async def _wait_for(self, server: Server) -> None:
        """Look until the server is back, or no server has been there for too long."""
        last_seen = time.monotonic()
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                await asyncio.to_thread(self._ready, server)
                self.away.discard(server)
            except RolloutError as error:
                if len(self.away) < len(self._running):
                    last_seen = time.monotonic()
                elif reason := self._hopeless():
                    self._failure = RolloutError(f"no vLLM server is left: {reason}")
                elif time.monotonic() - last_seen > self._patience:
                    self._failure = RolloutError(f"no vLLM server could be used for {self._patience:.0f} s: {error}")
            async with self._changed:
                self._changed.notify_all()
            if self._failure or server not in self.away:
                return
