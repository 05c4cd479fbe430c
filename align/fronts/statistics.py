"""What a front of evaluated policies is worth, with intervals over prompts and training seeds. Numpy only.

Every policy is evaluated on the same prompts. Which policies make a front is chosen by their means over the validation
prompts; what the front is worth is measured on the test prompts, which had no part in that choice. Two things are
random: the test prompts, shared by all policies, and the training seeds, of which a method has few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.stats import t as student

from align.fronts.indicators import (
    additive_epsilon,
    expected_utility,
    hypervolumes,
    igd_plus,
    nondominated_rows,
    sets_that_cover,
    weight_vectors,
)

RESAMPLES = 400  # of the test prompts
LEVEL = 0.95  # of intervals
INDICATORS = ("hypervolume", "igd_plus", "epsilon", "expected_utility")


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval; NaN where there is none."""

    mean: float
    low: float
    high: float


def resampled_means(values_MPK: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Means over prompts (1 + B, M, K): first of all prompts, then of B resamples of them, drawn with replacement.

    A resample is the same for all policies and objectives, for they were evaluated on the same prompts: what is easy for all
    then does not count as a difference. Missing values (NaN) are left out; a resample that has none but these gets the mean
    of all prompts, and that is NaN where nothing could be measured.
    """
    policies, prompts, objectives = values_MPK.shape
    counts_BP = _counts(prompts, resamples)
    columns_PC = values_MPK.transpose(1, 0, 2).reshape(prompts, policies * objectives)
    present_PC = np.isfinite(columns_PC)
    sums_BC, numbers_BC = counts_BP @ np.where(present_PC, columns_PC, 0.0), counts_BP @ present_PC
    means_BC = np.divide(sums_BC, numbers_BC, out=np.full(sums_BC.shape, np.nan), where=numbers_BC > 0)
    means_BC = np.where(np.isnan(means_BC), means_BC[:1], means_BC)
    return means_BC.reshape(len(counts_BP), policies, objectives)


@lru_cache(4)
def _counts(prompts: int, resamples: int) -> np.ndarray:
    """How often each prompt counts (1 + B, P).

    Balanced: all resamples together have every prompt equally often, so that their mean has no noise of its own in what is
    linear (Davison, Hinkley and Schechtman 1986).
    """
    drawn_BP = np.random.default_rng(0).permutation(np.arange(resamples * prompts) % prompts).reshape(resamples, prompts)
    counts_BP = np.zeros((resamples, prompts))
    np.add.at(counts_BP, (np.arange(resamples)[:, None], drawn_BP), 1.0)
    return np.concatenate([np.ones((1, prompts)), counts_BP])


# --- intervals --------------------------------------------------------------------------------------------------------


def noise_bias(measure: Callable[[np.ndarray], np.ndarray], means_BMK: np.ndarray) -> float:
    """How far an indicator is too large because means are noisy: simulation extrapolation (Cook & Stefanski 1994).

    With noise of standard deviation s the expectation is h + a s + b s^2: the linear part comes from points that tie, and
    the quadratic one from curvature. It is known at s (the estimate itself), 2^(1/2) s (the resamples), and 2 s (resamples
    whose deviations are multiplied by 3^(1/2)), and the parabola through the three is followed back to s = 0.
    """
    noisier_BMK = means_BMK[:1] + 3**0.5 * (means_BMK[1:] - means_BMK[:1])
    estimate, *resampled = measure(means_BMK)
    first, second = np.mean(resampled) - estimate, np.mean(measure(noisier_BMK)) - estimate
    return float((4 + 3 * 2**0.5) * first - (1 + 2**0.5) * second)


def seed_interval(estimates_BR: np.ndarray, prompts: int, bias: float = 0.0) -> Interval:
    """Estimate and interval of what a method is worth on average, over training seeds and prompts alike.

    T = mean over r of h_r, less its bias. Its variance has two parts. V_P = var over b of mean over r of h_rb is due to the
    prompts, which all runs share. V_S = max(0, s^2 - w^2) / R is due to the seeds: s^2 = var over r of h_r, and w^2 is what
    the prompts alone would make of it, the variance over b of what a run deviates from the others. The interval is
    T +- q sqrt(V_P + V_S), where q is the quantile of |cos(a) X + sin(a) Y|, tan(a)^2 = V_S / V_P, X and Y from Student's t
    with P - 1 and R - 1 degrees of freedom (Behrens 1929; Fisher 1935). Prompts are resampled; seeds are not: three of them,
    drawn with replacement, are far too alike, while the variance of such a bootstrap of their mean, and its correction
    R / (R - 1), are known in closed form. With one run the interval is about the prompts alone. With two its
    coverage is less sure than with three and more.

    Args:
        estimates_BR: An indicator of each of R runs: first of all prompts, then of each of B resamples.
        prompts: P.
        bias: Known bias of T.
    """
    estimate_R, resampled_BR = estimates_BR[0], estimates_BR[1:]
    runs, means_B = len(estimate_R), resampled_BR.mean(axis=1)
    if not np.isfinite(estimates_BR).all() or prompts < 2:
        return Interval(float(estimate_R.mean()), np.nan, np.nan)
    mean = float(estimate_R.mean()) - bias
    by_prompts = means_B.var(ddof=1) * prompts / (prompts - 1)
    by_seeds = 0.0
    if runs > 1:
        within = (resampled_BR - means_B[:, None]).var(axis=0, ddof=1).sum() / (runs - 1)
        by_seeds = max(0.0, estimate_R.var(ddof=1) - within) / runs
    angle = float(np.arctan2(np.sqrt(by_seeds), np.sqrt(by_prompts)))
    half = np.sqrt(by_prompts + by_seeds) * _behrens_fisher(runs - 1, prompts - 1, angle)
    return Interval(mean, mean - half, mean + half)


def _behrens_fisher(seeds: int, prompts: int, angle: float) -> float:
    """Quantile of |cos(angle) X + sin(angle) Y|, Y and X from Student's t with so many degrees of freedom."""
    return float(np.interp(angle, *_quantiles(max(seeds, 1), prompts)))


@lru_cache
def _quantiles(seeds: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles, and the quantile at each."""
    levels = (np.arange(200) + 0.5) / 200
    x, y = student.ppf(levels, prompts), student.ppf(levels, seeds)
    angles = np.linspace(0, np.pi / 2, 33)
    quantiles = [np.quantile(np.abs(np.add.outer(np.cos(a) * x, np.sin(a) * y)), LEVEL) for a in angles]
    quantiles[0], quantiles[-1] = (student.ppf((1 + LEVEL) / 2, n) for n in (prompts, seeds))
    return angles, np.array(quantiles)


# --- methods ----------------------------------------------------------------------------------------------------------


def fronts_of(validation_MK: np.ndarray, runs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each run (the indices of its points) those that no other point of it dominates on the validation prompts."""
    return [rows_M[nondominated_rows(validation_MK[rows_M])] for rows_M in runs]


@dataclass(frozen=True)
class Yardstick:
    """What all methods are measured by.

    Args:
        validation_MK: Means over the validation prompts, scaled; finite.
        test_BMK: Means over the test prompts, scaled, of all of them and of resamples; finite.
        prompts: Number of test prompts.
        reference_K: Reference point of the hypervolume, scaled.
    """

    validation_MK: np.ndarray
    test_BMK: np.ndarray
    prompts: int
    reference_K: np.ndarray

    @cached_property
    def front_M(self) -> np.ndarray:
        """Indices of the front of all points, chosen on validation; IGD+ and epsilon are measured from it."""
        return nondominated_rows(self.validation_MK)

    @cached_property
    def targets_BZK(self) -> np.ndarray:
        """The vectors of that front on test."""
        return self.test_BMK[:, self.front_M]

    def indicators(self, runs: Sequence[np.ndarray]) -> dict[str, Interval]:
        """Every indicator of a method: the mean over its runs, each a set of points (their indices).

        Of each run the points count that are not dominated on validation, with their vectors on test. Everything else
        that an indicator chooses is chosen on validation too, so that none but the hypervolume has a bias to take away. IGD+
        and epsilon are measured from the front found here, taken as given but for the noise of its vectors: for a method
        that makes up that front itself they are about its runs at hand, not about others of other seeds.
        """
        validation_MK, test_BMK = self.validation_MK, self.test_BMK
        targets_ZK, targets_BZK = validation_MK[self.front_M], self.targets_BZK
        weights_WK, none_B0K = _weights(validation_MK.shape[1]), test_BMK[:, :0]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in INDICATORS}
        biases = []
        for rows_M in fronts_of(validation_MK, runs):
            chosen_MK, points_BMK = validation_MK[rows_M], test_BMK[:, rows_M]
            columns["hypervolume"].append(self.volumes(points_BMK))
            biases.append(noise_bias(self.volumes, points_BMK))
            columns["igd_plus"].append(igd_plus(chosen_MK, targets_ZK).of(points_BMK, targets_BZK))
            columns["epsilon"].append(additive_epsilon(chosen_MK, targets_ZK).of(points_BMK, targets_BZK))
            columns["expected_utility"].append(expected_utility(chosen_MK, weights_WK).of(points_BMK, none_B0K))
        bias = {"hypervolume": float(np.mean(biases))}
        return {
            name: seed_interval(np.stack(runs_B, axis=1), self.prompts, bias.get(name, 0.0))
            for name, runs_B in columns.items()
        }

    def volumes(self, points_BMK: np.ndarray) -> np.ndarray:
        """Hypervolumes (B,) above the reference point."""
        return hypervolumes(points_BMK, self.reference_K)

    def dominance(self, methods: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """Probability (A, A) that a run of one method dominates a run of another: training seeds and prompts drawn anew.

        A run dominates another where its front is better than the other's (`sets_that_cover`): the share of resamples of
        the prompts and pairs of runs in which it is.
        """
        runs = [front_M for method in methods for front_M in fronts_of(self.validation_MK, method)]
        method_R = np.repeat(np.arange(len(methods)), [len(method) for method in methods])
        sets_M = np.repeat(np.arange(len(runs)), [len(front_M) for front_M in runs])
        covers_BRR = sets_that_cover(self.test_BMK[1:, np.concatenate(runs)], sets_M)
        better_RR = (covers_BRR & ~covers_BRR.transpose(0, 2, 1)).mean(axis=0)
        member_AR = np.equal.outer(np.arange(len(methods)), method_R) / np.bincount(method_R)[:, None]
        return member_AR @ better_RR @ member_AR.T

    def selection_bias(self) -> dict[str, float]:
        """What choosing the front on the test prompts would have added to its hypervolume.

        Returns:
            `hypervolume_on_validation`: on test, of the front chosen on validation, less the bias of noise.
            `hypervolume_on_test`: on test, of the front chosen on test, as it would have been reported. `bias`: estimate of
            how far the latter is too large, ((a - b) + (c - d)) / 2, where a and b are on test, of the fronts chosen on
            test and on validation, and c and d are on validation, of those chosen on validation and on test: the two sets
            of prompts change places, so that it cancels out which is the easier. The bias of b is added.
        """
        validation_MK, test_MK = self.validation_MK, self.test_BMK[0]
        by_validation_M, by_test_M = self.front_M, nondominated_rows(test_MK)

        (a, b), (d, c) = (
            [float(self.volumes(vectors_MK[None, rows_M])[0]) for rows_M in (by_test_M, by_validation_M)]
            for vectors_MK in (test_MK, validation_MK)
        )
        inflation = noise_bias(self.volumes, self.test_BMK[:, by_validation_M])
        bias = ((a - b) + (c - d)) / 2 + inflation
        return {"hypervolume_on_validation": b - inflation, "hypervolume_on_test": a, "bias": bias}


@lru_cache
def _weights(objectives: int) -> np.ndarray:
    return weight_vectors(objectives)
