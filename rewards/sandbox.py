"""The program that runs untrusted Python against tests; `rewards.code` starts one per sample.

It is two kinds of process. The keeper reads code and tests from its standard input, answers on its standard output, and runs
nothing untrusted. For every test it forks a child, which gives up its rights (`rewards.confine`), runs the code, and only
then is sent the test. The test comes without the conditions of its assertions (`rewards.assertions`): the child evaluates
the operands of a condition and sends them to the keeper as plain data; the keeper, which has the literals, decides. When
the child is done, or its time is over, it is killed, and its folder deleted.

What travels (a frame is four bytes of length, then that many):

    to the keeper     a frame of marshal (folder, seconds, memory, landlock, number of tests, code), then per test one of
                      (source, conditions, sure); all from the trainer, and read no sooner than needed
    from the keeper   `C` when the first child is confined; `1` or `0` per test; `!` and a reason when it cannot go on
    to a child        a frame: 16 random bytes, the source of its test
    from a child      frames: `C` it is confined; `R` the code has run; `A`, number of a condition, its operands;
                      `S`, number of a condition, `1` or `0`; `D`, the random bytes: the test has run

What a child sends may be forged by what runs in it, and is read as such: it is never unpickled.
"""

from __future__ import annotations

import builtins
import marshal
import os
import resource
import select
import sys
import time
from itertools import islice
from math import inf, isclose

from rewards import confine
from rewards.plain import opaque, pack, unpack

# typing takes longer to import than everything else that runs before the code does
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from typing import Any, NoReturn

LONGEST = 4 << 20  # bytes of a frame
KEEPER = 1 << 30  # bytes of address space
TO_CONFINE = 20.0  # seconds that a child may take before it runs anything; no time of the code's
LOOK = 0.05  # seconds between two looks at what a child has made
ENTRIES, BYTES, DEPTH = 1000, 64 << 20, 8  # that its folder may have
COMMON = ("collections", "functools", "heapq", "re", "typing")  # modules that much code imports, and that are slow to import
FUNCTIONS = {"__builtins__": {}, "abs": abs, "isclose": isclose}  # of conditions


class Fault(RuntimeError):
    """The sandbox does not work, so that nothing can be said about the code."""


def main() -> None:
    """Be the keeper."""
    try:
        _keep()
    except BaseException as error:
        os.write(1, f"!{type(error).__name__}: {error}".encode(errors="replace")[:2000])


def _keep() -> None:
    folder, left, memory, landlock, number, code = marshal.loads(_read_frame(0))
    confine.without_privileges(folder)
    confine.die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (KEEPER, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if number > 1:
        for name in COMMON:
            if name.encode() in code:
                __import__(name)  # once for all children
    for n in range(number):
        allowed = left if n == number - 1 else left / 2
        child = _Child(os.path.join(folder, str(n)), code, memory, int(allowed) + 1, landlock)
        try:
            child.await_confinement()
            if n == 0:
                os.write(1, b"C")
            start = time.monotonic()
            ran = child.receive(start + allowed) == b"R"
            passed = ran and _passes(child, marshal.loads(_read_frame(0)), start + allowed)
            left -= time.monotonic() - start
        finally:
            child.end()
        if not ran:  # nor will it for the other tests
            os.write(1, b"0" * (number - n))
            return
        os.write(1, b"1" if passed else b"0")


def _passes(child: _Child, test: tuple[bytes, Sequence[tuple[str, bool]], Collection[int]], deadline: float) -> bool:
    """Whether a child runs a test to its end, with all conditions met and none left out that must be there."""
    source, conditions, sure = test
    codes = [compile(condition, "condition", "eval") for condition, _ in conditions]
    token, seen = os.urandom(16), set()
    if not child.send(token + source, deadline):
        return False
    while frame := child.receive(deadline):
        if frame[:1] == b"D":
            return frame[1:] == token and seen.issuperset(sure) and (bool(seen) or not codes)
        try:
            n = int.from_bytes(frame[1:5], "big")
            if frame[:1] == b"S" and conditions[n][1]:
                met = frame[5:] == b"1"
            else:
                met = frame[:1] == b"A" and bool(eval(codes[n], FUNCTIONS, _names(unpack(frame[5:]))))
        except Exception:  # operands that do not fit, or are none
            return False
        if not met:
            return False
        seen.add(n)
    return False


def _names(operands: Sequence[Any]) -> dict[str, Any]:
    return {f"_{n}": operand for n, operand in enumerate(operands)}


class _Child:
    """A confined process that runs the code, seen from the keeper.

    Args:
        folder: Made for it, and deleted after it.
        code: Source, as UTF-8.
        memory: Bytes of address space.
        cpu_seconds: Of processor time.
        landlock: Whether to use it.
    """

    def __init__(self, folder: str, code: bytes, memory: int, cpu_seconds: int, landlock: bool):
        os.mkdir(folder, 0o700)
        self._folder = folder
        its_input, self._to = os.pipe()
        self._from, its_output = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _be_child(code, folder, landlock, memory, cpu_seconds, its_input, its_output)
        os.close(its_input)
        os.close(its_output)
        os.set_blocking(self._to, False)
        self._received = bytearray()
        self._look = inf  # when to look next at what it has made: not before it can have made anything

    def await_confinement(self) -> None:
        """Wait until it has given up its rights. Raises Fault when it cannot."""
        first = self.receive(time.monotonic() + TO_CONFINE)
        if first != b"C":
            raise Fault((first or b"!it ended, or took too long, before it ran any code")[1:].decode(errors="replace"))
        self._look = 0.0

    def receive(self, deadline: float) -> bytes:
        """The next frame; empty when there is none in time, or when it has made too much."""
        while self._in_bounds(deadline):
            size = int.from_bytes(self._received[:4], "big") + 4
            if size > LONGEST:
                return b""
            if len(self._received) >= size:
                frame = bytes(self._received[4:size])
                del self._received[:size]
                return frame
            if self._ready(self._from, select.POLLIN, deadline):
                data = os.read(self._from, 1 << 16)
                if not data:
                    return b""
                self._received += data
        return b""

    def send(self, data: bytes, deadline: float) -> bool:
        """Send a frame; False when it was not read in time."""
        data = framed(data)
        while data and self._in_bounds(deadline):
            if self._ready(self._to, select.POLLOUT, deadline):
                try:
                    data = data[os.write(self._to, data) :]
                except OSError:  # it has ended
                    return False
        return not data

    def end(self) -> None:
        """Kill it, and delete what it has made. It has no children that could outlive it."""
        os.kill(self._pid, 9)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        clear(self._folder)

    def _ready(self, file: int, event: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(file, event)
        return bool(poll.poll(1000 * max(0.0, min(LOOK, deadline - time.monotonic()))))

    def _in_bounds(self, deadline: float) -> bool:
        now = time.monotonic()
        if now >= self._look:
            self._look = now + LOOK
            entries = list(islice(_sizes(self._folder), ENTRIES + 1))
            if len(entries) > ENTRIES or sum(entries) > BYTES or _threads(self._pid) > confine.THREADS:
                return False
        return now < deadline


def _threads(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    except OSError:  # not ours to see here; threads are bounded by memory then
        return 0


def _sizes(folder: str, depth: int = 0) -> Iterator[int]:
    """Bytes of every entry; too many for a folder that is too deep."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    yield entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        yield from _sizes(entry.path, depth + 1) if depth < DEPTH else [BYTES + 1]
                except FileNotFoundError:
                    continue
    except FileNotFoundError:
        return
    except OSError:
        yield BYTES + 1  # it shut a folder against looks


def clear(folder: str) -> None:
    """Delete a folder that was untrusted code's: however deep, whatever the modes in it, and no link followed."""
    places = [folder]
    for place in places:
        with os.scandir(place) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                places.append(os.path.join(folder, os.urandom(8).hex()))
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, places[-1])  # to the top, so that no path gets too long
            else:
                os.unlink(entry.path)
    for place in reversed(places):
        os.rmdir(place)


def framed(data: bytes) -> bytes:
    """A message, with its length before it."""
    return len(data).to_bytes(4, "big") + data


def _read_frame(file: int) -> bytes:
    size, data = 4, b""
    while len(data) < size:
        part = os.read(file, size - len(data))
        if not part:
            raise EOFError("the other side is gone")
        data += part
        if size == 4 and len(data) == 4:
            size, data = int.from_bytes(data, "big"), b""
    return data


# --- in the child -----------------------------------------------------------------------------------------------------


def _be_child(code: bytes, folder: str, landlock: bool, memory: int, cpu_seconds: int, source: int, sink: int) -> NoReturn:
    try:
        _give_up(folder, landlock, memory, cpu_seconds, source, sink)
        _write(sink, b"C")
    except BaseException as error:
        _write(sink, f"!{error}".encode(errors="replace"))
        os._exit(1)
    try:
        _run(code, source, sink)
    finally:  # whatever it raised, nothing of the keeper is to run here
        os._exit(0)


def _give_up(folder: str, landlock: bool, memory: int, cpu_seconds: int, source: int, sink: int) -> None:
    """Open files, environment, what the keeper knows, and rights."""
    confine.die_with_parent()
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(nothing, file)
    first, second = sorted((source, sink))
    for low, high in ((3, first), (first + 1, second), (second + 1, 1024)):
        os.closerange(low, high)
    confine.limit(memory, cpu_seconds)
    os.chdir(folder)
    confine.confine(folder, landlock)
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder)
    sys.argv, sys.dont_write_bytecode = ["solution.py"], True
    for name in [name for name in sys.modules if name.partition(".")[0] == "rewards"]:
        del sys.modules[name]


def _run(code: bytes, source: int, sink: int) -> None:
    solution = type(sys)("solution")
    sys.modules["solution"] = solution
    names, as_before = vars(solution), dict(vars(builtins))
    exec(compile(code.decode("utf-8", "surrogatepass"), "solution.py", "exec"), names)
    _write(sink, b"R")
    frame = _read_frame(source)
    vars(builtins).update(as_before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "unittest"]:
        del sys.modules[name]  # the test gets one that the code has not changed
    sys.settrace(None)
    sys.setprofile(None)
    names.update(__builtins__=builtins, __check__=_reporter(sink), __run_case__=_run_case)
    exec(compile(frame[16:], "tests.py", "exec"), names)
    _write(sink, b"D" + frame[:16])


def _reporter(sink: int) -> Callable[..., None]:
    def check(n: int, operands: tuple[Any, ...], condition: Callable[..., Any] | None = None) -> None:
        """Send the operands of an assertion; or whether it holds, where none is plain and none a literal."""
        number, data, plain = n.to_bytes(4, "big"), b"", 0
        for operand in operands:
            try:
                data += pack(operand)
                plain += 1
            except (TypeError, RecursionError):
                data += opaque(operand)
        if condition is None or plain:
            _write(sink, b"A" + number + data)
        else:
            _write(sink, b"S" + number + (b"1" if condition(*operands) else b"0"))

    return check


def _run_case(case: type) -> None:
    import unittest  # slow, and rarely wanted

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    if not result.testsRun or not result.wasSuccessful():
        raise AssertionError(f"{case.__name__} failed")


def _write(file: int, data: bytes) -> None:
    data = framed(data)
    while data:
        data = data[os.write(file, data) :]
