"""Combinations: by hand, against TRL's own arithmetic and plain loops, and what cancels in them."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align import combine as module
from align.combine import combine
from align.config.advantages import (
    Chebyshev,
    Dvao,
    EstimateThenSum,
    GrpoEstimator,
    MoGrpo,
    NormalizeThenSum,
    ParetoRank,
    Product,
    ReinforceEstimator,
    RlooEstimator,
    SoftMin,
    SumThenNormalize,
)
from tests import reference_loop

GRPO, RLOO = GrpoEstimator(type="grpo"), RlooEstimator(type="rloo")
REINFORCE = ReinforceEstimator(type="reinforce")
ESTIMATORS = (GRPO, RLOO, REINFORCE)
SUM, NORMALIZE = SumThenNormalize(type="sum_then_normalize"), NormalizeThenSum(type="normalize_then_sum")
ESTIMATE, MO_GRPO = EstimateThenSum(type="estimate_then_sum"), MoGrpo(type="mo_grpo")
DVAO, SOFT_MIN = Dvao(type="dvao"), SoftMin(type="soft_min")
CHEBYSHEV, PRODUCT, RANK = Chebyshev(type="chebyshev"), Product(type="product"), ParetoRank(type="pareto_rank")
ANY_WEIGHTS = (SUM, ESTIMATE, MO_GRPO, NORMALIZE)  # negative ones too, and streams with a range of their own
COMBINATIONS = (*ANY_WEIGHTS, DVAO, SOFT_MIN, CHEBYSHEV, PRODUCT, RANK)
every_combination = pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: c.type)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.type)
SEEDS = st.integers(0, 1000)
few = settings(max_examples=25)  # random numbers, each time other ones: more say nothing more


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


def test_estimate_then_sum_by_hand():
    # rloo of (1, 0) and of (0, .5): (1, -1) and (-.5, .5); w = (.75, .25): (.75 - .125, -.75 + .125)
    rewards = np.array([[[1.0, 0.0], [0.0, 0.5]]])
    np.testing.assert_allclose(combine(rewards, np.array([0.75, 0.25]), RLOO, ESTIMATE), [[0.625, -0.625]])
    # w = (1, -2), as a multiplier may have it: (1 + 1, -1 - 1)
    np.testing.assert_allclose(combine(rewards, np.array([1.0, -2.0]), RLOO, ESTIMATE), [[2.0, -2.0]])


def test_mo_grpo_by_hand():
    # as normalize_then_sum above, less the whitening: +-(.5 * .707007 - .5 * .697247)
    rewards = np.array([[[1.0, 0.0], [0.0, 0.01]]])
    total = 0.5 * (0.5 / (0.70710678 + 1e-4)) - 0.5 * (0.005 / (0.0070710678 + 1e-4))
    np.testing.assert_allclose(combine(rewards, np.array([0.5, 0.5]), GRPO, MO_GRPO), [[total, -total]], rtol=1e-6)


def test_dvao_by_hand():
    # s = (1, .5) / sqrt 2, w = (.5, .5): sums (.5, .25), centred +-.125, over (.5 + .25) / sqrt 2 + 1e-4 = .53043
    rewards = np.array([[[1.0, 0.0], [0.0, 0.5]]])
    expected = 0.125 / (0.75 / math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(combine(rewards, np.array([0.5, 0.5]), GRPO, DVAO), [[expected, -expected]])


def test_soft_min_by_hand():
    # a sample has z or -z, z = .5 / (.707107 + 1e-4), in both objectives: (z, z), (-z, -z) | (z, -z), (-z, z)
    # kappa = 1, w = (.5, .5): z, -z | -log cosh z twice; their mean is m = -.5 log cosh z; whitened over the batch
    rewards = np.array([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    z = 0.5 / (math.sqrt(0.5) + 1e-4)
    soft = [z, -z, -math.log(math.cosh(z)), -math.log(math.cosh(z))]
    mean = -0.5 * math.log(math.cosh(z))
    spread = math.sqrt(sum((x - mean) ** 2 for x in soft) / 3) + 1e-4
    expected = [[(soft[0] - mean) / spread, (soft[1] - mean) / spread], [(soft[2] - mean) / spread] * 2]
    np.testing.assert_allclose(combine(rewards, np.array([0.5, 0.5]), GRPO, SOFT_MIN), expected)


def test_scalarised_samples_meet_the_estimator():
    # rloo of two is the difference. Products, edges above (0, 0) less .1: 1.1 * .1 = .11 and .1 * .6 = .06
    # chebyshev, w = .5: minima -.5, -.5, sums -.5, -.75, so .05 * .25; ranks: neither dominates the other
    rewards, weights = np.array([[[1.0, 0.0], [0.0, 0.5]]]), np.array([0.5, 0.5])
    np.testing.assert_allclose(combine(rewards, weights, RLOO, PRODUCT), [[0.05, -0.05]])
    np.testing.assert_allclose(combine(rewards, weights, RLOO, CHEBYSHEV), [[0.0125, -0.0125]])
    np.testing.assert_array_equal(combine(rewards, weights, RLOO, RANK), [[0.0, 0.0]])
    np.testing.assert_array_equal(combine(rewards, np.array([1.0, 0.0]), RLOO, RANK), [[1.0, -1.0]])


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


def in_loops(groups: list[list[list[float]]], weights: list[float], name: str, over_batch: bool) -> list[float]:
    """What the combinations that standardise by themselves make of a batch, sample by sample."""
    batch = [sample for group in groups for sample in group]
    results = []
    for group in groups:
        columns = list(zip(*(batch if over_batch else group), strict=True))
        means, spreads = [reference_loop.mean(c) for c in columns], [reference_loop.standard_deviation(c) for c in columns]
        for sample in group:
            z = [(r - m) / (s + 1e-4) for r, m, s in zip(sample, means, spreads, strict=True)]
            if name == "dvao":
                above = sum(w * (r - m) for w, r, m in zip(weights, sample, means, strict=True))
                results.append(above / (sum(w * s for w, s in zip(weights, spreads, strict=True)) + 1e-4))
            elif name == "soft_min":
                results.append(-math.log(sum(w * math.exp(-x) for w, x in zip(weights, z, strict=True))))
            else:
                results.append(sum(w * x for w, x in zip(weights, z, strict=True)))
    if name in ("soft_min", "normalize_then_sum"):
        return reference_loop.reinforce_whitened([results])[0]
    return results


@pytest.mark.parametrize("combination", [MO_GRPO, NORMALIZE, DVAO, SOFT_MIN], ids=lambda c: c.type)
@pytest.mark.parametrize("estimator", [GRPO, REINFORCE], ids=lambda e: e.type)
@few
@given(seed=SEEDS)
def test_those_that_standardise_equal_plain_loops(combination, estimator, seed):
    rewards, weights = random_rewards(seed), [0.6, 0.3, 0.1]
    expected = in_loops(rewards.tolist(), weights, combination.type, estimator is REINFORCE)
    np.testing.assert_allclose(combine(rewards, np.array(weights), estimator, combination).ravel(), expected, atol=1e-9)


@every_combination
@every_estimator
@few
@given(seed=SEEDS)
def test_order_of_objectives_does_not_matter(combination, estimator, seed):
    rewards, order = random_rewards(seed), np.random.default_rng(seed).permutation(3)
    weights = np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(
        combine(rewards, weights, estimator, combination),
        combine(rewards[:, :, order], weights[order], estimator, combination),
        atol=1e-9,
    )


@every_combination
@every_estimator
@few
@given(seed=SEEDS)
def test_order_of_samples_does_not_matter(combination, estimator, seed):
    rewards, order = random_rewards(seed), np.random.default_rng(seed).permutation(4)
    weights = np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(
        combine(rewards, weights, estimator, combination)[:, order],
        combine(rewards[:, order], weights, estimator, combination),
        atol=1e-9,
    )


@few
@given(seed=SEEDS, factor=st.floats(0.1, 10), shift=st.floats(-1, 1))
@pytest.mark.parametrize("combination", [NORMALIZE, MO_GRPO, SOFT_MIN], ids=lambda c: c.type)
def test_the_scale_of_an_objective_is_not_seen_where_it_is_standardised(combination, seed, factor, shift):
    rewards = random_rewards(seed)
    rescaled = rewards.copy()
    rescaled[:, :, 1] = factor * rescaled[:, :, 1] + shift
    weights = np.array([0.5, 0.3, 0.2])
    difference = combine(rewards, weights, GRPO, combination) - combine(rescaled, weights, GRPO, combination)
    assert np.abs(difference).max() < 0.05  # EPSILON beside a standard deviation that grew or shrank tenfold


@pytest.mark.parametrize("combination", [NORMALIZE, DVAO, SOFT_MIN, PRODUCT, RANK], ids=lambda c: c.type)
@few
@given(seed=SEEDS, factor=st.floats(0.5, 10))
def test_a_factor_on_all_weights_does_not_matter(combination, seed, factor):
    rewards, weights = random_rewards(seed), np.array([0.5, 0.3, 0.2])
    difference = combine(rewards, weights, RLOO, combination) - combine(rewards, factor * weights, RLOO, combination)
    assert np.abs(difference).max() < 0.01  # EPSILON beside a standard deviation that grew tenfold


@pytest.mark.filterwarnings("error")  # the logarithm of a weight of 0
@every_combination
@every_estimator
def test_a_weight_of_zero_takes_an_objective_out(combination, estimator):
    rewards = random_rewards(1)
    np.testing.assert_allclose(
        combine(rewards, np.array([0.5, 0.5, 0.0]), estimator, combination),
        combine(rewards[:, :, :2], np.array([0.5, 0.5]), estimator, combination),
        atol=1e-12,
    )


@pytest.mark.parametrize("combination", [ESTIMATE, MO_GRPO], ids=lambda c: c.type)
@every_estimator
@few
@given(seed=SEEDS)
def test_linear_in_the_weights(combination, estimator, seed):
    rewards, (one, other) = random_rewards(seed), np.random.default_rng(seed).normal(size=(2, 3))
    np.testing.assert_allclose(
        combine(rewards, 2 * one - 3 * other, estimator, combination),
        2 * combine(rewards, one, estimator, combination) - 3 * combine(rewards, other, estimator, combination),
        atol=1e-9,
    )


@pytest.mark.parametrize("combination", ANY_WEIGHTS, ids=lambda c: c.type)
@every_estimator
@few
@given(seed=SEEDS)
def test_a_negative_weight_is_the_weight_of_the_opposite(combination, estimator, seed):
    """With a stream that has a range of its own, as the log-ratio to a reference policy has."""
    rewards = random_rewards(seed) * np.array([1.0, 1.0, 300.0])
    np.testing.assert_allclose(
        combine(rewards, np.array([1.0, 0.7, -0.4]), estimator, combination),
        combine(rewards * np.array([1, 1, -1]), np.array([1.0, 0.7, 0.4]), estimator, combination),
        atol=1e-9,
    )


@few
@given(seed=SEEDS, spread=st.floats(1e-4, 1))
def test_dvao_never_exceeds_grpo(seed, spread):
    rewards, weights = random_rewards(seed) * np.array([1, spread, spread**2]), np.array([0.2, 0.3, 0.5])
    bound = np.abs(combine(rewards, weights, GRPO, SUM))
    assert (np.abs(combine(rewards, weights, GRPO, DVAO)) <= bound + 1e-12).all()


@every_estimator
@few
@given(seed=SEEDS)
def test_soft_min_goes_from_the_mean_to_the_worst(estimator, seed):
    rewards, weights = random_rewards(seed), np.array([0.5, 0.3, 0.2])
    mild, strict = SoftMin(type="soft_min", kappa=1e-6), SoftMin(type="soft_min", kappa=1e6)
    mean = combine(rewards, weights, estimator, NORMALIZE)
    np.testing.assert_allclose(combine(rewards, weights, estimator, mild), mean, atol=1e-4)
    over_batch = estimator is REINFORCE
    worst = np.min([module.mo_grpo(rewards[:, :, [k]], np.ones(1), over_batch) for k in range(3)], axis=0)
    worst = (worst - worst.mean()) / (worst.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(combine(rewards, weights, estimator, strict), worst, atol=1e-4)


@every_estimator
@few
@given(seed=SEEDS)
def test_one_objective_alone(estimator, seed):
    """Nothing to combine: those that standardise give group-scaled grpo, all others the estimator."""
    rewards, weights = random_rewards(seed, objectives=1), np.ones(1)
    alone = combine(rewards, weights, estimator, SUM)
    for combination in (ESTIMATE, PRODUCT):
        np.testing.assert_allclose(combine(rewards, weights, estimator, combination), alone, atol=1e-12)
    exact = Chebyshev(type="chebyshev", augmentation=0)
    np.testing.assert_allclose(combine(rewards, weights, estimator, exact), alone, atol=1e-12)
    standard = alone if estimator is REINFORCE else combine(rewards, weights, GRPO, SUM)
    for combination in (MO_GRPO, DVAO):
        np.testing.assert_allclose(combine(rewards, weights, estimator, combination), standard, atol=1e-9)
    np.testing.assert_allclose(
        combine(rewards, weights, estimator, SOFT_MIN), combine(rewards, weights, estimator, NORMALIZE), atol=1e-9
    )


def test_two_names_for_one_thing():
    """Standardising each objective is the grpo estimator; without a division the order of sum and estimator is free."""
    rewards, weights = random_rewards(4), np.array([0.5, 0.3, 0.2])
    for estimator in (GRPO, REINFORCE):
        one, other = (combine(rewards, weights, estimator, c) for c in (MO_GRPO, ESTIMATE))
        np.testing.assert_array_equal(one, other)
    for estimator in (RLOO, GrpoEstimator(type="grpo", scale="none"), ReinforceEstimator(type="reinforce", whiten=False)):
        one, other = (combine(rewards, weights, estimator, c) for c in (SUM, ESTIMATE))
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("combination", [NORMALIZE, MO_GRPO, DVAO, SOFT_MIN], ids=lambda c: c.type)
def test_options_of_the_estimator_that_are_not_looked_at(combination):
    rewards, weights = random_rewards(2), np.array([0.5, 0.3, 0.2])
    of_group, of_batch = (combine(rewards, weights, estimator, combination) for estimator in (GRPO, REINFORCE))
    for estimator in (RLOO, GrpoEstimator(type="grpo", scale="none"), GrpoEstimator(type="grpo", scale="batch")):
        np.testing.assert_array_equal(combine(rewards, weights, estimator, combination), of_group)
    unwhitened = ReinforceEstimator(type="reinforce", whiten=False)
    np.testing.assert_array_equal(combine(rewards, weights, unwhitened, combination), of_batch)
    assert np.abs(of_group - of_batch).max() > 0.1


@every_combination
@every_estimator
@few
@given(seed=SEEDS)
def test_a_left_out_sample_has_no_advantage_and_touches_no_statistic(combination, estimator, seed):
    rewards, weights = random_rewards(seed), np.array([0.5, 0.3, 0.2])
    more = np.insert(rewards, seed % 5, np.nan, axis=1)
    advantages = combine(more, weights, estimator, combination)
    assert (advantages[:, seed % 5] == 0).all()
    np.testing.assert_allclose(
        np.delete(advantages, seed % 5, axis=1), combine(rewards, weights, estimator, combination), atol=1e-12
    )


@every_combination
@every_estimator
def test_groups_with_one_sample_or_none(combination, estimator):
    rewards = random_rewards(3)
    rewards[0, 1:] = np.nan
    rewards[1] = np.nan
    rewards[2, 0] = 1.0  # so that ranks differ
    advantages = combine(rewards, np.array([0.5, 0.3, 0.2]), estimator, combination)
    assert np.isfinite(advantages).all()
    assert (advantages[0, 1:] == 0).all()
    assert (advantages[1] == 0).all()
    assert advantages[2].any()
    assert (combine(np.full_like(rewards, np.nan), np.ones(3) / 3, estimator, combination) == 0).all()


@every_combination
@every_estimator
def test_rewards_that_are_all_equal_say_nothing(combination, estimator):
    rewards = np.broadcast_to(np.array([0.2, 1.0, 0.0]), (2, 3, 3)).copy()
    np.testing.assert_allclose(combine(rewards, np.array([0.5, 0.3, 0.2]), estimator, combination), 0, atol=1e-9)


def test_reinforce_standardises_over_the_batch():
    # r_1 = 1 1 0 0, r_2 = 0 1 0 1 over the batch: both have mean .5 and std .57735, so z = +-.5 / (.57735 + 1e-4)
    # w = (.5, .5): sums (0, z, -z, 0), std z sqrt(2/3), so +-z / (z sqrt(2/3) + 1e-4); over groups, r_1 would be silent
    rewards = np.array([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    z = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    top = z / (z * np.sqrt(2 / 3) + 1e-4)
    advantages = combine(rewards, np.array([0.5, 0.5]), REINFORCE, NORMALIZE)
    np.testing.assert_allclose(advantages, [[0, top], [-top, 0]], atol=1e-12)


# --- in training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", [c.type for c in COMBINATIONS if c not in (SUM, NORMALIZE)])
def test_four_steps_with_each(make_learner, tmp_path, combination):
    learner = make_learner("--evaluation.every=0", f"--combination={combination}")
    learner.train()
    assert learner.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())
    advantages = [row["advantage"] for row in pq.read_table(tmp_path / "run" / "samples").to_pylist()]
    assert len(advantages) == 64
    assert any(advantages)
