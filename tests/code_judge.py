"""The judge of code that the tests of `code_tests` share; a plugin of pytest."""

import asyncio
import tempfile

import psutil
import pytest

from rewards.code import CodeTests

SQUARE = "def f(x):\n    return x * x\n"
REFUSED = "\nassert refused, 'it was let do that'"


def attack(*statements: str) -> str:
    """Code that tries some things, and is `refused` when the system let it do none of them."""
    tries = "".join(
        f"\ntry:\n    {statement}\n    refused = False\nexcept (OSError, ValueError): pass\n" for statement in statements
    )
    return f"import os, sys, socket, subprocess, signal, resource, fcntl, ctypes, threading, time\nrefused = True{tries}"


@pytest.fixture(scope="module")
def reward():
    return CodeTests(seconds=4)


@pytest.fixture
def judge(reward, tmp_path, monkeypatch):
    """Value of code under tests; nothing may be left of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))

    def value(code: str, *tests: str, by: CodeTests = reward) -> float:
        return asyncio.run(by(f"```python\n{code}\n```", list(tests)))

    yield value
    assert not [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert not list(tmp_path.iterdir())
