"""Code judged by tests: what it is worth by hand, and where it runs."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import code as code_module
from rewards import confine
from rewards.bus import RewardBus
from rewards.code import CodeTests, extract_code
from rewards.component import load_component
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.code_judge import REFUSED, SQUARE, attack
from tests.conftest import ROOT

pytest_plugins = ["tests.code_judge"]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not confine.landlock_version(), reason="needs Linux with Landlock"
)


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
