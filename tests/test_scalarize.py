"""Scalarisations per sample: by hand, their properties, and the ranks against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from align import scalarize

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
REWARDS = arrays(np.float64, SHAPES, elements=st.integers(0, 4).map(lambda n: n / 4))


def weights_for(rewards: np.ndarray, seed: int) -> np.ndarray:
    """A point of the simplex; the last of several objectives has weight 0 in every second draw."""
    weights = np.random.default_rng(seed).random(rewards.shape[2]) + 0.1
    if len(weights) > 1 and seed % 2:
        weights[-1] = 0.0
    return weights / weights.sum()


def scalarisations(rewards: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    return [
        scalarize.chebyshev(rewards, weights, 0.05),
        scalarize.product(rewards, weights, 0.1),
        scalarize.pareto_rank(rewards, weights),
    ]


def test_chebyshev_by_hand():
    # w = (.75, .25): w (r - 1) is (-.075, -.2) for (.9, .2) and (-.6, 0) for (.2, 1); minima -.2 and -.6; sums -.275 and -.6
    rewards, weights = np.array([[[0.9, 0.2], [0.2, 1.0]]]), np.array([0.75, 0.25])
    np.testing.assert_allclose(scalarize.chebyshev(rewards, weights, 0.0), [[-0.2, -0.6]])
    np.testing.assert_allclose(scalarize.chebyshev(rewards, weights, 0.1), [[-0.2275, -0.66]])


def test_product_by_hand():
    # least of the batch (.2, .1), less .1: (.1, 0); edges (.1, .1), (.4, .5) | (.9, .3), (.1, .2)
    # equal weights, exponents (1, 1): .01, .2 | .27, .02; w = (.75, .25), exponents (1.5, .5)
    rewards = np.array([[[0.2, 0.1], [0.5, 0.5]], [[1.0, 0.3], [0.2, 0.2]]])
    np.testing.assert_allclose(scalarize.product(rewards, np.array([0.5, 0.5]), 0.1), [[0.01, 0.2], [0.27, 0.02]])
    expected = [[0.1**1.5 * 0.1**0.5, 0.4**1.5 * 0.5**0.5], [0.9**1.5 * 0.3**0.5, 0.1**1.5 * 0.2**0.5]]
    np.testing.assert_allclose(scalarize.product(rewards, np.array([0.75, 0.25]), 0.1), expected)


def test_pareto_rank_by_hand():
    # (1, 0) and (0, 1) dominate nothing of each other and beat the rest; (.5, 0) twice is under (1, 0); (0, 0) is under all
    rewards = np.array([[[1.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]]])
    np.testing.assert_array_equal(scalarize.pareto_rank(rewards, np.array([0.9, 0.1])), [[0, -1, 0, -2, -1]])
    # by the first objective alone: 1, .5, 0, 0, .5
    np.testing.assert_array_equal(scalarize.pareto_rank(rewards, np.array([1.0, 0.0])), [[0, -1, -2, -2, -1]])


def test_ranks_are_of_groups_and_products_of_the_batch():
    rewards, weights = np.array([[[0.5, 0.5], [0.4, 0.4]], [[0.9, 0.9], [1.0, 1.0]]]), np.array([0.5, 0.5])
    np.testing.assert_array_equal(scalarize.pareto_rank(rewards, weights), [[0, -1], [-1, 0]])
    np.testing.assert_allclose(scalarize.product(rewards, weights, 0.1), [[0.2**2, 0.1**2], [0.6**2, 0.7**2]])


def peeled(group: list[list[float]]) -> list[int]:
    """Minus the ranks of a group, by peeling off what nothing that is left dominates."""
    ranks, left, front = {}, set(range(len(group))), 0
    while left:
        best = {i for i in left if not any(dominates(group[j], group[i]) for j in left)}
        ranks |= dict.fromkeys(best, -front)
        left, front = left - best, front + 1
    return [ranks[i] for i in range(len(group))]


def dominates(a: list[float], b: list[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


@given(rewards=REWARDS, seed=st.integers(0, 1000))
def test_every_scalarisation_equals_a_loop(rewards, seed):
    weights = weights_for(rewards, seed)
    used = [k for k, w in enumerate(weights) if w > 0]
    chebyshev, product, ranks = scalarisations(rewards, weights)
    for p, group in enumerate(rewards.tolist()):
        for g, sample in enumerate(group):
            furthest = max(weights[k] * (1 - sample[k]) for k in used)
            total = sum(weights[k] * (1 - sample[k]) for k in used)
            assert chebyshev[p, g] == pytest.approx(-furthest - 0.05 * total)
            logs = [weights[k] * math.log(sample[k] - min(rewards[:, :, k].flat) + 0.1) for k in used]
            assert product[p, g] == pytest.approx(math.exp(len(used) * sum(logs)))
        assert ranks[p].tolist() == peeled([[sample[k] for k in used] for sample in group])


@given(rewards=REWARDS, seed=st.integers(0, 1000))
def test_more_of_an_objective_is_never_less(rewards, seed):
    """One sample gains in one objective; the batch's worst must stay, so it is not the one that gains."""
    weights, rng = weights_for(rewards, seed), np.random.default_rng(seed)
    p, g, k = (int(rng.integers(n)) for n in rewards.shape)
    worst = np.zeros((1, rewards.shape[1], rewards.shape[2]))
    before = np.concatenate([rewards, worst])
    after = before.copy()
    after[p, g, k] += 0.25
    lows, highs = scalarisations(before, weights), scalarisations(after, weights)
    for name, low, high in zip(("chebyshev", "product", "rank"), lows, highs, strict=True):
        if weights[k] == 0:
            assert high[p, g] == low[p, g]
        elif name == "rank":
            assert high[p, g] >= low[p, g]
        else:
            assert high[p, g] > low[p, g]  # the augmentation makes chebyshev strict


@given(rewards=REWARDS, seed=st.integers(0, 1000))
def test_a_weight_of_zero_drops_out(rewards, seed):
    weights = weights_for(rewards, 2 * seed)
    more = np.concatenate([rewards, np.random.default_rng(seed).random((*rewards.shape[:2], 1))], axis=2)
    for one, other in zip(scalarisations(rewards, weights), scalarisations(more, np.append(weights, 0.0)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@given(rewards=REWARDS, seed=st.integers(0, 1000), factor=st.floats(0.1, 10))
def test_a_factor_on_all_weights(rewards, seed, factor):
    weights = weights_for(rewards, seed)
    one, other = scalarisations(rewards, weights), scalarisations(rewards, factor * weights)
    np.testing.assert_allclose(factor * one[0], other[0], atol=1e-12)
    np.testing.assert_allclose(one[1], other[1])
    np.testing.assert_array_equal(one[2], other[2])


@given(rewards=REWARDS, seed=st.integers(0, 1000))
def test_a_sample_that_is_left_out_touches_nothing(rewards, seed):
    weights = weights_for(rewards, seed)
    worse = np.concatenate([rewards, np.full((len(rewards), 1, rewards.shape[2]), np.nan)], axis=1)
    for one, other in zip(scalarisations(rewards, weights), scalarisations(worse, weights), strict=True):
        np.testing.assert_array_equal(one, other[:, :-1])
        assert np.isnan(other[:, -1]).all()


def test_a_batch_that_is_left_out_altogether():
    for rewards in scalarisations(np.full((2, 3, 2), np.nan), np.array([0.5, 0.5])):
        assert np.isnan(rewards).all()
