"""Rank tests against all permutations and against scipy."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.stats import kendalltau, mannwhitneyu

from align.hacking import HALF, WINDOW
from align.rank_tests import shift_limit, shift_score, trend_limit, trend_score


def test_scores_by_hand():
    assert trend_score([1, 3, 2, 2]) == 3 - 2  # rising: 1 3, 1 2, 1 2; falling: 3 2, 3 2; the two 2 are neither
    assert shift_score([1, 2], [2, 3, 0]) == (1 + 0) + (1 + 1) - (1 + 1)


@pytest.mark.parametrize("n", [2, 5, 6])
def test_limit_of_the_trend_is_that_of_all_orders(n):
    scores = np.array([trend_score(order) for order in permutations(range(n))])
    for level in (0.5, 0.2, 0.05, 0.01, 1 / math.factorial(n)):
        limit = trend_limit(n, level * (1 + 1e-9))
        assert (scores >= limit).mean() <= level * (1 + 1e-9)
        assert math.isinf(limit) or (scores >= limit - 2).mean() > level


@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 1), (3, 3), (2, 5), (4, 4)])
def test_limit_of_the_shift_is_that_of_all_choices(n, m):
    chosen = list(combinations(range(n + m), n))
    scores = np.array([shift_score(early, [i for i in range(n + m) if i not in early]) for early in chosen])
    for level in (0.5, 0.2, 0.1, 0.01):
        limit = shift_limit(n, m, level)
        assert (scores >= limit).mean() <= level
        assert math.isinf(limit) or (scores >= limit - 2).mean() > level


def test_limits_are_scipys_where_nobody_can_list_all_orders():
    """P(score >= limit) <= level < P(score >= limit - 2), with scipy's exact chances."""
    for level in (1e-2, 1e-5):
        for values, limit in ((order_with(trend_limit(WINDOW, level)), 0), (order_with(trend_limit(WINDOW, level) - 2), 1)):
            p = kendalltau(range(WINDOW), values, method="exact", alternative="greater").pvalue
            assert (p > level) == limit
        scores = {
            score: halves_with(score) for score in (shift_limit(HALF, HALF, level), shift_limit(HALF, HALF, level) - 2)
        }
        p, q = (mannwhitneyu(late, early, method="exact", alternative="greater").pvalue for early, late in scores.values())
        assert p <= level < q


def order_with(score: float) -> list[int]:
    """An order of WINDOW numbers with a given S: neighbours are exchanged until it is there, each for 2 less."""
    order, swaps = list(range(WINDOW)), (WINDOW * (WINDOW - 1) // 2 - int(score)) // 2
    for end in range(WINDOW - 1, 0, -1):
        for i in range(end):
            if swaps:
                order[i], order[i + 1], swaps = order[i + 1], order[i], swaps - 1
    assert trend_score(order) == score
    return order


def halves_with(score: float) -> tuple[list[float], list[float]]:
    """HALF numbers below HALF others, of which so many are moved down, each past one of the first for 2 less."""
    early, late, swaps = [float(i) for i in range(HALF)], [], (HALF * HALF - int(score)) // 2
    for j in range(HALF):
        passed = min(swaps, HALF)
        late.append(HALF - passed - 0.5 + j / 100)
        swaps -= passed
    assert shift_score(early, late) == score
    return early, late


def test_too_few_numbers_are_never_significant():
    assert math.isinf(trend_limit(8, 1e-5))  # 1 / 8! = 2.5e-5
    assert trend_limit(9, 1e-5) == 36
    assert math.isinf(trend_limit(1, 0.4))
