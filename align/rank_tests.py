"""Rank tests for a trend and for a shift, with exact null distributions: scores, and the limits that they seldom reach.

They assume nothing of the numbers but that, without change, each order of them is as likely as any other. Ties count as
neither order, which brings scores nearer to 0. Mann 1945 and Kendall 1975; Mann and Whitney 1947.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def trend_score(values: Sequence[float]) -> int:
    """S of Mann-Kendall: pairs in rising order less pairs in falling order."""
    x = np.array(values)
    return int(np.triu(np.sign(x[None, :] - x[:, None]), 1).sum())


def shift_score(early: Sequence[float], late: Sequence[float]) -> int:
    """Pairs (early, late) in which the late number is larger, less those in which it is smaller: 2 U - n m."""
    return int(np.sign(np.subtract.outer(np.array(late), np.array(early))).sum())


@lru_cache(maxsize=1024)
def trend_limit(n: int, level: float) -> float:
    """Least S that n exchangeable numbers exceed or reach with a chance of at most `level`; infinite where none is so rare.

    S = n (n - 1) / 2 - 2 I with I inversions of a random permutation, P(I = i) the coefficient of q^i in
    prod_{j=1}^{n} (1 + q + ... + q^{j-1}) / j.
    """
    chance = np.ones(1)
    for j in range(2, n + 1):
        chance = np.convolve(chance, np.full(j, 1 / j))
    return _limit(chance, level)


@lru_cache(maxsize=1024)
def shift_limit(n: int, m: int, level: float) -> float:
    """The same for `shift_score` of n and m numbers.

    P(U = u) is the coefficient of q^u in the Gaussian binomial prod_{i=1}^{n} (1 - q^{m+i}) / (1 - q^i), over its sum.
    """
    count = np.zeros(n * m + 1)  # whole numbers below 2^53 for n + m < 56
    count[0] = 1
    for i in range(1, n + 1):
        count[m + i :] -= count[: -(m + i)].copy()
        for rest in range(i):
            count[rest::i] = np.cumsum(count[rest::i])
    return _limit(count / count.sum(), level)


def _limit(chance: np.ndarray, level: float) -> float:
    """From the chances of M, M - 2, ..., -M."""
    rare = int(np.searchsorted(np.cumsum(chance), level, side="right"))
    return len(chance) - 1 - 2 * (rare - 1) if rare else math.inf
