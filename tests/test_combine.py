"""Combinations: by hand, against TRL's own arithmetic, and what cancels in them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.combine import combine
from align.config.advantages import GrpoEstimator, NormalizeThenSum, ReinforceEstimator, RlooEstimator, SumThenNormalize

GRPO, RLOO = GrpoEstimator(type="grpo"), RlooEstimator(type="rloo")
REINFORCE = ReinforceEstimator(type="reinforce")
SUM, NORMALIZE = SumThenNormalize(type="sum_then_normalize"), NormalizeThenSum(type="normalize_then_sum")


def random_rewards(seed: int, prompts: int = 3, group: int = 4, objectives: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((prompts, group, objectives))


def test_sum_then_normalize_by_hand():
    # one group, two objectives, w = (.75, .25): sums (.75*1 + .25*0, .75*0 + .25*1) = (.75, .25); rloo: (.5, -.5)
    rewards = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(combine(rewards, np.array([0.75, 0.25]), RLOO, SUM), [[0.5, -0.5]])


def test_normalize_then_sum_by_hand():
    # objective 1 of the group: (1, 0) -> +-.5 / (.707107 + 1e-4) = +-.707007; objective 2: (0, .01) -> -+.005 / (.00707107
    # + 1e-4) = -+.697247; w = (.5, .5): sums (.5 * .707007 - .5 * .697247) = +-.00488; whitened over the batch of two:
    # +-.00488 / (.00488 * sqrt 2 + 1e-4)
    rewards = np.array([[[1.0, 0.0], [0.0, 0.01]]])
    total = 0.5 * (0.5 / (0.70710678 + 1e-4)) - 0.5 * (0.005 / (0.0070710678 + 1e-4))
    expected = total / (total * np.sqrt(2) + 1e-4)
    np.testing.assert_allclose(combine(rewards, np.array([0.5, 0.5]), GRPO, NORMALIZE), [[expected, -expected]], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_both_equal_trl(seed):
    """The lines of TRL's aggregation, on its own functions (trl.trainer.utils.nanstd)."""
    from trl.trainer.utils import nanstd

    rewards = random_rewards(seed)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    grouped = torch.tensor(rewards)
    total = (grouped * weights).sum(-1)
    expected = (total - total.mean(1, keepdim=True)) / (nanstd(total, dim=1).unsqueeze(1) + 1e-4)
    np.testing.assert_allclose(combine(rewards, weights.numpy(), GRPO, SUM), expected, atol=1e-9)
    z = (grouped - grouped.mean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    total = (z * weights).sum(-1)
    expected = (total - total.mean()) / (nanstd(total) + 1e-4)
    np.testing.assert_allclose(combine(rewards, weights.numpy(), GRPO, NORMALIZE), expected, atol=1e-9)


@pytest.mark.parametrize("combination", [SUM, NORMALIZE])
@pytest.mark.parametrize("estimator", [GRPO, RLOO, REINFORCE])
@given(seed=st.integers(0, 1000))
def test_order_of_objectives_does_not_matter(combination, estimator, seed):
    rewards, order = random_rewards(seed), np.random.default_rng(seed).permutation(3)
    weights = np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(
        combine(rewards, weights, estimator, combination),
        combine(rewards[:, :, order], weights[order], estimator, combination),
        atol=1e-9,
    )


@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10), shift=st.floats(-1, 1))
def test_normalize_then_sum_does_not_see_the_scale_of_an_objective(seed, factor, shift):
    rewards = random_rewards(seed)
    rescaled = rewards.copy()
    rescaled[:, :, 1] = factor * rescaled[:, :, 1] + shift
    weights = np.array([0.5, 0.3, 0.2])
    difference = combine(rewards, weights, GRPO, NORMALIZE) - combine(rescaled, weights, GRPO, NORMALIZE)
    assert np.abs(difference).max() < 0.05  # EPSILON beside a standard deviation that grew or shrank tenfold


def test_a_weight_of_zero_takes_an_objective_out():
    rewards = random_rewards(1)
    for combination in (SUM, NORMALIZE):
        np.testing.assert_allclose(
            combine(rewards, np.array([0.5, 0.5, 0.0]), GRPO, combination),
            combine(rewards[:, :, :2], np.array([0.5, 0.5]), GRPO, combination),
            atol=1e-12,
        )


def test_rloo_and_grpo_agree_under_normalize_then_sum():
    rewards, weights = random_rewards(2), np.array([0.5, 0.3, 0.2])
    np.testing.assert_array_equal(combine(rewards, weights, RLOO, NORMALIZE), combine(rewards, weights, GRPO, NORMALIZE))


def test_left_out_samples_have_no_advantage():
    rewards = random_rewards(3)
    rewards[0, 1] = np.nan
    for combination in (SUM, NORMALIZE):
        for estimator in (GRPO, RLOO, REINFORCE):
            advantages = combine(rewards, np.array([0.5, 0.3, 0.2]), estimator, combination)
            assert advantages[0, 1] == 0
            assert np.isfinite(advantages).all()


def test_reinforce_standardises_over_the_batch():
    # r_1 = 1 1 0 0, r_2 = 0 1 0 1 over the batch: both have mean .5 and std .57735, so z = +-.5 / (.57735 + 1e-4)
    # w = (.5, .5): sums (0, z, -z, 0), std z sqrt(2/3), so +-z / (z sqrt(2/3) + 1e-4); over groups, r_1 would be silent
    rewards = np.array([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    z = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    top = z / (z * np.sqrt(2 / 3) + 1e-4)
    advantages = combine(rewards, np.array([0.5, 0.5]), REINFORCE, NORMALIZE)
    np.testing.assert_allclose(advantages, [[0, top], [-top, 0]], atol=1e-12)
