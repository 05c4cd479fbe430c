"""What every adaptive scheme must keep to: simplex, floors, permutation, constant observations, saving, missing values."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from align.config.weighting import AdaptiveWeighting
from align.weighting import Observation, Signal, WeightState, build_scheme
from align.weighting.adaptive import bounded
from rewards.types import Missing, Objective

NAMES = ("b", "c", "a")
OBJECTIVES = [Objective(name, True, (0.0, 1.0), Missing.NEUTRAL) for name in NAMES]
PRIOR = {"b": 0.5, "c": 0.3, "a": 0.2}
ADAPTIVE = (
    {"type": "hypervolume_gradient"},
    {"type": "hypervolume_gradient", "against": "archive", "reference": "initial"},
    {"type": "hypervolume_gradient", "vector": "batches"},
    {"type": "gradient"},
    {"type": "gradient", "cosine": True, "self_term": False, "pull": 0.1},
    {"type": "mgda"},
    {"type": "mgda", "unit": True, "smoothing": 0.5},
    {"type": "pama", "smoothing": 0.9},
    {"type": "covariance"},
    {"type": "variation"},
    {"type": "saturation", "gamma": 2.0},
)
every_scheme = pytest.mark.parametrize("options", ADAPTIVE, ids=lambda o: "-".join(map(str, o.values())))


def scheme_of(options: dict, **more):
    return build_scheme(TypeAdapter(AdaptiveWeighting).validate_python({"weights": PRIOR} | options | more))


def observation(step: int, seed: int, K: int = 3) -> Observation:
    """Everything that a scheme may ask for, made up."""
    generator = np.random.default_rng([seed, step])
    gradients = generator.normal(size=(K, 6))
    signals = {
        Signal.VALIDATION: np.random.default_rng(seed).uniform(0.1, 0.9, (40, K))[: step + 1],
        Signal.GRAM: gradients @ gradients.T,
        Signal.ADVANTAGES: generator.normal(size=(4, 5)),
    }
    return Observation(step, generator.uniform(size=(4, 5, K)), signals)


def turned(observation: Observation, order: np.ndarray) -> Observation:
    signals = dict(observation.signals)
    signals[Signal.VALIDATION] = signals[Signal.VALIDATION][:, order]
    signals[Signal.GRAM] = signals[Signal.GRAM][np.ix_(order, order)]
    return replace(observation, rewards_PGK=observation.rewards_PGK[:, :, order], signals=signals)


def walk(scheme, observations, objectives=OBJECTIVES) -> list[WeightState]:
    states = [scheme.init(objectives)]
    for seen in observations:
        states.append(scheme.update(states[-1], seen))
    return states[1:]


@every_scheme
@given(seed=st.integers(0, 2**16))
def test_weights_stay_on_the_simplex_and_move(options, seed):
    states = walk(scheme_of(options), [observation(step, seed) for step in range(5)])
    for state in states:
        assert sum(state.weights_K) == pytest.approx(1)
        assert min(state.weights_K) >= 0
    assert states[-1].weights_K != pytest.approx(tuple(PRIOR.values()), abs=1e-6)


@every_scheme
def test_floor_and_ceiling_hold(options):
    for state in walk(scheme_of(options, floor=0.15, ceiling=0.6), [observation(step, 3) for step in range(20)]):
        assert sum(state.weights_K) == pytest.approx(1)
        assert min(state.weights_K) >= 0.15 - 1e-12
        assert max(state.weights_K) <= 0.6 + 1e-12


@every_scheme
def test_the_order_of_objectives_does_not_matter(options):
    order = np.array([2, 0, 1])
    observations = [observation(step, 5) for step in range(8)]
    straight = walk(scheme_of(options), observations)
    other = walk(scheme_of(options), [turned(o, order) for o in observations], [OBJECTIVES[k] for k in order])
    for a, b in zip(straight, other, strict=True):
        assert np.array(b.weights_K) == pytest.approx(np.array(a.weights_K)[order], abs=1e-5)


@every_scheme
def test_a_saved_state_goes_on_as_if_nothing_had_happened(options):
    scheme = scheme_of(options, smoothing=0.3, pull=0.1)
    straight = resumed = scheme.init(OBJECTIVES)
    for step in range(12):
        seen = observation(step, 7)
        straight = scheme.update(straight, seen)
        text = json.dumps(resumed.to_json(), allow_nan=False, sort_keys=True)
        resumed = scheme.update(WeightState.from_json(json.loads(text)), seen)
        assert resumed == straight
        assert resumed.digest() == straight.digest()


@every_scheme
def test_what_is_only_watched_changes_nothing(options):
    """Three objectives of which one has no share: the other two weigh as if it were not there."""
    observations = [observation(step, 11) for step in range(6)]
    with_watched = walk(scheme_of(options, weights={"b": 0.6, "c": 0.4, "a": 0.0}), observations)
    without = walk(
        scheme_of(options, weights={"b": 0.6, "c": 0.4}),
        [
            replace(
                o,
                rewards_PGK=o.rewards_PGK[:, :, :2],
                signals={
                    **o.signals,
                    Signal.VALIDATION: o.signals[Signal.VALIDATION][:, :2],
                    Signal.GRAM: o.signals[Signal.GRAM][:2, :2],
                },
            )
            for o in observations
        ],
        OBJECTIVES[:2],
    )
    for a, b in zip(with_watched, without, strict=True):
        assert a.weights_K == pytest.approx((*b.weights_K, 0.0))


@every_scheme
def test_warm_up_interval_and_missing_signals_leave_the_weights_alone(options):
    prior = tuple(PRIOR.values())
    states = walk(scheme_of(options, warm_up=3, every=2), [observation(step, 13) for step in range(7)])
    assert [state.weights_K == pytest.approx(prior) for state in states[:3]] == [True] * 3
    assert states[3].weights_K != pytest.approx(prior, abs=1e-9)  # step 3 moves, 4 waits, 5 moves
    assert states[4].weights_K == states[3].weights_K
    assert states[5].weights_K != states[4].weights_K
    scheme = scheme_of(options)
    if scheme.needs & {Signal.GRAM, Signal.VALIDATION}:
        nothing = replace(observation(0, 13), signals={})
        assert walk(scheme, [nothing])[0].weights_K == pytest.approx(prior)


@every_scheme
def test_a_full_pull_or_smoothing_holds_the_prior(options):
    for more in ({"pull": 1.0}, {"smoothing": 1 - 1e-12}):
        for state in walk(scheme_of(options, **more), [observation(step, 17) for step in range(5)]):
            assert state.weights_K == pytest.approx(tuple(PRIOR.values()))


@every_scheme
def test_an_objective_that_nobody_could_measure_is_survived(options):
    """All values of one objective missing in a batch: the weights stay finite, and its own is not made up from nothing."""
    observations = []
    for step in range(4):
        seen = observation(step, 19)
        rewards = seen.rewards_PGK.copy()
        rewards[:, :, 1] = np.nan
        observations.append(replace(seen, rewards_PGK=rewards))
    for state in walk(scheme_of(options), observations):
        assert np.isfinite(state.weights_K).all()
        assert sum(state.weights_K) == pytest.approx(1)
        json.dumps(state.to_json(), allow_nan=False)
    if options["type"] in ("covariance", "variation", "saturation", "pama"):
        assert state.weights_K[1] == pytest.approx(0.3)


@every_scheme
def test_a_batch_without_any_difference_is_survived(options):
    """Zero variance everywhere, and gradients of length 0."""
    flat = Observation(
        0,
        np.full((4, 5, 3), 0.5),
        {
            Signal.VALIDATION: np.full((2, 3), 0.5),
            Signal.GRAM: np.zeros((3, 3)),
            Signal.ADVANTAGES: np.zeros((4, 5)),
        },
    )
    for state in walk(scheme_of(options), [replace(flat, step=step) for step in range(3)]):
        assert np.isfinite(state.weights_K).all()
        assert sum(state.weights_K) == pytest.approx(1)
        if options["type"] != "hypervolume_gradient":  # this one looks at means, and they are all alike: equal derivatives
            assert state.weights_K == pytest.approx(tuple(PRIOR.values()), abs=0.01)


@every_scheme
def test_a_constant_observation_leads_to_constant_weights(options):
    """Where the observation no longer changes, the weights settle (multiplicative rules need their pull for it)."""
    constant = observation(3, 23)
    scheme = scheme_of(options, pull=0.2)
    states = walk(scheme, [replace(constant, step=step) for step in range(400)])
    assert states[-1].weights_K == pytest.approx(states[-2].weights_K, abs=1e-6)


@given(values=st.lists(st.floats(0, 5), min_size=2, max_size=6), floor=st.floats(0, 0.15), room=st.floats(0.01, 1))
def test_bounding_is_the_nearest_point(values, floor, room):
    weights = np.array(values) + 1e-3
    weights /= weights.sum()
    ceiling = min(1.0, max(1 / len(weights), floor) + room)
    nearest = bounded(weights, floor, ceiling)
    assert nearest.sum() == pytest.approx(1)
    assert (nearest >= floor - 1e-12).all()
    assert (nearest <= ceiling + 1e-12).all()
    generator = np.random.default_rng(0)
    for _ in range(50):  # no other point that keeps to the bounds is nearer: look from it along feasible directions
        other = bounded(generator.dirichlet(np.ones(len(weights))), floor, ceiling)
        assert np.linalg.norm(nearest - weights) <= np.linalg.norm(other - weights) + 1e-9
