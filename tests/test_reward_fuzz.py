"""Every built-in reward, through a real bus, on hostile texts: models are tiny, and services answer from this process.

`PARETUNE_FUZZ=20000` makes it that many texts; a benchmark calls `fuzz`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.bus import RewardBus
from rewards.component import BUILT_IN, load_component
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.fuzz_cases import Case, all_cases
from tests.hostile import KINDS, LONG, RARE, hostile_text

COUNT = int(os.environ.get("PARETUNE_FUZZ", "100"))
SEED = 20260
PROMPT = "Natalia sold 48 clips in April, and half as many in May: 7+5-3. How many in all?"
COLUMNS = {"answer": "72", "expression": "7+5-3", "tests": "assert f(2) == 4"}
OVERHEAD = 10.0  # seconds that a call may take besides its timeout: for a process to start, or to be killed


def fuzz(count: int, seed: int, cases: Mapping[str, Case]) -> dict[str, dict[str, Any]]:
    """Score that many hostile texts; per reward the values counted, the cells missing, and the slowest call in seconds.

    Raises:
        AssertionError: A value is out of bounds, is missing for a reason other than time, or came too late.
    """
    found = {name: {"values": 0, "missing": Counter(), "slowest": 0.0} for name in cases}
    with make_bus(cases) as buses:
        for number, texts in enumerate(in_groups(hostile_text(seed, count), len(KINDS))):
            for every, bus in buses.items():
                if number % every == 0:
                    for name, (values, reasons, slowest) in checked(bus, cases, texts, number).items():
                        of_reward = found[name]
                        of_reward["values"] += values
                        of_reward["missing"].update(re.sub(r"\d+ characters", "some characters", why) for why in reasons)
                        of_reward["slowest"] = max(of_reward["slowest"], slowest)
    return found


def in_groups(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of as many texts, as they come."""
    while group := list(islice(texts, size)):
        yield group


@contextmanager
def make_bus(cases: Mapping[str, Case]) -> Iterator[dict[int, RewardBus]]:
    """Buses of the rewards by how often they score."""
    buses = {}
    for every in sorted({case.every for case in cases.values()}):
        some = {name: case for name, case in cases.items() if case.every == every}
        components = {name: load_component(name, case.args, list(COLUMNS), case.rules) for name, case in some.items()}
        objectives = [Objective(name, True, case.bounds, Missing.NEUTRAL) for name, case in some.items()]
        buses[every] = RewardBus(components, objectives)
    try:
        yield buses
    finally:
        for bus in buses.values():
            bus.close()


def checked(
    bus: RewardBus, cases: Mapping[str, Case], texts: Sequence[str], number: int
) -> dict[str, tuple[int, list[str], float]]:
    """Score texts and see that all went as it may; per reward the values, why others are missing, the slowest call."""
    samples = tuple(
        Sample(tuple(range(length)), (-1.0,) * length, FinishReason.LENGTH if n % 7 == 0 else FinishReason.STOP, 0, text)
        for n, text in enumerate(texts)
        for length in [len(text) % 99]
    )
    matrix = bus.score([SampleGroup(Prompt(f"p{number}", PROMPT, (1,), COLUMNS), samples)])
    found = {}
    for k, objective in enumerate(matrix.objectives):
        values = matrix.raw_NK[~matrix.missing_NK[:, k], k]
        low, high = objective.bounds
        assert ((values >= low) & (values <= high)).all(), (objective.name, values)
        reasons = {n: why for (n, column), why in matrix.errors.items() if column == k}
        assert set(reasons) == set(matrix.missing_NK[:, k].nonzero()[0]), (objective.name, reasons)
        for n, why in reasons.items():
            assert why.startswith(cases[objective.name].undecided), (objective.name, why, texts[n][:200])
        slowest = max(bus.latest[objective.name].latencies)
        assert slowest < limit(objective.name, cases[objective.name]), (objective.name, slowest)
        found[objective.name] = (len(values), list(reasons.values()), slowest)
    return found


def limit(name: str, case: Case) -> float:
    """Seconds within which a call must have ended."""
    rules = {**BUILT_IN[name].rules, **case.rules}
    return rules.get("timeout", 0.0) + OVERHEAD


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    with all_cases(tmp_path_factory.mktemp("fuzz")) as found:
        yield found


def test_every_built_in_reward_is_here(cases):
    absent = set(BUILT_IN) - set(cases)
    assert absent <= {"code_tests", "similarity"}, "a built-in reward wants a case; these two may lack what they run on"


def test_no_built_in_reward_stumbles_over_hostile_texts(cases):
    found = fuzz(COUNT, SEED, cases)
    for name, of_reward in found.items():
        scored = of_reward["values"] + of_reward["missing"].total()
        assert scored == (COUNT if cases[name].every == 1 else scored), name
        assert of_reward["values"] > scored / 2, (name, of_reward["missing"])


@pytest.fixture(scope="module")
def bus(cases):
    with make_bus({name: case for name, case in cases.items() if case.every == 1}) as buses:
        yield buses[1]


ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates as well
SIGNS = st.sampled_from([*"0123456789+-*/=.,;#$%^ \n\\{}[]()\"'x", "\\boxed{", "\\frac", "```json\n", "48/2=24", "answer "])
HOSTILE = st.builds(lambda kind, seed: KINDS[kind](Random(seed)), st.sampled_from(sorted(KINDS)), st.integers(0, 999))
TEXTS = st.text(ANY_CHARACTER, max_size=80) | st.lists(SIGNS, max_size=40).map("".join) | HOSTILE


@settings(derandomize=True, database=None, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_no_built_in_reward_stumbles_over_any_text(bus, cases, texts):
    checked(bus, cases, texts, 0)


def test_hostile_texts_are_the_same_each_time_and_of_every_kind():
    texts = list(hostile_text(1, RARE))
    assert texts == list(hostile_text(1, RARE)) != list(hostile_text(2, RARE))
    assert len(texts) == RARE
    assert len(texts[-1]) == LONG
    assert any("\0" in text for text in texts)
    assert any("\ud800" <= character <= "\udfff" for text in texts for character in text)
    assert sum("\\boxed" in text for text in texts) > 3
