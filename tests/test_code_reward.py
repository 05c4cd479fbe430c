"""Code judged by tests: what it is worth by hand, what it cannot do to the machine, and what it cannot pretend."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import code as code_module
from rewards import confine
from rewards.assertions import take_apart
from rewards.bus import RewardBus
from rewards.code import CodeTests, extract_code
from rewards.component import load_component
from rewards.plain import Opaque, pack, unpack
from rewards.sandbox import clear
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not confine.landlock_version(), reason="needs Linux with Landlock"
)
SQUARE = "def f(x):\n    return x * x\n"


@pytest.fixture(scope="module")
def reward():
    return CodeTests(seconds=4)


@pytest.fixture
def judge(reward, tmp_path, monkeypatch):
    """Value of code under tests; nothing may be left of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def value(code: str, *tests: str, by: CodeTests = reward) -> float:
        return asyncio.run(by(f"```python\n{code}\n```", list(tests)))

    yield value
    assert not psutil.Process().children(recursive=True)
    assert not list(tmp_path.iterdir())


# --- what it is worth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "tests", "value"),
    [
        (SQUARE, ["assert f(3) == 9"], 1),
        (SQUARE, ["assert f(3) == 10"], 0),
        (SQUARE, ["assert f(3) == 9", "assert f(2) == 5", "assert f(-1) == 1", "f(2, 3)"], 0.5),  # two of four
        (SQUARE, ["assert f(3) == 9\nassert f(2) == 5"], 0),  # one test, of two assertions
        ("def f(x): return x // 0", ["assert f(1) == 1", "try: f(1)\nexcept ZeroDivisionError: pass"], 0.5),
        ("def f(x: return x", ["assert f(1) == 1"], 0),
        ("", ["assert f(1) == 1"], 0),
        ("raise SystemExit(0)", ["assert True"], 0),
        ("print(input())", ["assert True"], 0),  # nothing can be read
        ("import numpy", ["assert True"], 0),  # the standard library alone
        (
            "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
            ["assert f() == 1", "assert f() == 1"],
            1,
        ),  # a fresh run each
        ("if __name__ == '__main__':\n    raise ValueError", ["assert True"], 1),
    ],
)
def test_value_is_the_share_of_tests_passed(judge, code, tests, value):
    assert judge(code, *tests) == value


@pytest.mark.parametrize(
    "test",
    [
        "from solution import f\nassert f(3) == 9",
        "import solution\nassert solution.f(3) == 9",
        "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4\ncheck(f)",
        "def test_three():\n    assert f(3) == 9\n\ndef test_all(n=4):\n    for x in range(n):\n        assert f(x) == x*x",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(f(3), 9)\n"
        "        self.assertTrue(f(1))\n        self.assertFalse(f(0))\n        self.assertIn(f(2), [4])\n"
        "        with self.assertRaises(TypeError):\n            f('a')\n\nif __name__ == '__main__':\n    unittest.main()",
        "import math\nassert math.isclose(f(1.1), 1.21, rel_tol=1e-9) and abs(f(0.1) - 0.01) < 1e-9",
        "from math import isclose\nassert isclose(f(1.1), 1.21)\nassert not f(0), 'nothing'",
        "cases = [(1, 1), (2, 4)]\nfor x, y in cases:\n    assert f(x) == y\nassert all(f(x) == y for x, y in cases)",
        "try:\n    f(None)\n    assert False\nexcept TypeError:\n    pass",
        "try:\n    assert f(2) == 5\nexcept AssertionError:\n    assert f(2) == 4",
        "with __import__('contextlib').suppress(AssertionError):\n    assert f(2) == 5",
        "assert 3 < f(2) <= 4 and f(1) is not None and f(3) in (9, 10) and f(3) not in [4]",
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    print(f(3))\n"
        "assert out.getvalue() == '9\\n'",
        "assert f(2) == 5 or f(2) == 4",
        "assert (n := f(2)) == 4 and n == 4",
        "from fractions import Fraction\nassert f(Fraction(1, 2)) == Fraction(1, 4)\nassert f(Fraction(1, 2)) != None",
        "assert isinstance(f(2), int) and type(f(2)) == int and type(f(2)) is int",
        "assert [f(x) for x in range(3)] == [0, 1, 4]\nassert {f(1): (f(2), {f(3)})} == {1: (4, {9})}",
        "assert f(10 ** 200) == 10 ** 400 and f(1j) == -1 and f(float('inf')) == float('inf') and f(0.5) == .25",
        "assert str(f) and f.__name__ == 'f' and callable(f)",
        "x = f(3)\nassert x\nassert x == 9 == x",
        "def a():\n    assert f(1) == 1\ndef a():\n    assert f(2) == 4\na()",  # the first one never runs
        "def skip():\n    assert f(1) == 1\n    if f(2) == 4:\n        return\n    assert f(2) == 5\nskip()",
        "import collections\nassert collections.Counter([f(1), f(1)]) == {1: 2}\nassert {f(1): 1}.keys() == {1}",
    ],
)
def test_right_code_passes_tests_of_many_forms(judge, test):
    assert judge(SQUARE, test) == 1


@pytest.mark.parametrize(
    "test",
    [
        "a, b = P(1, 2), P(1, 2)\nassert a == b\nassert [a] == [b]\nassert a != P(2, 1)\nassert a is a and a is not b",
        "assert str(P(1, 2)) == '(1, 2)'\nassert len(P(1, 2)) == 2\nassert list(P(1, 2)) == [1, 2]",
        "assert P(1, 2)\nassert not (P(1, 2) == 3)\nassert P(1, 2) < P(2, 3)\nassert 2 in P(1, 2)",
        "assert P(1, 2) + P(1, 2) == P(2, 4)",
        "assert Color.RED == 1 and Color.RED == Color(1)\nassert Word('a') == 'a' and Pair(1, [2]) == (1, [2])",
        "try:\n    P(1, 2).boom()\nexcept Bad as error:\n    assert error.args == (1,)",
    ],
)
def test_objects_of_the_code_can_be_tested(judge, test):
    code = (
        "from collections import namedtuple\nfrom dataclasses import dataclass\nfrom enum import IntEnum\n"
        "class Bad(Exception): pass\nclass Word(str): pass\nclass Color(IntEnum): RED = 1\n"
        "Pair = namedtuple('Pair', 'a b')\n"
        "@dataclass(order=True)\nclass P:\n    x: int\n    y: int\n"
        "    def __str__(self): return f'({self.x}, {self.y})'\n"
        "    def __len__(self): return 2\n    def __iter__(self): return iter((self.x, self.y))\n"
        "    def __add__(self, other): return P(self.x + other.x, self.y + other.y)\n"
        "    def boom(self): raise Bad(1)\n"
    )
    assert judge(code, test) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def g(): await asyncio.sleep(0.01); return 1\ndef f(): return asyncio.run(g())",
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def f():\n    with ThreadPoolExecutor(4) as p: return sum(p.map(abs, [1]))",
        "import tempfile, os\ndef f():\n    with tempfile.TemporaryDirectory() as d:\n"
        "        open(d + '/a', 'w').write('1')\n"
        "        os.rename(d + '/a', d + '/b')\n        return int(open(d + '/b').read())",
        "import random, datetime, decimal, json, hashlib, zoneinfo, uuid\ndef f(): return len({random.random()})",
        "open('here', 'w').write('1')\ndef f(): return int(open('here').read())",
        "import subprocess, multiprocessing, socket\ndef f(): return 1",  # importing is no crime
        "import signal\nseen = []\nsignal.signal(signal.SIGUSR1, lambda *_: seen.append(1))\n"
        "def f(): signal.raise_signal(signal.SIGUSR1); return len(seen)",
        "f = lambda: 1 + 0 * len([*range(10 ** 6)])",
    ],
)
def test_ordinary_code_can_do_ordinary_things(judge, code):
    assert judge(code, "assert f() == 1") == 1


def test_long_answers_arrive(judge):
    assert judge("def f(): return list(range(100_000))", "assert f() == [*range(100_000)]") == 1
    assert judge("def f(): return {'a': 'x' * 1_000_000}", "assert f() == {'a': 'x' * 1000000}") == 1


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```\nc", "x = 2"),
        ("```\nx = 1\n```\n```text\nx = 2\n```", "x = 1"),
        ("```python\nx = 1\n```\n```\nx = 2\n```", "x = 1"),  # marked as Python before unmarked
        ("```Py\r\nx = 1\r\n```\r\n", "x = 1\r"),
        ("```python\nx = 1", "x = 1"),  # cut off
        ("1. so:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass"),
        ("````python\n```\n````", "```"),
        ("~~~python\nx\n```\n~~~", "x\n```"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("see ```x = 1``` here", "see ```x = 1``` here"),
        ("", ""),
    ],
)
def test_code_is_the_last_block(text, code):
    assert extract_code(text) == code


@given(st.text(max_size=60) | st.text(alphabet="`~ \npython=", max_size=60))
def test_code_is_part_of_any_text(text):
    assert set(extract_code(text)) <= set(text) | {"\n"}


@pytest.mark.parametrize(
    "text", ["", "\0", "\ud800", "x" * 1_000_000, "(" * 100_000, "```python\n" + "-" * 100_000 + "1", "é = 1\r"]
)
def test_a_bad_completion_is_worth_nothing(reward, text):
    start = time.perf_counter()
    assert asyncio.run(reward(text, "assert f(1) == 1")) == 0
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ([], "neither text nor a list"),
        (None, "neither text nor a list"),
        ([1], "neither text nor a list"),
        ("", "nothing runs in the test"),
        ("def check(candidate):\n    assert candidate(1) == 1", "nothing runs in the test"),
        ("x = f(1)", "nothing runs in the test"),
        ("def test_it(tmp_path):\n    assert f(1) == 1", "nothing calls test_it"),
        ("async def test_it():\n    assert f(1) == 1\nassert f(1) == 1", "nothing calls test_it"),
        ("class TestIt:\n    def test_it(self): assert f(1) == 1", "nothing calls TestIt"),
        ("if __name__ == '__main__':\n    check(f)", "nothing runs in the test"),
        (["assert f(1) == 1", "assert f(1) = 1"], "is no Python"),
        ("\0", "is no Python"),
        ("import numpy as np\nassert f(1) == 1", "imports 'numpy'"),
    ],
)
def test_tests_that_cannot_fail_are_errors_not_zero(reward, tests, reason):
    with pytest.raises(ValueError, match=reason):
        asyncio.run(reward("x = 1", tests))


@pytest.mark.parametrize("args", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_mib": 16}])
def test_arguments_are_checked(args):
    with pytest.raises(ValueError, match=next(iter(args))):
        CodeTests(**args)


def test_it_is_built_in():
    with pytest.raises(ValueError, match="wants an argument 'tests'"):
        load_component("code_tests", {}, [], {})
    component = load_component("code_tests", {"seconds": 2}, ["tests"], {"concurrency": 2})
    bus = RewardBus({"code": component}, [Objective("code", True, (0.0, 1.0), Missing.NEUTRAL)])
    samples = tuple(Sample((1,), (), FinishReason.STOP, 0, text) for text in (SQUARE, "x", ""))
    rows = [Prompt("a", "ask", (1,), {"tests": ["assert f(2) == 4"]}), Prompt("b", "ask", (1,), {"tests": []})]
    matrix = bus.score([SampleGroup(prompt, samples) for prompt in rows])
    bus.close()
    assert matrix.raw_NK[:3, 0].tolist() == [1, 0, 0]
    assert [n for n, _ in matrix.errors] == [3, 4, 5]
    assert "neither text nor a list" in matrix.errors[3, 0]


# --- what it cannot do ------------------------------------------------------------------------------------------------

REFUSED = "\nassert refused, 'it was let do that'"


def attack(*statements: str) -> str:
    """Code that tries some things, and is `refused` when the system let it do none of them."""
    tries = "".join(
        f"\ntry:\n    {statement}\n    refused = False\nexcept (OSError, ValueError): pass\n" for statement in statements
    )
    return f"import os, sys, socket, subprocess, signal, resource, fcntl, ctypes, threading, time\nrefused = True{tries}"


@pytest.mark.parametrize(
    "statement",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.create_connection(('127.0.0.1', 9))",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), 0)",
        "os.kill(0, 9)",
        "os.kill(-1, 9)",
        "os.killpg(os.getpgrp(), 9)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(0, fcntl.F_SETSIG, 9)",
        "fcntl.ioctl(0, 0x8901, b'\\1\\0\\0\\0')",  # FIOSETOWN
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.setsid()",
        "os.memfd_create('a')",
        "os.chroot('.')",
        "os.chmod('.', 0o777)",
        "os.fchmod(os.open(os.__file__, 0), 0o777)",
        "os.chown('.', 0, 0)",
        "os.utime(os.__file__)",
        "os.setxattr('.', 'user.a', b'b')",
        "os.truncate(os.__file__, 0)",
        "os.mkfifo('a')",
        "os.mknod('a')",
        "os.link(os.__file__, 'a')",
        "os.setuid(0) if os.getuid() else open('/')",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "open('/proc/self/environ')",
        "open(f'/proc/{os.getppid()}/environ')",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "os.listdir('/proc')",
        "os.listdir('/')",
        "os.listdir('..')",
        "open('/etc/passwd')",
        "open('/dev/tty')",
        "open('/dev/shm/a', 'w')",
        "open('/tmp/a', 'w')",
        "open(os.__file__, 'a')",
        "os.rename('/etc/hostname', 'a')",
        "os.symlink('/etc/passwd', 'a'); open('a')",
    ],
)
def test_what_the_system_refuses(judge, statement):
    assert judge(attack(statement), REFUSED) == 1


@pytest.mark.parametrize("number", [435, 425, 323, 321, 298, 29, 240, 101, 310, 157, 272])
def test_calls_that_python_does_not_make_are_refused_too(judge, number):
    """clone3, io_uring_setup, userfaultfd, bpf, perf_event_open, shmget,
    mq_open, ptrace, process_vm_readv, prctl, unshare. Of x86-64."""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = libc.syscall({number}, 38, 1, 0, 0, 0, 0)"
    assert judge(f"{code}\nwhy = ctypes.get_errno()", "assert result == -1 and why in (1, 38)") == 1


def test_files_of_the_user_stay_as_they_are(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "kept").write_text("secret")
    before = (folder / "kept").stat()
    kept = str(folder / "kept")
    things = (
        "open(kept)", "open(kept, 'w')", "os.remove(kept)", "os.truncate(kept, 0)", "os.chmod(kept, 0)",
        "os.utime(kept, (0, 0))",
        "os.rename(kept, 'a')", "os.listdir(mine)", "os.rmdir(mine)", "open(mine + '/other', 'w')", "os.link(kept, 'a')",
        "os.symlink('a', mine + '/link')", "os.chdir(mine); open('b', 'w')",
    )  # fmt: skip
    assert judge(f"mine, kept = {str(folder)!r}, {kept!r}\n" + attack(*things), REFUSED) == 1
    after = (folder / "kept").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_secrets_of_the_environment_do_not_arrive(judge, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = (
        "import os, ctypes, gc\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
        "seen = [*os.environ, libc.getenv(b'HF_TOKEN')]\n"
    )
    assert judge(code, "assert seen == ['HOME', 'TMPDIR', None]") == 1
    assert code_module._started()["env"].keys() <= {"LD_LIBRARY_PATH", "PYTHONHASHSEED"}


def test_open_files_of_the_trainer_do_not_arrive(judge, tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "open"
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\ndef is_open(n):\n    try: return bool(os.fstat(n))\n    except OSError: return False\n"
        assert judge(code, "assert sum(map(is_open, range(3, 1024))) == 2") == 1  # to and from the keeper


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import signal\nfor n in {*signal.Signals} - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        "while True: print('x' * 10 ** 6, flush=True)",
        "import sys\nsys.stderr.write('x' * 10 ** 8)\nwhile True: sys.stderr.write('x')",
        "int('9' * 4000) ** 10 ** 9",
        "import re\nre.match('(a+)+b', 'a' * 64)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    ],
)
def test_what_never_ends_is_ended(judge, code):
    start = time.perf_counter()
    assert judge(code, "assert True", "assert True", by=CodeTests(seconds=1)) == 0
    assert time.perf_counter() - start < 5


def test_threads_that_go_on_are_ended(judge):
    code = "import threading\nfor _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    assert judge(code, "assert True", "assert True") == 1


def test_a_test_that_takes_long_leaves_time_for_the_others(judge):
    """4 s: half for the first, and the second comes after it."""
    code = "def f(x):\n    while x: pass\n    return 1"
    start = time.perf_counter()
    assert judge(code, "assert f(1) == 1", "assert f(0) == 1") == 0.5
    assert 1.9 < time.perf_counter() - start < 4


def test_processor_time_is_limited_too(judge):
    """By the system, in whole seconds: int(4 / 2) + 1 for the first of two tests, int(3.9...) + 1 for the other."""
    code = "import resource\nlimit = resource.getrlimit(resource.RLIMIT_CPU)"
    assert judge(code, "assert limit == (3, 3)", "assert limit == (4, 4)") == 1


@pytest.mark.parametrize(
    "statement",
    ["bytearray(10 << 30)", "[0] * (10 << 30)", "'x' * (10 << 30)", "[bytearray(1 << 20) for _ in range(10 << 10)]"],
)
def test_memory_is_limited(judge, statement):
    code = f"try:\n    x = {statement}\n    refused = False\nexcept MemoryError:\n    refused = True"
    assert judge(code, REFUSED) == 1


def test_memory_is_limited_as_told(judge):
    code = "try: x = len(bytearray(100 << 20))\nexcept MemoryError: x = 0"
    assert judge(code, "assert x", by=CodeTests(seconds=4, memory_mib=256)) == 1
    assert judge(code, "assert x == 0", by=CodeTests(seconds=4, memory_mib=96)) == 1


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def f(): return f()\ntry: f()\nexcept RecursionError: pass", 1),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return [*map(lambda _: f(), [1])]\nf()", 0),
        ("import ctypes\nctypes.string_at(0)", 0),  # a crash
        ("x = eval('(' * 90 + ')' * 90)", 1),
        ("exec('-' * 10 ** 6 + '1')", 0),
    ],
)
def test_deep_recursion_and_crashes_cost_their_own_sample(judge, code, value):
    assert judge(code, "assert True") == value


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor n in range(10 ** 6): os.mkdir(str(n))",
        "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
        "import os\nwhile True: os.mkdir('d' * 250); os.chdir('d' * 250); open('f' * 250, 'w').write('x' * 10 ** 6)",
        "import os\nfor n in range(10 ** 4): open(str(n), 'w').write('x' * (10 << 20))",
        "import os\nos.mkdir('d'); os.mkdir('d/shut', 0)\nopen('d/shut2', 'w'); os.symlink('/', 'd/link')\nwhile True: pass",
        "import threading\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=lambda: input or 0).start()",
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    ],
)
def test_what_fills_the_machine_is_stopped_and_deleted(judge, code):
    start, free = time.perf_counter(), psutil.disk_usage(tempfile.gettempdir()).free
    assert judge(code, "assert True", by=CodeTests(seconds=2)) == 0
    assert time.perf_counter() - start < 8
    assert psutil.disk_usage(tempfile.gettempdir()).free > free - (1 << 30)


def test_what_is_made_at_once_is_the_codes_doing(judge, monkeypatch):
    """Also when the keeper, here a slow one, has not yet read that the code may run."""
    slow = (
        "import rewards.sandbox as s, time; quick = s._Child.__init__\n"
        "s._Child.__init__ = lambda *arguments: (quick(*arguments), time.sleep(0.3))[0]\n"
    )
    monkeypatch.setattr(code_module, "PROGRAM", code_module.PROGRAM.replace("main()", slow + "main()"))
    assert judge("import os\nos.mkdir('d', 0)", "assert True") == 0
    assert judge("import os\nos._exit(0)", "assert True") == 0


def test_a_file_is_limited_in_size(judge):
    code = "try: print(open('a', 'wb').write(bytes(20 << 20)))\nexcept OSError as error: why = error.errno"
    assert judge(code, "assert why == 27") == 1  # EFBIG


def test_a_folder_is_deleted_whatever_is_in_it(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.mkdir()
    (kept / "file").touch()
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(30):  # 6000 characters, which is longer than a path may be
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    os.symlink(kept, folder / "link")
    os.symlink(kept / "file", folder / "link to a file")
    (folder / "shut").mkdir(mode=0)
    clear(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_a_cancelled_call_leaves_nothing(judge, reward):
    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await reward("import os\nopen('a', 'w')\nwhile True: pass", "assert True")

    asyncio.run(cancel())


def test_nothing_outlives_a_killed_trainer(tmp_path):
    code = (
        "import asyncio, tempfile\nfrom rewards.code import CodeTests\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "asyncio.run(CodeTests(seconds=60)('while True: pass', 'assert True'))"
    )
    trainer = psutil.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(300):
        below = trainer.children(recursive=True)
        if len(below) == 2 and below[1].cpu_times().user > 0.2:
            break
        time.sleep(0.05)
    assert len(below) == 2
    trainer.kill()
    trainer.wait()
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_many_at_once_from_a_process_with_threads(reward):
    """As in the trainer: threads that work while the event loop of another thread starts processes."""
    stop = threading.Event()
    threads = [threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, True)]) for _ in range(2)]
    for thread in threads:
        thread.start()

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(reward(SQUARE, [f"assert f(3) == {9 + n % 2}", "assert f(1) == 1"]) for n in range(8)))

    try:
        assert asyncio.run(all_of_them()) == [1, 0.5] * 4
    finally:
        stop.set()


# --- what it cannot pretend -------------------------------------------------------------------------------------------


def each(text: str) -> list[str]:
    return text.split("---\n")


EVIL = """
class Evil:
    def yes(self, *_): return True
    def me(self, *_): return self
    def __init__(self, *_): pass
    def __hash__(self): return 0
    def __float__(self): return 0.0
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = yes
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = __neg__ = __getitem__ = __call__ = me
"""
LITERAL = (
    "assert f(3) == 9", "assert 9 == f(3)", "assert not f(3) != 9", "assert abs(f(3) - 9) < 1e-6", "assert f(3) in (9,)",
    "import math\nassert math.isclose(f(3), 9)", "assert f(3) is not None and f(3) == 9", "assert 8 < f(3) < 10",
    "x = f(3)\nassert x == 9", "def check(candidate):\n    assert candidate(3) == 9\ncheck(f)", "assert [f(3)] == [9]",
    "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(f(3), 9)",
)  # fmt: skip
OBJECTS = each(r"""
def f(x): return Evil()
---
f = Evil()
---
class Five(int):
    __eq__ = __lt__ = __gt__ = Evil.yes
    __sub__ = lambda self, other: 0
    __hash__ = int.__hash__
def f(x): return Five(5)
---
class L(list):
    __eq__ = Evil.yes
def f(x): return L([Evil()])
---
class M(type):
    __mro__ = property(lambda self: (int, object))
class A(Evil, metaclass=M): pass
def f(x): return A()
---
class A(Evil):
    __class__ = int
def f(x): return A()
---
def f(x): yield 9
---
async def f(x): return 9
""")
ENDS = each(r"""
def f(x): import os; os._exit(0)
---
def f(x): import sys; sys.exit(0)
---
def f(x): raise KeyboardInterrupt
---
import os
print('1' * 100, 'all tests passed')
os._exit(0)
---
import os, atexit
atexit.register(os._exit, 0)
print('OK')
def f(x): return 0
""")
PATCHES = each(r"""
import builtins
builtins.AssertionError = type('A', (BaseException,), {'__new__': lambda *_: None})
f = lambda x: 0
---
import builtins
__builtins__ = {}
builtins.abs = lambda x: 0
builtins.isinstance = builtins.bool = builtins.all = lambda *_: True
f = lambda x: 0
---
import builtins
builtins.exec = builtins.compile = lambda *_: None
f = lambda x: 0
---
import unittest, math
unittest.TestCase.assertEqual = unittest.TestCase.assertIn = unittest.TestCase.run = lambda *_: None
unittest.TestResult.wasSuccessful = lambda *_: True
math.isclose = lambda *_: True
f = lambda x: 0
---
import unittest
unittest.TestCase.assertEqual = unittest.TestCase.assertIn = lambda *_: None
f = lambda x: 0
---
import sys
class Silent(dict):
    def __missing__(self, name): return lambda *_: True
sys.modules['math'] = Silent()
f = lambda x: 0
---
import sys
def tracer(frame, event, argument):
    if frame.f_code.co_filename == 'tests.py' and frame.f_lineno == 2:
        frame.f_lineno = 4  # over what comes between
    return tracer
sys.settrace(tracer)
f = lambda x: 0
""")
FORGERIES = each(r"""
def f(x):
    import unittest
    unittest.TestCase.assertEqual = lambda *_: None
    return 0
---
__check__ = lambda *_: None
def f(x):
    globals()['__check__'] = lambda *_: None
    return 0
---
import sys
def f(x):
    sys._getframe(1).f_globals['__check__'] = lambda *_: None
    return 0
---
import sys
def f(x):  # what is expected may be among the constants of those that call it
    frame, found = sys._getframe(1), []
    while frame:
        found += [c for c in frame.f_code.co_consts if type(c) is int and c > 3]
        frame = frame.f_back
    return found[0] if len(found) == 1 else 0
---
import gc
def f(x):  # or somewhere in memory
    mark = '='.join(['', '', ' 9'])
    return 9 if any(mark in o for o in map(str, gc.get_objects())) else 0
---
import os
for n in range(3, 32):
    for m in (b'\0\0\0\1C', b'\0\0\0\1R', b'\0\0\0\1D', b'1' * 99):
        try: os.write(n, m)
        except OSError: pass
def f(x): return 0
---
import os
def is_open(n):
    try: return bool(os.fstat(n))
    except OSError: return False
source, sink = [n for n in range(3, 32) if is_open(n)]
def send(data): os.write(sink, len(data).to_bytes(4, 'big') + data)
send(b'R')
frame = os.read(source, 9999)  # the test itself
send(b'S' + bytes(4) + b'1')
send(b'D' + frame[4:20])
os.read(source, 1)
---
import os
def f(x):
    for n in range(3, 32):
        for frame in (b'\0\0\0\6S\0\0\0\0001', b'\0\0\0\x11D' + bytes(16)):
            try: os.write(n, frame)
            except OSError: pass
    return 0
---
import os
def f(x):
    for n in range(3, 32):
        try: os.write(n, b'\0\0\0\6A\0\0\0\0?')  # no kind of value
        except OSError: pass
    return 0
---
import os
def f(x):
    for n in range(3, 32):
        try: os.write(n, b'\0\0\0\x11D' + bytes(16))  # done, but the random bytes are not known
        except OSError: pass
    return 0
""")


@pytest.mark.parametrize("code", [*(EVIL + code for code in OBJECTS), *ENDS, *PATCHES, *FORGERIES])
def test_what_is_not_right_does_not_pass_tests_that_state_literals(judge, code):
    assert judge(code, *LITERAL) == 0


@pytest.mark.parametrize("code", ENDS + PATCHES + FORGERIES[-3:])
def test_what_changes_or_ends_its_process_beforehand_passes_no_test(judge, code):
    tests = (
        "assert all(f(x) == x * x for x in [3])",
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertIn(f(3), [9])",
        "x = f(3)\nif x != 9:\n    raise ValueError\ny = 0",
    )
    assert judge(code, *tests) == 0


@pytest.mark.parametrize("code", [EVIL + "def f(x): return Evil()", "f = object", "def f(x): return [f]"])
@pytest.mark.parametrize(
    "test", ["expected = 9\nassert f(3) == expected", "for x, y in {3: 9}.items():\n    assert abs(f(x) - y) < 1"]
)
def test_objects_of_its_own_equal_no_plain_data(judge, code, test):
    assert judge(code, test) == 0


@pytest.mark.parametrize(
    ("code", "test"),
    [
        (EVIL + "f = Evil", "assert all(f(x) == x * x for x in range(3))"),
        (EVIL + "f = Evil", "assert f(3) == 9 or f(3) == 10"),
        (EVIL + "f = Evil", "from fractions import Fraction\nassert f(3) == Fraction(9)"),
        ("import sys\ndef f(x): return sys._getframe(1).f_globals['expected']", "expected = 9\nassert f(3) == expected"),
        (FORGERIES[6], "for x, y in [(3, 9)]:\n    assert f(x) == y"),
        (
            FORGERIES[0].replace("Equal", "In"),
            LITERAL[-1].replace("self.assertEqual(f(3), 9)", "x = f(3); self.assertIn(x, [9])"),
        ),
    ],
)  # fmt: skip
def test_what_is_not_seen_is_known(judge, code, test):
    """What the module says it does not see. Should one of these fail, something got better: say so there."""
    assert judge(code, test) == 1


def test_what_a_test_becomes():
    test = take_apart(
        "import math\nx = f(1)\nassert x == 2 and abs(f(2) - 1.5) < 1e-6\nif x:\n    assert f(x) == g(x)\nassert 1 == 1"
    )
    assert test.source == (
        "import math\nx = f(1)\n__check__(0, (x,))\n__check__(1, (f(2),))\n"
        "if x:\n    __check__(2, (f(x), g(x)), lambda _0, _1: _0 == _1)\nassert 1 == 1"
    )
    assert test.conditions == (("(_0 == (2))", False), ("(abs((_0 - (1.5))) < (1e-06))", False), ("(_0 == _1)", True))
    assert test.sure == (0, 1)


@pytest.mark.parametrize(
    ("test", "operands"),
    [
        ("assert f(1) is True", "f(1)"),
        ("assert f(1) is x", "f(1) is x"),
        ("assert 1 in f(1)", "1 in f(1)"),
        ("assert f(1) in (1, 2)", "f(1)"),
        ("assert f(1) == [1, -2, (3, {4: 5})]", "f(1)"),
        ("assert f(1) == [x, 1]", "f(1), [x, 1]"),
        ("assert f(1) == 10 ** 9 + 7", "f(1)"),
        ("assert abs(f(1)) == 1", "abs(f(1))"),
        ("abs = f\nassert abs(f(1) - 1) < 1", "abs(f(1) - 1)"),
        ("assert isclose(f(1), 1)", "isclose(f(1), 1)"),  # the code's own, for all that is known
        ("from math import isclose\nassert isclose(f(1), 1)", "f(1)"),
        ("import math\nassert math.isclose(f(1), x, abs_tol=1e-3)", "f(1), x"),
        ("math = x\nassert math.isclose(f(1), 1)", "math.isclose(f(1), 1)"),
        ("assert 0 < f(1) < x", "f(1), x"),
        ("assert len(f(1)) == 2", "len(f(1))"),
        ("assert f(1) == f'{x}'", "f(1), f'{x}'"),
    ],
)
def test_what_the_operands_are(test, operands):
    call = re.sub(", lambda.*", ")", take_apart(test).source.splitlines()[-1])
    assert call.removeprefix("__check__(0, (").removesuffix("))").removesuffix(",") == operands


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(LEAVES, lambda p: st.lists(p) | st.lists(p).map(tuple) | st.dictionaries(st.integers() | st.text(), p))


@given(PLAIN | st.sets(st.integers()) | st.complex_numbers(allow_nan=False), PLAIN)
def test_plain_data_comes_back(value, other):
    back, opaque, again = unpack(pack(value) + b"O" + pack(other))
    assert (back, type(back).__name__.removeprefix("frozen"), again) == (value, type(value).__name__, other)
    assert isinstance(opaque, Opaque)
    assert opaque


@given(st.binary(max_size=40) | st.text(alphabet="ifcsbltzdNTFOo:0123a-", max_size=30).map(str.encode))
def test_any_bytes_are_plain_data_or_none(data):
    try:
        values = unpack(data)
    except Exception:
        return
    assert isinstance(values, list)


def test_what_is_no_plain_data():
    for value in (object(), print, Fraction(1, 2), [1, {2: {3}, 4: object()}], range(3), iter([])):
        with pytest.raises(TypeError):
            pack(value)


# --- where it runs ----------------------------------------------------------------------------------------------------


def test_numbers_of_system_calls_are_those_of_the_kernel():
    places = {0: "x86_64-linux-gnu/asm/unistd_64.h", 1: "asm-generic/unistd.h"}
    for column, place in places.items():
        header = Path("/usr/include") / place
        if not header.exists():
            pytest.skip("no headers of Linux here")
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
        for table in (confine.HARMLESS, confine.CHANGING, confine.CONDITIONAL):
            for name, number in confine._numbers(table, column).items():
                generic = {"newfstatat": "fstatat"}.get(name, name)
                assert int(known.get(name) or known[generic]) == number, name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("landlock", [True, False])
def test_the_filter_lets_through_what_it_should(machine, landlock):
    """The program that decides about system calls, followed by hand."""
    column, audit = confine.MACHINES[machine]
    program = list(confine._filter(machine, landlock))
    numbers = confine._numbers(confine.CONDITIONAL + ";" + confine.HARMLESS + ";" + confine.CHANGING, column)
    allow, deny = confine.ALLOW, confine.FAIL | 1

    def answer(number: int, *arguments: int, audit: int = audit) -> int:
        data = {0: number, 4: audit} | {16 + 8 * n: argument & 0xFFFFFFFF for n, argument in enumerate(arguments)}
        at = value = 0
        while True:
            code, if_true, if_false, operand = program[at]
            at += 1
            if code == confine.LOAD:
                value = data[operand]
            elif code == confine.AND:
                value &= operand
            elif code == confine.ANSWER:
                return operand
            else:
                at += if_true if (value == operand if code == confine.EQUAL else value >= operand) else if_false

    assert answer(numbers["read"]) == allow
    assert answer(numbers["read"], audit=0x40000003) == confine.KILL  # as 32-bit code would call
    assert answer(numbers["read"] | 0x40000000) == answer(435) == confine.FAIL | 38
    assert answer(numbers["kill"], os.getpid(), 9) == answer(numbers["tgkill"], os.getpid(), 1, 9) == allow
    assert answer(numbers["kill"], os.getppid(), 9) == answer(numbers["kill"], -1, 9) == deny
    assert answer(numbers["clone"], 0x3D0F00) == allow
    assert answer(numbers["clone"], signal.SIGCHLD) == deny
    assert answer(numbers["mkdirat"]) == (allow if landlock else deny)
    assert answer(numbers["openat"], 0, 0, os.O_RDONLY | os.O_CLOEXEC) == allow
    assert answer(numbers["openat"], 0, 0, os.O_RDWR) == (allow if landlock else deny)
    assert answer(numbers["openat"], 0, 0, os.O_CREAT) == (allow if landlock else deny)
    assert answer(numbers["socketpair"], 1, 1 | 0x80000) == allow
    assert answer(numbers["socketpair"], 1, 2) == answer(numbers["socketpair"], 2, 1) == deny
    assert answer(numbers["fcntl"], 0, 4) == allow
    assert answer(numbers["fcntl"], 0, 8) == deny
    assert answer(numbers["prlimit64"], 0) == allow
    assert answer(numbers["prlimit64"], 1) == deny
    assert {answer(n, 0, 0, 0) for n in set(range(423)) - set(numbers.values())} == {deny}


def test_without_landlock_it_refuses_or_is_told_to_go_on(judge, monkeypatch):
    monkeypatch.setattr(confine, "landlock_version", lambda: 0)
    with pytest.raises(ValueError, match=r"needs Landlock.*allow_weaker: true"):
        CodeTests()
    weaker = CodeTests(seconds=4, allow_weaker=True)
    assert judge(SQUARE, "assert f(3) == 9", "assert f(3) == 8", by=weaker) == 0.5
    refused = attack(
        "open('a', 'w')", "open(os.__file__, 'a')", "os.mkdir('a')", "os.open('a', os.O_CREAT)", "os.remove(os.__file__)",
        "os.open('.', os.O_TMPFILE | os.O_RDWR)", "os.chmod('.', 0)", "os.truncate(os.__file__, 0)", "os.fork()",
        "socket.socket()", "os.kill(os.getppid(), 9)", "open(f'/proc/{os.getppid()}/environ')",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
    )  # fmt: skip
    assert judge(refused, REFUSED, by=weaker) == 1
    assert judge("x = open('/etc/hosts').read()", "assert x", by=weaker) == 1


@pytest.mark.parametrize("broken", ["confine", "limit"])
def test_a_machine_that_confines_wrongly_is_refused(monkeypatch, broken):
    """Nothing is confined at all; or so much that Python does not run."""
    change = {
        "confine": "c.confine = lambda *_: None",
        "limit": "import resource as r; c.limit = lambda *_: r.setrlimit(7, (3, 3))",
    }
    program = code_module.PROGRAM.replace("main()", f"import rewards.confine as c; {change[broken]}; main()")
    monkeypatch.setattr(code_module, "PROGRAM", program)
    with pytest.raises(ValueError, match="code_tests cannot"):
        CodeTests()


def test_a_machine_that_cannot_confine_is_refused(monkeypatch):
    monkeypatch.setattr(
        code_module,
        "PROGRAM",
        code_module.PROGRAM.replace("main()", "import rewards.confine as c; c.MACHINES.clear(); main()"),
    )
    with pytest.raises(
        ValueError, match=r"cannot run code in a sandbox here: the sandbox failed: .*no list of system calls"
    ):
        CodeTests()


@pytest.mark.parametrize(
    "program", ["raise SystemExit(1)", "import os; os.write(1, b'C'); os.kill(os.getpid(), 9)", "1 / 0"]
)
def test_a_sandbox_that_fails_is_an_error_not_zero(reward, judge, monkeypatch, program):
    monkeypatch.setattr(code_module, "PROGRAM", program)
    with pytest.raises(RuntimeError, match="the sandbox ended"):
        judge(SQUARE, "assert f(3) == 9")


def test_a_keeper_that_is_stuck_is_killed(judge, monkeypatch):
    """It may be given operands that take it long to compare: that is the code's doing."""
    slow = CodeTests(seconds=0.5)
    monkeypatch.setattr(code_module, "LONG", 0.5)
    monkeypatch.setattr(code_module, "PROGRAM", "import os, time; os.write(1, b'C1'); time.sleep(99)")
    assert judge(SQUARE, "assert f(3) == 9", "assert f(3) == 9", by=slow) == 0.5


USERS = """
import asyncio, json, os, sys
from rewards.code import CodeTests
codes = json.loads(sys.argv[1])
reward = CodeTests(seconds=4)
async def all(): return [await reward(code, test) for code, test in codes]
print(json.dumps([os.getuid(), asyncio.run(all())]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("user", [0, 65534])
def test_it_works_for_root_and_for_others(user, tmp_path):
    """With a Python that all users can read: then root's code runs as a user of its own, and others' as themselves."""
    python = next((p for p in (sys._base_executable, "/usr/bin/python3", "/usr/local/bin/python3") if _usable(p)), None)
    if python is None or not confine._open_to_all(str(ROOT)):
        pytest.skip("no Python that others can read")
    own = "os.getuid() not in (0, 65534)" if user == 0 else "os.getuid() == 65534"
    threads = "import threading, time\nfor n in range(10 ** 5):\n    threading.Thread(target=time.sleep, args=(99,)).start()"
    refused = attack(
        "os.fork()", "socket.socket()", "open('/tmp/a', 'w')", "os.kill(os.getppid(), 9)", "open('/proc/self/environ')"
    )
    codes = [
        (SQUARE, "assert f(3) == 9"),
        ("import os, json, typing; open('a', 'w').write('1'); x = open('a').read()", f"assert x == '1' and {own}"),
        (refused, REFUSED),
        (threads, "assert True"),
        ("import os; x = os.getgroups(), os.getgid() == 0", "assert x == ([], False)"),
        ("import ctypes; x = ctypes.CDLL(None).setuid(0)", "assert x == -1"),
    ]
    result = subprocess.run(
        [python, "-c", USERS, json.dumps(codes)], user=user, group=user, extra_groups=[] if user else [4], cwd=ROOT,
        env={"TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(result.stdout or "0") == [user, [1, 1, 1, 0, 1, 1]], result.stderr


def _usable(python: str) -> bool:
    """Whether others can run it, and it is new enough."""
    if not Path(python).exists() or not confine._open_to_all(os.path.dirname(os.path.realpath(python))):
        return False
    newer = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    return subprocess.run(newer, user=65534, group=65534, check=False, cwd="/", capture_output=True).returncode == 0
