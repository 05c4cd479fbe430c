"""The step: missing values, weights, scale and metrics, in their order."""

import numpy as np
import pytest

from align.config.advantages import GrpoEstimator, ReinforceEstimator, RlooEstimator, SumThenNormalize
from align.config.weighting import FixedWeighting, ScheduleWeighting
from align.missing import MissingRewardError, apply_missing, unmeasured
from align.step import StepRules, take_step
from align.weighting import Signal, WeightState, build_scheme
from rewards.types import Missing, Objective, RewardMatrix

NAN = np.nan


def objectives(policy: Missing = Missing.FAIL) -> list[Objective]:
    return [Objective("up", True, (0.0, 10.0), policy), Objective("down", False, (0.0, 1.0), Missing.FAIL)]


def rules(objectives, estimator=None, weights=(0.5, 0.5), group_size=2, scheme=None):
    config = FixedWeighting(type="fixed", weights=dict(zip(("up", "down"), weights, strict=True)))
    return StepRules(
        objectives,
        scheme or build_scheme(config),
        estimator or RlooEstimator(type="rloo"),
        SumThenNormalize(type="sum_then_normalize"),
        group_size,
        max_failed=0.5,
    )


def step(rules, raw, errors=None, signals=None):
    matrix = RewardMatrix(rules.objectives, np.array(raw, dtype=float), errors or {})
    return take_step(rules, rules.scheme.init(rules.objectives), matrix, 0, signals or {})


class Halves:
    """The start of a scheme of two objectives, for tests that need only its update."""

    needs = frozenset()

    def init(self, objectives):
        return WeightState((0.5, 0.5), 1.0, {})


def test_raw_values_are_scaled_and_turned_by_hand():
    # up: 10 -> 1, 0 -> 0; down: .25 -> .75, .75 -> .25; sums .5 * 1 + .5 * .75 = .875 and .125; rloo: +-.75
    result = step(rules(objectives()), [[10, 0.25], [0, 0.75]])
    np.testing.assert_allclose(result.advantages_PG, [[0.75, -0.75]])


def test_step_scale_multiplies_after_normalisation():
    class Doubling(Halves):
        def update(self, state, observation):
            return WeightState(state.weights_K, 2.0, {"count": 3, "trend": {"up": 0.1, "down": 0.2}, "history": [1, 2]})

    grpo = GrpoEstimator(type="grpo")
    raw = [[10, 0.25], [0, 0.75]]
    plain = step(rules(objectives(), grpo), raw)
    doubled = step(rules(objectives(), grpo, scheme=Doubling()), raw)
    np.testing.assert_allclose(doubled.advantages_PG, 2 * plain.advantages_PG)
    assert doubled.metrics["step_scale"] == 2.0
    assert doubled.metrics["weighting/count"] == 3
    assert doubled.metrics["weighting/trend/down"] == 0.2
    assert not any(key.startswith("weighting/history") for key in doubled.metrics)


def test_a_scheme_sees_only_what_it_needs():
    class Curious(Halves):
        needs = frozenset({Signal.VALIDATION})

        def update(self, state, observation):
            assert set(observation.signals) == {Signal.VALIDATION}
            return WeightState(tuple(observation.signals[Signal.VALIDATION]), 1.0, {})

    result = step(rules(objectives(), scheme=Curious()), [[10, 0.25], [0, 0.75]], signals={Signal.VALIDATION: [0.1, 0.9]})
    assert result.state.weights_K == (0.1, 0.9)


def test_fail_stops_with_objective_count_reason_and_way_out():
    with pytest.raises(
        MissingRewardError, match=r"'up' has no value for 1 of 2 samples.*took too long.*objectives\.up\.missing"
    ):
        step(rules(objectives()), [[NAN, 0.25], [0, 0.75]], {(0, 0): "took too long"})


def test_drop_sample_leaves_one_out():
    # group of (10, 0, missing): as if it were (10, 0)
    result = step(rules(objectives(Missing.DROP_SAMPLE), group_size=3), [[10, 0.5], [0, 0.5], [NAN, 0.5]])
    np.testing.assert_allclose(result.advantages_PG, [[0.5, -0.5, 0]])
    assert result.metrics["objectives/up/missing"] == pytest.approx(1 / 3)
    assert result.metrics["objectives/up/mean"] == 5


def test_drop_group_leaves_all_of_it_out():
    raw = [[10, 0.5], [NAN, 0.1], [10, 0.5], [0, 0.5]]
    result = step(rules(objectives(Missing.DROP_GROUP)), raw)
    np.testing.assert_allclose(result.advantages_PG, [[0, 0], [0.5, -0.5]])


def test_neutral_counts_as_the_mean_of_the_group():
    # up of (10, 0, missing) -> (1, 0, .5): rloo (.75, -.75, 0) * .5
    result = step(rules(objectives(Missing.NEUTRAL), group_size=3), [[10, 0.5], [0, 0.5], [NAN, 0.5]])
    np.testing.assert_allclose(result.advantages_PG, [[0.375, -0.375, 0]])


def test_neutral_without_anybody_in_the_group_moves_nothing():
    result = step(rules(objectives(Missing.NEUTRAL)), [[NAN, 0.2], [NAN, 0.4], [10, 0.5], [0, 0.5]])
    np.testing.assert_allclose(result.advantages_PG, [[0.1, -0.1], [0.5, -0.5]])
    result = step(rules(objectives(Missing.NEUTRAL)), [[NAN, 0.2], [NAN, 0.4]])
    np.testing.assert_allclose(result.advantages_PG, [[0.1, -0.1]])
    assert np.isnan(result.metrics["objectives/up/mean"])


def test_policies_fill_and_leave_out_by_hand():
    # up, group 1: nobody has a value, so the mean .6 of the others; group 2: (.4, .8)
    rewards = np.array([[[NAN, 0.2], [NAN, 0.4]], [[0.4, 0.5], [0.8, 0.5]]])
    filled = apply_missing(rewards, objectives(Missing.NEUTRAL))
    np.testing.assert_allclose(filled[:, :, 0], [[0.6, 0.6], [0.4, 0.8]])
    rewards[0, 0, 0] = 1.0
    assert np.isnan(apply_missing(rewards, objectives(Missing.DROP_GROUP))[0]).all()
    left_out = np.isnan(apply_missing(rewards, objectives(Missing.DROP_SAMPLE))).all(axis=2)
    assert left_out.tolist() == [[False, True], [False, False]]


def test_missing_is_never_zero():
    # were the missing value a 0, the second sample would look worse than the third
    result = step(rules(objectives(Missing.NEUTRAL), group_size=3), [[10, 0.5], [NAN, 0.5], [0, 0.5]])
    assert result.advantages_PG[0, 1] > result.advantages_PG[0, 2]


def test_nothing_missing_is_nothing_copied():
    rewards = np.zeros((1, 2, 2))
    assert apply_missing(rewards, objectives()) is rewards


def test_a_scheme_sees_what_was_measured_and_not_what_was_filled_in():
    class Watching(Halves):
        def update(self, state, observation):
            assert np.isnan(observation.rewards_PGK[0, 1, 0])
            assert observation.rewards_PGK[0, 0, 0] == 1
            return state

    step(rules(objectives(Missing.NEUTRAL), scheme=Watching()), [[10, 0.25], [NAN, 0.75]])


def test_an_objective_of_weight_zero_makes_no_group_effective():
    result = step(rules(objectives(), weights=(0, 1)), [[10, 0.3], [0, 0.3]])
    assert result.metrics["groups/effective"] == 0
    assert result.metrics["objectives/up/constant_groups"] == 0


def test_milestones_are_not_taken_for_numbers_of_objectives():
    schedule = ScheduleWeighting(
        type="schedule", weights={"up": 1, "down": 1}, milestones=[{"step": 5, "weights": {"up": 1, "down": 0}}]
    )
    result = step(rules(objectives(), scheme=build_scheme(schedule)), [[10, 0.25], [0, 0.75]])
    assert not any(key.startswith("weighting/") for key in result.metrics)


def test_constant_groups_are_counted_and_silent():
    raw = [[3, 0.3], [3, 0.3], [10, 0.3], [0, 0.3]]
    result = step(rules(objectives(), GrpoEstimator(type="grpo")), raw)
    assert result.advantages_PG[0].tolist() == [0.0, 0.0]
    assert result.metrics["groups/effective"] == 0.5
    assert result.metrics["objectives/down/constant_groups"] == 1.0
    assert result.metrics["objectives/up/constant_groups"] == 0.5


def test_against_a_batch_baseline_a_constant_group_speaks():
    raw = [[10, 0.3], [10, 0.3], [0, 0.3], [0, 0.3]]
    result = step(rules(objectives(), ReinforceEstimator(type="reinforce")), raw)
    assert (result.advantages_PG[0] > 0).all()
    assert (result.advantages_PG[1] < 0).all()


def test_metrics_by_hand():
    result = step(rules(objectives(), weights=(3, 1)), [[10, 0.25], [0, 0.75]])
    assert result.metrics["weights/up"] == 0.75
    assert result.metrics["objectives/up/mean"] == 5
    assert result.metrics["objectives/up/std"] == pytest.approx(np.sqrt(50))  # ((10 - 5)^2 + (0 - 5)^2) / (2 - 1)
    assert result.metrics["objectives/down/mean"] == 0.5
    assert result.metrics["objectives/up/missing"] == 0


def test_the_log_ratio_to_the_reference_is_one_more_stream():
    """All objectives constant; the sample nearer to the reference policy wins: -.2 and -.6, rloo +-.4, times .5."""

    class Near(Halves):
        needs = frozenset({Signal.KL})

        def update(self, state, observation):
            assert observation.rewards_PGK.shape == (1, 2, 2)  # it is not an objective
            return WeightState((0.25, 0.25), 1.0, {}, kl_weight=0.5)

    result = step(rules(objectives(), scheme=Near()), [[3, 0.3], [3, 0.3]], signals={Signal.KL: np.array([[0.2, 0.6]])})
    np.testing.assert_allclose(result.advantages_PG, [[0.2, -0.2]])
    assert result.metrics["weights/kl"] == 0.5
    assert result.metrics["groups/effective"] == 1


def test_advantages_are_shown_as_the_old_weights_make_them():
    class Looking(Halves):
        needs = frozenset({Signal.ADVANTAGES})

        def update(self, state, observation):
            np.testing.assert_allclose(observation.signals[Signal.ADVANTAGES], [[0.75, -0.75]])
            return WeightState((1.0, 0.0), 1.0, {})

    result = step(rules(objectives(), scheme=Looking()), [[10, 0.25], [0, 0.75]])
    np.testing.assert_allclose(result.advantages_PG, [[1.0, -1.0]])


def test_an_objective_that_nobody_could_measure_is_named():
    matrix = RewardMatrix(objectives(Missing.NEUTRAL), np.array([[NAN, 0.1], [NAN, NAN]]), {(0, 0): "TimeoutError: 5 s"})
    assert unmeasured(matrix) == {"up": "objective 'up' has no value for any sample of the batch: TimeoutError: 5 s"}
