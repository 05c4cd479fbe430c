"""Every built-in reward that needs no model and no service, through a real bus, on hostile texts.

`PARETUNE_FUZZ=20000` makes it that many texts; a benchmark calls `fuzz`.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.bus import RewardBus
from rewards.component import BUILT_IN, load_component
from rewards.confine import landlock_version
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.hostile import KINDS, LONG, RARE, hostile_text

COUNT = int(os.environ.get("PARETUNE_FUZZ", "200"))
SEED = 20260
PROMPT = "Natalia sold 48 clips in April, and half as many in May: 7+5-3. How many in all?"
COLUMNS = {"answer": "72", "expression": "7+5-3", "tests": "assert f(2) == 4"}
# why a cell may be missing
UNDECIDED = ("TimeoutError: no answer within", "RuntimeError: pattern", "RuntimeError: math-verify did not")
OVERHEAD = 10.0  # seconds that a call may take besides its timeout: for a process to start, or to be killed


@dataclass(frozen=True)
class Case:
    """How a built-in reward is put to the test.

    Args:
        args: Of the reward.
        rules: Of its calls.
        every: Of this many groups of texts it scores one.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1


JSON = {"type": "object", "properties": {"answer": {"$ref": "#"}}, "patternProperties": {"^(a|b)": {"uniqueItems": True}}}
CASES = {
    "arithmetic_accuracy": Case(),
    "arithmetic_clarity": Case(),
    "brevity": Case({"max_tokens": 64}),
    "code_tests": Case({"seconds": 1.0, "memory_mib": 256}, every=100),
    "exact_match": Case({"ignore_case": True}),
    "json_schema": Case({"schema": JSON}, {"timeout": 5.0}),
    "length_target": Case({"target": 40, "tolerance": 8}),
    "math_answer": Case(rules={"timeout": 10.0}),
    "numeric_answer": Case(),
    "overlong": Case({"max_tokens": 64, "buffer": 16}),
    "regex_match": Case({"pattern": "(?:a|aa)+b|.*,72", "whole": False, "seconds": 0.05}),
    "repetition": Case(),
    "step_lines": Case(),
    "worked_steps": Case(),
}
ELSEWHERE = {
    "classifier": "a model",
    "fluency": "a model",
    "judge": "a service",
    "kl_to_reference": "a model",
    "pooling": "a service",
    "remote": "a service",
    "similarity": "a model",
}


def fuzz(count: int, seed: int, names: Sequence[str] = tuple(CASES)) -> dict[str, dict[str, Any]]:
    """Score that many hostile texts; per reward the values counted, the cells missing, and the slowest call in seconds.

    Raises:
        AssertionError: A value is out of bounds, is missing for a reason other than time, or came too late.
    """
    found = {name: {"values": 0, "missing": Counter(), "slowest": 0.0} for name in names}
    with make_bus(names) as buses:
        for number, texts in enumerate(in_groups(hostile_text(seed, count), len(KINDS))):
            for every, bus in buses.items():
                if number % every == 0:
                    for name, (values, reasons, slowest) in checked(bus, texts, number).items():
                        of_reward = found[name]
                        of_reward["values"] += values
                        of_reward["missing"].update(reasons)
                        of_reward["slowest"] = max(of_reward["slowest"], slowest)
    return found


def in_groups(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of as many texts, as they come."""
    while group := list(islice(texts, size)):
        yield group


@contextmanager
def make_bus(names: Sequence[str]) -> Iterator[dict[int, RewardBus]]:
    """Buses of the rewards by how often they score."""
    buses = {}
    for every in sorted({CASES[name].every for name in names}):
        some = [name for name in names if CASES[name].every == every]
        components = {name: load_component(name, CASES[name].args, list(COLUMNS), CASES[name].rules) for name in some}
        buses[every] = RewardBus(components, [Objective(name, True, (0.0, 1.0), Missing.NEUTRAL) for name in some])
    try:
        yield buses
    finally:
        for bus in buses.values():
            bus.close()


def checked(bus: RewardBus, texts: Sequence[str], number: int) -> dict[str, tuple[int, list[str], float]]:
    """Score texts and see that all went as it may; per reward the values, why others are missing, the slowest call."""
    samples = tuple(
        Sample(tuple(range(len(text) % 99)), (), FinishReason.LENGTH if n % 7 == 0 else FinishReason.STOP, 0, text)
        for n, text in enumerate(texts)
    )
    matrix = bus.score([SampleGroup(Prompt(f"p{number}", PROMPT, (1,), COLUMNS), samples)])
    found = {}
    for k, objective in enumerate(matrix.objectives):
        values = matrix.raw_NK[~matrix.missing_NK[:, k], k]
        assert ((values >= 0) & (values <= 1)).all(), (objective.name, values)
        reasons = {n: why for (n, column), why in matrix.errors.items() if column == k}
        assert set(reasons) == set(matrix.missing_NK[:, k].nonzero()[0]), (objective.name, reasons)
        for n, why in reasons.items():
            assert why.startswith(UNDECIDED), (objective.name, why, texts[n][:200])
        slowest = max(bus.latest[objective.name].latencies)
        assert slowest < limit(objective.name), (objective.name, slowest)
        found[objective.name] = (len(values), list(reasons.values()), slowest)
    return found


def limit(name: str) -> float:
    """Seconds within which a call must have ended."""
    rules = {**BUILT_IN[name].rules, **CASES[name].rules}
    return rules.get("timeout", 0.0) + OVERHEAD


def runnable() -> tuple[str, ...]:
    """The cases that this machine can run."""
    return tuple(name for name in CASES if name != "code_tests" or landlock_version())


def test_every_built_in_reward_is_here():
    assert sorted([*CASES, *ELSEWHERE]) == sorted(BUILT_IN), "a built-in reward wants a case, or a reason why it has none"


def test_no_built_in_reward_stumbles_over_hostile_texts():
    found = fuzz(COUNT, SEED, runnable())
    for name, of_reward in found.items():
        scored = of_reward["values"] + of_reward["missing"].total()
        assert scored == (COUNT if CASES[name].every == 1 else scored), name
        assert of_reward["values"] > scored / 2, (name, of_reward["missing"])


@pytest.fixture(scope="module")
def bus():
    with make_bus([name for name in CASES if CASES[name].every == 1]) as buses:
        yield buses[1]


ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates as well
SIGNS = st.sampled_from([*"0123456789+-*/=.,;#$%^ \n\\{}[]()\"'x", "\\boxed{", "\\frac", "```json\n", "48/2=24", "answer "])
HOSTILE = st.builds(lambda kind, seed: KINDS[kind](Random(seed)), st.sampled_from(sorted(KINDS)), st.integers(0, 999))
TEXTS = st.text(ANY_CHARACTER, max_size=80) | st.lists(SIGNS, max_size=40).map("".join) | HOSTILE


@settings(derandomize=True, database=None, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_no_built_in_reward_stumbles_over_any_text(bus, texts):
    checked(bus, texts, 0)


def test_hostile_texts_are_the_same_each_time_and_of_every_kind():
    texts = list(hostile_text(1, RARE))
    assert texts == list(hostile_text(1, RARE)) != list(hostile_text(2, RARE))
    assert len(texts) == RARE
    assert len(texts[-1]) == LONG
    assert any("\0" in text for text in texts)
    assert any("\ud800" <= character <= "\udfff" for text in texts for character in text)
    assert sum("\\boxed" in text for text in texts) > 3
