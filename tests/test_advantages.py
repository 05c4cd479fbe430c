"""Estimators against arithmetic by hand, properties, and the reference loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from align.advantages import grpo, reinforce, rloo
from tests import reference_loop

NAN = np.nan
REWARDS = arrays(np.float64, st.tuples(st.integers(2, 5), st.integers(2, 6)), elements=st.floats(0, 1, width=32))


def test_grpo_by_hand():
    # group (1, 0, 0): mean 1/3, deviations (2/3, -1/3, -1/3), variance (4/9 + 1/9 + 1/9) / 2 = 1/3, std 0.577350
    # A = (0.666667, -0.333333, -0.333333) / (0.577350 + 0.0001)
    expected = [[0.666667 / 0.577450, -0.333333 / 0.577450, -0.333333 / 0.577450]]
    np.testing.assert_allclose(grpo(np.array([[1.0, 0, 0]]), "group"), expected, rtol=1e-5)


def test_grpo_without_division_by_hand():
    # (3, 1): mean 2
    np.testing.assert_allclose(grpo(np.array([[3.0, 1.0]]), "none"), [[1.0, -1.0]])


def test_grpo_over_the_batch_by_hand():
    # groups (1, 0) and (0, 0): deviations (.5, -.5, 0, 0); batch (1, 0, 0, 0): mean .25, variance (.5625 + 3 * .0625) / 3
    # = .25, std .5
    expected = np.array([[0.5, -0.5], [0, 0]]) / 0.5001
    np.testing.assert_allclose(grpo(np.array([[1.0, 0], [0, 0]]), "batch"), expected)


def test_rloo_by_hand():
    # (1, 0, 0.5): others' means 0.25, 0.75, 0.5
    np.testing.assert_allclose(rloo(np.array([[1.0, 0, 0.5]])), [[0.75, -0.75, 0.0]])


def test_reinforce_by_hand():
    # batch (1, 0, 0, 0): mean .25; std .5 as above
    rewards = np.array([[1.0, 0], [0, 0]])
    np.testing.assert_allclose(reinforce(rewards, whiten=False), [[0.75, -0.25], [-0.25, -0.25]])
    np.testing.assert_allclose(reinforce(rewards, whiten=True), np.array([[0.75, -0.25], [-0.25, -0.25]]) / 0.5001)


ESTIMATORS = {
    "grpo": (lambda r: grpo(r, "group"), reference_loop.grpo),
    "dr_grpo": (lambda r: grpo(r, "none"), reference_loop.dr_grpo),
    "rloo": (rloo, reference_loop.rloo),
    "reinforce": (lambda r: reinforce(r, whiten=False), reference_loop.reinforce),
    "reinforce_whitened": (lambda r: reinforce(r, whiten=True), reference_loop.reinforce_whitened),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@given(rewards=REWARDS)
def test_equals_the_reference_loop(name, rewards):
    ours, reference = ESTIMATORS[name]
    np.testing.assert_allclose(ours(rewards), reference(rewards.tolist()), atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(rewards=REWARDS, seed=st.integers(0, 1000))
def test_order_of_samples_does_not_matter(name, rewards, seed):
    estimate = ESTIMATORS[name][0]
    order = np.random.default_rng(seed).permutation(rewards.shape[1])
    np.testing.assert_allclose(estimate(rewards[:, order]), estimate(rewards)[:, order], atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(rewards=REWARDS, shift=st.floats(-2, 2))
def test_a_constant_added_to_all_rewards_does_not_matter(name, rewards, shift):
    estimate = ESTIMATORS[name][0]
    np.testing.assert_allclose(estimate(rewards + shift), estimate(rewards), atol=1e-6)


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "reinforce"])
@given(rewards=REWARDS, factor=st.floats(0.1, 10))
def test_unscaled_estimators_scale_with_the_rewards(name, rewards, factor):
    estimate = ESTIMATORS[name][0]
    np.testing.assert_allclose(estimate(factor * rewards), factor * estimate(rewards), atol=1e-9)


def test_a_common_factor_cancels_in_a_standard_deviation():
    rewards = np.array([[1.0, 0.2, 0.1], [0.9, 0.5, 0.4]])
    for estimate in (lambda r: grpo(r, "group"), lambda r: reinforce(r, whiten=True)):
        assert np.abs(estimate(2 * rewards) - estimate(rewards)).max() < 1e-3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_sample_left_out_touches_nothing(name):
    estimate = ESTIMATORS[name][0]
    full = estimate(np.array([[1.0, 0.0, 0.5]]))
    with_hole = estimate(np.array([[1.0, NAN, 0.0, 0.5]]))
    np.testing.assert_allclose(with_hole[0, [0, 2, 3]], full[0])
    assert with_hole[0, 1] == 0.0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_with_nobody_or_one_are_finite(name):
    estimate = ESTIMATORS[name][0]
    advantages = estimate(np.array([[NAN, NAN, NAN], [0.3, NAN, NAN], [1.0, 0.0, 0.5]]))
    assert np.isfinite(advantages).all()
    assert (advantages[0] == 0).all()
    if not name.startswith("reinforce"):
        assert (advantages[1] == 0).all()


def test_everything_left_out_is_zero():
    for estimate, _ in ESTIMATORS.values():
        assert (estimate(np.full((2, 3), NAN)) == 0).all()
