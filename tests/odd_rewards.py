"""Rewards that wait, hang, die, or count; those of the tests of where rewards run."""

import asyncio
import json
import os
import re
import sys
import threading
import time

lock = threading.Lock()
running, most = 0, 0  # calls at this moment, and the most there ever were
attempts: dict[str, int] = {}


def reset() -> None:
    """Forget what was counted."""
    global running, most
    running, most = 0, 0
    attempts.clear()


def _enter() -> None:
    global running, most
    with lock:
        running += 1
        most = max(most, running)


def _leave() -> None:
    global running
    with lock:
        running -= 1


def sleeps(text: str) -> float:
    """As many seconds as the text says; the value is a tenth of them."""
    _enter()
    time.sleep(float(text))
    _leave()
    return float(text) / 10


async def awaits(text: str) -> float:
    """The same, in an event loop."""
    _enter()
    await asyncio.sleep(float(text))
    _leave()
    return float(text) / 10


def bait(text: str) -> float:
    """A regular expression that needs exponential time, and holds the interpreter for all of it."""
    return float(bool(re.fullmatch(r"(a+)+b", text)))


def dies(text: str) -> float:
    """Takes its process along when told so."""
    if text == "die":
        os._exit(3)
    return 0.5


def raises(text: str) -> float:
    """Raises what cannot be pickled, when told so."""
    if text == "raise":
        raise Unpicklable(lambda: None)
    return 0.5


class Unpicklable(Exception):
    """Holds a function that has no name."""


def stumbles(text: str) -> float:
    """Fails in Python's own code, and says what it was given."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise LookupError(f"no number: {text}") from error


async def stumbles_async(text: str) -> float:
    """The same, in an event loop."""
    return stumbles(text)


def falls(text: str) -> float:
    """Fails in Python's own code."""
    return json.loads(text)


def flaky(text: str) -> float:
    """Fails as often as the text says, then answers."""
    with lock:
        attempts[text] = attempts.get(text, 0) + 1
        if attempts[text] <= int(text):
            raise ConnectionError("not yet")
    return 0.5


async def flaky_async(text: str) -> float:
    """The same, in an event loop."""
    return flaky(text)


def lengths(completions, **kwargs):
    """In TRL's form: the lengths, and how many samples came with this call."""
    with lock:
        attempts[str(len(attempts))] = len(completions)
    return [len(text) / 10 for text in completions]


async def lengths_async(completions, **kwargs):
    """The same, in an event loop."""
    return lengths(completions)


class WhereMade:
    """Says which process it was made in."""

    def __init__(self, folder: str):
        self.folder = folder
        with open(os.path.join(folder, f"made-{os.getpid()}"), "w"):
            pass

    def __call__(self, text: str) -> float:
        return 0.5


class Absent:
    """Needs something that is not there."""

    def __call__(self, text: str) -> float:
        return 0.5

    def ready(self) -> None:
        raise ValueError("it is not there")


class AbsentAsync:
    """The same, in an event loop."""

    async def __call__(self, text: str) -> float:
        return 0.5

    async def ready(self) -> None:
        Absent().ready()


def leaves(text: str) -> float:
    """Ends the program when told so."""
    if text == "leave":
        sys.exit(3)
    return 0.5


async def leaves_elsewhere(text: str) -> float:
    """Starts a task that ends the program when told so."""

    async def leave() -> None:
        sys.exit(3)

    if text == "leave":
        await asyncio.create_task(leave())
    return 0.5


class Connected:
    """Has something to close, in the event loop."""

    closed = 0
    ready = True  # of its own, and no method

    async def __call__(self, text: str) -> float:
        return 0.5

    async def close(self) -> None:
        Connected.closed += 1


def of_groups(groups):
    """The lengths of all samples of groups, and how many groups came with this call."""
    with lock:
        attempts[str(len(attempts))] = len(groups)
    texts = [sample.text for group in groups for sample in group.samples]
    if "down" in texts and len(attempts) == 1:
        return [None if text == "late" else len(text) / 10 for text in texts]
    return [len(text) / 10 for text in texts]


def slow_of_groups(groups):
    """The same, after a while."""
    time.sleep(0.3)
    return of_groups(groups)


def how_drawn(log_probs, truncated):
    """Tenths of minus the log-probability, and a half where the limit ended the sample."""
    return -sum(log_probs) / 10 + truncated / 2
