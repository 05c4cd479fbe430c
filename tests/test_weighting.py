"""Fixed and scheduled weights, and what every scheme must keep to."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.weighting import FixedWeighting, ScheduleWeighting
from align.weighting import SCHEMES, Observation, WeightState, build_scheme
from rewards.types import Missing, Objective

OBJECTIVES = [Objective(name, True, (0.0, 1.0), Missing.FAIL) for name in ("a", "b")]
SCHEDULE = ScheduleWeighting(
    type="schedule",
    weights={"a": 1, "b": 0},
    milestones=[{"step": 10, "weights": {"a": 1, "b": 1}}, {"step": 30, "weights": {"a": 0, "b": 2}}],
)
FIXED = FixedWeighting(type="fixed", weights={"a": 3, "b": 1})


def observe(step: int) -> Observation:
    return Observation(step, np.zeros((2, 2, 2)), {})


def weights_at(config, step: int) -> tuple[float, ...]:
    scheme = build_scheme(config)
    return scheme.update(scheme.init(OBJECTIVES), observe(step)).weights_K


def test_fixed_weights_are_shares():
    assert weights_at(FIXED, 0) == weights_at(FIXED, 1000) == (0.75, 0.25)  # 3 / (3 + 1), 1 / (3 + 1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (1.0, 0.0)),
        (5, (0.75, 0.25)),  # half-way from (1, 0) to (.5, .5)
        (10, (0.5, 0.5)),  # (1, 1) as shares
        (20, (0.25, 0.75)),  # half-way from (.5, .5) to (0, 1)
        (30, (0.0, 1.0)),
        (1000, (0.0, 1.0)),
    ],
)
def test_schedule_by_hand(step, expected):
    assert weights_at(SCHEDULE, step) == pytest.approx(expected)


@given(step=st.integers(0, 100))
def test_scheduled_weights_stay_on_the_simplex(step):
    weights = weights_at(SCHEDULE, step)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


@pytest.mark.parametrize("config", [FIXED, SCHEDULE])
def test_order_of_objectives_does_not_matter(config):
    scheme = build_scheme(config)
    for step in (0, 7, 40):
        straight = scheme.update(scheme.init(OBJECTIVES), observe(step)).weights_K
        turned = scheme.update(scheme.init(OBJECTIVES[::-1]), observe(step)).weights_K
        assert straight == turned[::-1]


@pytest.mark.parametrize("config", [FIXED, SCHEDULE])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(config):
    scheme = build_scheme(config)
    straight = resumed = scheme.init(OBJECTIVES)
    for step in range(40):
        straight = scheme.update(straight, observe(step))
        resumed = scheme.update(WeightState.from_json(json.loads(json.dumps(resumed.to_json()))), observe(step))
        assert resumed == straight
        assert resumed.digest() == straight.digest()


def test_digests_tell_states_apart():
    a = WeightState((0.5, 0.5), 1.0, {})
    assert a.digest() != WeightState((0.5, 0.5), 1.0 + 1e-15, {}).digest()
    assert 0 <= a.digest() < 2**63


def test_every_scheme_of_the_configuration_exists():
    from typing import get_args

    from align.config import WeightingConfig

    configured = {model.model_fields["type"].annotation.__args__[0] for model in get_args(get_args(WeightingConfig)[0])}
    assert configured == set(SCHEMES)
