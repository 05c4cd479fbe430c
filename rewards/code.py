"""Code judged by tests, which run in a sandbox.

Every test runs in a process of its own, against a fresh run of the code (`rewards.sandbox` has the processes,
`rewards.confine` what they may not do). Code under optimisation looks for ways to pass without being right. What does not
pay:

* leaving early (`sys.exit(0)`, `os._exit(0)`), printing what looks like a result, changing `builtins` or `unittest` before
  the test: a test has passed when it ran to its end, by all of the assertions that no run can miss;
* objects that equal everything, and looks at the frames above for what is expected: comparisons with literals are not made
  where the code runs. It sends plain data, and what is expected is never there (`rewards.assertions` says of which forms);
* reading the tests in files or memory: each is sent to its own process, when the code has run there.

What still does, since code and test share a process: to look up what the test itself computes or keeps in a variable
(`expected = 4; assert f(2) == expected`); an object of its own class in `all(f(x) == y for ...)`, in `or`, in an assertion
in `try`, and where the other side is no plain data either; to change other methods of `unittest` while the test runs; to
leave a loop of assertions after the first; and, for code that knows this very program, to send what a test without literals
would. Tests that state literals at their top level, `assert f(2) == 4`, are the strongest. The price: an object of a class
of the code's own never equals plain data (`Money(5) == 5` fails; `str`, `len`, `list` of it are fine).

Output is discarded, input is empty, there is the standard library alone, and no second process. The clock is real: code that
needs nearly all of its time may pass on an idle machine and fail on a busy one. Hashes have a fixed seed.

Looked at and not used: sandboxkit (forks the caller, which has threads; needs user namespaces; no list of system calls),
sandlock (needs Linux 6.7), py-landlock (Landlock alone), pyseccomp (needs a library of the system), RestrictedPython and the
like (the language is no boundary).
"""

import asyncio
import marshal
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any

from rewards import confine
from rewards.assertions import Test, take_apart
from rewards.sandbox import TO_CONFINE, clear, framed

LEAST_MEMORY = 64  # MiB; Python itself maps about 30
LONG = TO_CONFINE + 5.0  # seconds for what is not the code's: starting, deleting
PROGRAM = "import sys; sys.path.append({!r}); from rewards.sandbox import main; sys.path.pop(); main()"
TRIAL = """
import json, os, socket
may = "nothing"
for name, act in {"start processes": os.fork, "use sockets": socket.socket, "write": lambda: open(os.__file__, "a")}.items():
    try:
        act()
        may = name
    except OSError:
        pass
"""
FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})(?P<info>[^`]*)")
PYTHON = ("python", "py", "python3", "py3", "{.python}")


class CodeTests:
    """Share of tests that the code of a completion passes.

    Args:
        seconds: For all tests of a completion together; each may take half of what is left, the last one all of it. The
            timeout of the calls must be longer than this.
        memory_mib: Address space of a test, MiB.
        allow_weaker: Go on where Landlock is missing: the code can then read files, but write none.

    Raises:
        ValueError: An argument is out of range, or this machine cannot confine code.
    """

    def __init__(self, seconds: float = 10.0, memory_mib: int = 512, allow_weaker: bool = False):
        if not 0 < seconds < inf:
            raise ValueError(f"seconds {seconds!r} is no time that tests may take")
        if memory_mib < LEAST_MEMORY:
            raise ValueError(f"memory_mib {memory_mib!r} is less than the {LEAST_MEMORY} that Python needs")
        if sys.platform != "linux":
            raise ValueError(f"code_tests confines code by means of Linux, and this is {sys.platform}")
        self._landlock = confine.landlock_version() > 0
        if not self._landlock and not allow_weaker:
            raise ValueError(
                "code_tests needs Landlock, which is not offered here (it takes Linux 5.13 or newer, `landlock` in "
                "/sys/kernel/security/lsm, and a container that lets it be used): without it code can read all of your "
                "files; `allow_weaker: true` accepts that"
            )
        self._seconds = float(seconds)
        self._memory = int(memory_mib) << 20
        self._try_out()

    async def __call__(self, text: str, tests: str | Sequence[str]) -> float:
        """Share of tests passed, in [0, 1].

        Args:
            text: Holds the code: see `extract_code`.
            tests: Python that raises when the code is wrong, with the names of the code in reach (also by
                `from solution import ...`); or a list of such, each of which counts as one.

        Raises:
            ValueError: There is no test, or one that could not fail.
            RuntimeError: The sandbox did not work.
        """
        parts = [tests] if isinstance(tests, str) else list(tests or ())
        if not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"tests {tests!r:.80} are neither text nor a list of texts")
        apart = [_take_apart(part) for part in parts]
        passed = await self._run(extract_code(text), apart)
        return sum(passed) / len(passed)

    def _try_out(self) -> None:
        """See that code runs here, and cannot do what it must not. Raises ValueError."""
        with _folder() as folder:
            request = self._request(folder, TRIAL, [take_apart("assert may == 'nothing'")])
            try:
                run = subprocess.run(input=request, capture_output=True, timeout=LONG, **_started())
                works = _verdicts(run.stdout, 1) == [True]
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                raise ValueError(f"code_tests cannot run code in a sandbox here: {error}") from error
        if not works:
            raise ValueError("code_tests cannot confine code here, or Python does not run when it does: see rewards/code.py")

    async def _run(self, code: str, tests: Sequence[Test]) -> list[bool]:
        """Whether each test passes. Raises RuntimeError when the sandbox does not work."""
        answer = bytearray()
        with _folder() as folder:
            options = _started()
            process = await asyncio.create_subprocess_exec(
                *options.pop("args"), stdin=PIPE, stdout=PIPE, stderr=DEVNULL, **options
            )
            try:
                async with asyncio.timeout(self._seconds + LONG):
                    await _talk(process, self._request(folder, code, tests), answer)
            except TimeoutError:
                answer += b"0" * len(tests)  # the keeper watches the clock, but was given something that takes it long
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return _verdicts(bytes(answer), len(tests))

    def _request(self, folder: str, code: str, tests: Sequence[Test]) -> bytes:
        source = code.encode("utf-8", "surrogatepass")
        frames = [(folder, self._seconds, self._memory, self._landlock, len(tests), source)]
        frames += [(test.source.encode(), test.conditions, test.sure) for test in tests]
        return b"".join(framed(marshal.dumps(frame)) for frame in frames)


def extract_code(text: str) -> str:
    """The last block fenced as Python, else the last fenced as nothing in particular, else all of the text.

    A block that is not closed reaches to the end; one that is indented (in a list) loses that indentation.
    """
    found, fence, block, lines = {}, None, [], text.split("\n")
    for line in lines:
        mark = FENCE.fullmatch(line)
        if fence is None and mark:
            fence, block = mark, []
            language = mark["info"].strip().lower()
            found["python" if language in PYTHON else language] = block
        elif fence and mark and not mark["info"].strip() and mark["marks"].startswith(fence["marks"]):
            fence = None
        elif fence:
            block.append(line.removeprefix(fence["indent"]))
    return "\n".join(found.get("python", found.get("", lines)))


@contextmanager
def _folder() -> Iterator[str]:
    """A folder for untrusted code, deleted afterwards with what is in it. It stays when the trainer is killed."""
    folder = tempfile.mkdtemp(prefix="paretune-code-")
    try:
        yield folder
    finally:
        for _ in range(100):  # a killed process may be at the end of its last system call
            try:
                clear(folder)
                break
            except OSError:
                time.sleep(0.01)
        else:
            clear(folder)


def _started() -> dict[str, Any]:
    """How the sandbox is started: Python without site packages, environment, or anything of the trainer's."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # Python may not start without
    return {
        "args": (sys.executable, "-s", "-P", "-S", "-c", PROGRAM.format(str(Path(__file__).parents[1]))),
        "env": kept | {"PYTHONHASHSEED": "0"},
        "cwd": "/",
        "start_new_session": True,
    }


async def _talk(process: asyncio.subprocess.Process, request: bytes, answer: bytearray) -> None:
    """Send the request, and collect the answer as it comes."""
    with suppress(ConnectionError):  # it need not read tests that cannot pass
        process.stdin.write(request)
        await process.stdin.drain()
    process.stdin.close()
    while part := await process.stdout.read(4096):
        answer += part


def _verdicts(answer: bytes, tests: int) -> list[bool]:
    """Raises RuntimeError when it is no whole answer."""
    verdicts, failed, reason = answer.partition(b"!")
    if failed:
        raise RuntimeError(f"the sandbox failed: {reason.decode(errors='replace')}")
    if verdicts[:1] != b"C" or len(verdicts) <= tests:
        raise RuntimeError("the sandbox ended, or was not ready in time, without a reason")
    return [verdict == ord("1") for verdict in verdicts[1 : tests + 1]]


_take_apart = lru_cache(maxsize=4096)(take_apart)
