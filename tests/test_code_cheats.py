"""Code under test and its verdict: what it cannot pretend, and what it still can."""

import re
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import confine
from rewards.assertions import take_apart
from rewards.plain import Opaque, pack, unpack

pytest_plugins = ["tests.code_judge"]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not confine.landlock_version(), reason="needs Linux with Landlock"
)


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
