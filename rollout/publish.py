"""How a policy reaches vLLM servers and stays there: pushes, checks, and a watch over servers that fail."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rollout.client import Server, ServerError, ServerTimeout
from rollout.sampler import Check, Gap, RolloutError
from rollout.transfer import Transfer, Weights, on_all

PERIOD = 1.0  # seconds between two looks at the servers
REFUSALS = 2  # of the same weights by a server that answers; more would not help


class Publisher(Protocol):
    """One process's part in bringing policies to the servers."""

    def publish(self, weights: Weights, version: str, check: Check) -> Gap:
        """Bring a policy to the servers; those within the check's band carry its version from then on, and no others.

        Returns:
            The largest gap of any server.

        Raises:
            RolloutError: No server can have it.
        """
        ...

    def differing(self) -> Sequence[str]:
        """Names of weights that servers do not compute with; asked after a check has failed."""
        ...

    def hopeless(self) -> str:
        """Why no server will ever come back; empty while one may."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class Follower:
    """The part of a process that sends nothing, but is needed where sharded weights are put together."""

    def publish(self, weights: Weights, version: str, check: Check) -> Gap:
        """Go through the weights, as the sending process does."""
        for _ in weights:
            pass
        return Gap()

    def differing(self) -> Sequence[str]:
        """Known to the sending process."""
        return ()

    def hopeless(self) -> str:
        """Known to the sending process."""
        return ""

    def close(self) -> None:
        """Nothing to leave behind."""


class Leader:
    """The part of the main process: sends, checks, and watches.

    A thread looks at every server. One that fails is started again where that is in our hands; one that does not carry the
    version in force gets the weights, is checked, and carries it then. So whatever carries the version can be sampled from.

    Args:
        servers: All of them.
        transfer: Carries weights.
        restart: Called with the place of a server and whether it hangs. Raises RolloutError when it cannot run again.
        patience: Seconds to wait for a server when none is there.
        release: Called at the end.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        transfer: Transfer,
        restart: Callable[[int, bool], None],
        patience: float,
        release: Callable[[], None] = lambda: None,
    ):
        self.servers = tuple(servers)
        self.transfer = transfer
        self._restart = restart
        self._patience = patience
        self._release = release
        self._version = ""
        self._check: Check
        self._gap = Gap()
        self._gone: dict[int, str] = {}
        self._refused: dict[int, list[str]] = {}  # why each server that answers would not have the version in force
        self._told: dict[int, str] = {}  # what keeps each server away
        self._lock = threading.Lock()  # held while weights are on their way
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="watch over vLLM servers")

    def publish(self, weights: Weights, version: str, check: Check) -> Gap:
        """See `Publisher`. Servers that do not answer are left to the watch."""
        weights = iter(weights)
        with self._lock:
            self._version, self._check = version, check
            self._refused.clear()
            try:
                there = [server for server in self.servers if server.healthy()]
                errors = self.transfer.send(weights, there)
            finally:
                for _ in weights:  # the other processes take part to the end
                    pass
            gaps: list[Gap] = []
            on_all([server for server in there if server not in errors], lambda server: gaps.append(self._admit(server)))
        if not self._watcher.ident:
            self._watcher.start()
        return worst(gaps) if gaps else self._wait(errors)

    def differing(self) -> Sequence[str]:
        """See `Publisher`; known where the weights lie in files."""
        names: dict[str, None] = {}
        for server in self.servers:
            names |= dict.fromkeys(self.transfer.differing(server))
        return tuple(names)

    def hopeless(self) -> str:
        """See `Publisher`."""
        refused = {index: errors[-1] for index, errors in self._refused.items() if len(errors) >= REFUSALS}
        reasons = self._gone | refused
        return next(iter(reasons.values())) if len(reasons) == len(self.servers) else ""

    def close(self) -> None:
        """End the watch, then release the transfer."""
        self._closed.set()
        if self._watcher.ident:
            self._watcher.join()
        self.transfer.close()
        self._release()

    def _admit(self, server: Server) -> Gap:
        """Check what a server has loaded; let it carry the version when it is what the learner has."""
        gaps = np.abs(server.score(self._check.sequences) - self._check.expected)
        gap = Gap(float(np.mean(gaps)), float(np.max(gaps)))
        if self._check.passes(gap):
            server.carry(self._version)
        return gap

    def _wait(self, errors: dict[Server, RolloutError]) -> Gap:
        """Wait until the watch has brought one server back."""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline and not self.hopeless():
            if any(carries(server, self._version) for server in self.servers):
                return self._gap
            time.sleep(PERIOD)
        told = [*map(str, errors.values()), *self._told.values(), "none of them answers"]
        reason = self.hopeless() or told[0]
        raise RolloutError(f"no vLLM server took the weights: {reason}")

    # --- the watch ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(PERIOD):
            for index, server in enumerate(self.servers):
                if index in self._gone or self._closed.is_set():
                    continue
                try:
                    self._look_after(index, server)
                except RolloutError as error:
                    if self._told.get(index) != str(error):
                        print(f"vLLM server {server.url}: {str(error).removeprefix(f'{server.url}: ')}", flush=True)
                    self._told[index] = str(error)
                else:
                    self._told.pop(index, None)

    def _look_after(self, index: int, server: Server) -> None:
        try:
            version = server.version(server.timeout)
        except ServerError as error:
            self._start_again(index, isinstance(error, ServerTimeout))
            if not server.healthy():
                raise  # it is somebody else's to start
            return
        if belongs_to_another(version, self._version):
            raise RolloutError(f"it holds the weights {version!r}: another run uses it")
        with self._lock:
            if version == self._version or server.version() == self._version:
                return
            try:
                self.transfer.resend(server)
                self._gap = self._admit(server)
                if not self._check.passes(self._gap):
                    largest = f"{self._gap.max:.2g}"
                    raise RolloutError(f"{server.url}: its log-probabilities differ from the learner's by {largest}")
            except RolloutError as error:
                if server.healthy():
                    self._refused.setdefault(index, []).append(str(error))
                raise
            self._refused.pop(index, None)

    def _start_again(self, index: int, hangs: bool) -> None:
        try:
            self._restart(index, hangs)
        except RolloutError as error:
            self._gone[index] = str(error)
            raise


def carries(server: Server, version: str) -> bool:
    """Whether a server answers, and says that it holds a version."""
    try:
        return server.version() == version
    except RolloutError:
        return False


def belongs_to_another(held: str, own: str) -> bool:
    """Whether a server carries a version that another run has given it; before any, vLLM calls it `default`."""
    return held not in ("default", "") and held.rpartition("-")[0] != own.rpartition("-")[0]


def worst(gaps: Sequence[Gap]) -> Gap:
    """The largest figures of several gaps; NaN when one is."""
    return Gap(float(np.max([gap.mean for gap in gaps])), float(np.max([gap.max for gap in gaps])))
