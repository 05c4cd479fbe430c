"""Where rewards run: in the caller's thread, in an event loop, in threads, or in worker processes that can be killed."""

import asyncio
import ctypes
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from rewards.calls import Call, CallRules, Form, Value
from rollout.types import SampleGroup

BACKOFF = (0.5, 30.0)  # seconds before a call is made again: the first wait, doubled each time, and the longest
ABANDONED = 64  # threads that may go on in vain before no more are started
PATIENCE = 60.0  # seconds that a service may ask for before it is called again
PR_SET_PDEATHSIG = 1  # of Linux's prctl
OURS = ("align", "rewards", "rollout")
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


class Permanent(Exception):
    """Raised by a reward whose call would fail again: it is not repeated."""


class Later(Exception):
    """Raised by a reward whose call is to be repeated, but not before some seconds have gone by."""

    def __init__(self, message: str, seconds: float = 0.0):  # a default, for else it could not leave a worker process
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Scores:
    """What a reward made of some rows.

    Args:
        values: One value, None, or the exception that prevented it, per row asked for and in their order.
        seconds: From the first call to the last answer.
        latencies: Seconds of every call, retries included.
    """

    values: Sequence[Value | Exception]
    seconds: float
    latencies: Sequence[float]


class Component(Protocol):
    """A reward, ready to score.

    Args:
        retries: Times that a failed call is made again.
    """

    retries: int

    def ready(self) -> None:
        """Raise ValueError when what it needs elsewhere is not there. Asked once, before anything waits for values."""
        ...

    def start(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Callable[[], Scores]:
        """Begin to score rows (they count the samples of all groups, and ascend); call the result to wait for it."""
        ...

    def close(self) -> None:
        """Leave no process and no connection behind."""
        ...


class Inline:
    """A reward in the thread that scores: it runs when its scores are waited for.

    Args:
        function: The reward.
        form: How it is called.
    """

    def __init__(self, function: Callable[..., Any], form: Form):
        self.retries = 0
        self._function = function
        self._form = form

    def ready(self) -> None:
        """See `Component`."""
        _tell(self._function, "ready")

    def start(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Callable[[], Scores]:
        """See `Component`."""
        return lambda: self._score(groups, rows)

    def _score(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Scores:
        values, times = [], [time.perf_counter()]
        for call in self._form.calls(groups, rows):
            try:
                values += self._form.values(call, self._function(**call.arguments))
            except (Exception, SystemExit) as error:  # a reward is other people's code: the boundary is here
                values += [_placed(_contained(error))] * len(call.rows)
            times.append(time.perf_counter())
        return Scores(values, times[-1] - times[0], [after - before for before, after in pairwise(times)])

    def close(self) -> None:
        """See `Component`."""
        _tell(self._function, "close")


class Invoker(Protocol):
    """Makes one call, somewhere else."""

    def __call__(self, arguments: Mapping[str, Any]) -> Coroutine[Any, Any, Any]:
        """The reward's answer. Raises what it raises, and TimeoutError when it takes too long."""
        ...

    def ready(self) -> None:
        """See `Component`."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class Concurrent:
    """A reward whose calls are made several at once, while other rewards make theirs.

    Args:
        invoke: Makes a call.
        form: How the reward is called.
        rules: How many at once, for how long, and how often again.
    """

    def __init__(self, invoke: Invoker, form: Form, rules: CallRules):
        self.retries = rules.retries
        self._invoke = invoke
        self._form = form
        self._rules = rules

    def ready(self) -> None:
        """See `Component`."""
        self._invoke.ready()

    def start(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Callable[[], Scores]:
        """See `Component`."""
        return in_loop(self._score(groups, rows)).result

    async def _score(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Scores:
        gate, start = asyncio.Semaphore(self._rules.concurrency), time.perf_counter()
        answers: list[tuple[Sequence[Value | Exception], float]] = await asyncio.gather(
            *(self._timed(gate, call) for call in self._form.calls(groups, rows))
        )
        values = [value for part, _ in answers for value in part]
        return Scores(values, time.perf_counter() - start, [seconds for _, seconds in answers])

    async def _timed(self, gate: asyncio.Semaphore, call: Call) -> tuple[Sequence[Value | Exception], float]:
        async with gate:
            start = time.perf_counter()
            values = await self._attempts(call)
            return values, time.perf_counter() - start

    async def _attempts(self, call: Call) -> Sequence[Value | Exception]:
        (wait, longest), asked = BACKOFF, 0.0
        for attempt in range(self._rules.retries + 1):
            if attempt:
                await asyncio.sleep(max(min(longest, wait * 2 ** (attempt - 1)), min(asked, PATIENCE)))
            asked = 0.0
            try:
                return self._form.values(call, await self._invoke(call.arguments))
            except TimeoutError:
                failure: Exception = TimeoutError(f"no answer within {self._rules.timeout:g} s")
            except ProcessExpired as error:
                failure = RuntimeError(f"its process died ({error})")
            except Permanent as error:
                failure = error
                break
            except Later as error:
                failure, asked = error, error.seconds
            except Exception as error:  # as above
                failure = error
        return [_placed(failure)] * len(call.rows)

    def close(self) -> None:
        """See `Component`."""
        self._invoke.close()


class Asynchronous:
    """Calls of a coroutine function, in the event loop.

    Args:
        function: The reward.
        timeout: Seconds for a call.
    """

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]], timeout: float):
        self._function = function
        self._timeout = timeout

    async def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """See `Invoker`."""
        async with asyncio.timeout(self._timeout):
            try:
                return await self._function(**arguments)
            except (SystemExit, KeyboardInterrupt) as error:  # these would end the event loop
                raise _contained(error) from error

    def ready(self) -> None:
        """See `Invoker`."""
        _tell(self._function, "ready")

    def close(self) -> None:
        """See `Invoker`."""
        _tell(self._function, "close")


class Threads:
    """Calls of a plain function, in a thread each.

    Threads of their own, not those of a pool: one that never ends takes no place from those that come after it.

    Args:
        function: The reward.
        timeout: Seconds for a call.
    """

    def __init__(self, function: Callable[..., Any], timeout: float):
        self._function = function
        self._timeout = timeout
        self._abandoned: list[threading.Thread] = []

    async def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """See `Invoker`."""
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= ABANDONED:
            raise RuntimeError(f"{ABANDONED} calls hang in threads, which cannot be killed: set isolation to process")
        answer: Future[Any] = Future()
        thread = threading.Thread(target=self._run, args=(arguments, answer), daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            self._abandoned.append(thread)
            raise

    def _run(self, arguments: Mapping[str, Any], answer: Future[Any]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(self._function(**arguments))
        except BaseException as error:
            answer.set_exception(_contained(error))

    def ready(self) -> None:
        """See `Invoker`."""
        _tell(self._function, "ready")

    def close(self) -> None:
        """See `Invoker`."""
        _tell(self._function, "close")


class Processes:
    """Calls of a plain function, in worker processes; one that overruns is killed, and another takes its place.

    Args:
        make: Makes the reward, once in every process; picklable.
        rules: How many processes, and seconds for a call.
    """

    def __init__(self, make: Callable[[], Callable[..., Any]], rules: CallRules):
        self._make = make
        self._rules = rules
        self._pool: list[ProcessPool] = []  # started by the first call

    async def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """See `Invoker`."""
        if not self._pool:
            context, start = get_context("spawn"), (self._make,)
            self._pool = [ProcessPool(self._rules.concurrency, initializer=_start, initargs=start, context=context)]
        timeout = None if self._rules.timeout == float("inf") else self._rules.timeout
        return await asyncio.wrap_future(self._pool[0].schedule(_call, args=(dict(arguments),), timeout=timeout))

    def ready(self) -> None:
        """See `Invoker`: there is no reward here to ask."""

    def close(self) -> None:
        """See `Invoker`."""
        for pool in self._pool:
            pool.stop()
            pool.join()
        self._pool = []


_here: list[Callable[..., Any]] = []  # the reward of a worker process


def _start(make: Callable[[], Callable[..., Any]]) -> None:
    """In a worker process, before its first call: nothing of it counts as time of a call."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left of it after that one
    _here.append(make())


def _call(arguments: Mapping[str, Any]) -> Any:
    try:
        return _here[0](**arguments)
    except BaseException as error:
        raise _placed(_contained(error)) from error  # notes travel to the other process, tracebacks do not


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def run() -> None:
        while not loop.is_closed():
            with suppress(SystemExit, KeyboardInterrupt):  # of a task that a reward has started: it must not stop all others
                loop.run_forever()

    threading.Thread(target=run, daemon=True, name="rewards").start()
    return loop


def in_loop(work: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Do asynchronous work in the event loop of the rewards, which runs in a thread of its own."""
    return asyncio.run_coroutine_threadsafe(work, _loop())


def _tell(function: Any, method: str) -> None:
    """Call a method without arguments, which may be asynchronous, of a reward that is an object with it."""
    if callable(act := getattr(function, method, None)):
        acting = act()
        if asyncio.iscoroutine(acting):
            in_loop(acting).result()


def _contained(error: BaseException) -> Exception:
    """The error, or one that says what it was where it would end the program rather than the call."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"it raised {type(error).__name__} ({error})").with_traceback(error.__traceback__)


def _placed(error: Exception) -> Exception:
    """The error, with a note of where the user's code raised it, or called what did: the innermost such place, if any."""
    places = [
        f"({Path(frame.f_code.co_filename).name}:{line})"
        for frame, line in walk_tb(error.__traceback__)
        if _is_of_the_user(frame)
    ]
    if places and places[-1] not in getattr(error, "__notes__", ()):  # one object may be raised again and again
        error.add_note(places[-1])
    return error


def _is_of_the_user(frame: FrameType) -> bool:
    """Whether a frame runs neither our code nor Python's own, nor what is installed."""
    path = Path(frame.f_code.co_filename)
    if str(frame.f_globals.get("__name__", "")).partition(".")[0] in OURS or not path.is_absolute():
        return False
    return not (path.is_relative_to(STANDARD_LIBRARY) or {"site-packages", "dist-packages"} & set(path.parts))
