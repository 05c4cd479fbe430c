"""Intervals of what a front is worth: coverage and bias in simulations whose truth is known, and by hand."""

import numpy as np
import pytest

from align.fronts.indicators import hypervolumes, nondominated_rows
from align.fronts.statistics import Yardstick, fronts_of, noise_bias, resampled_means, seed_interval
from tests.front_world import SEEDS_MATTER, World, coverage

# --- by hand ----------------------------------------------------------------------------------------------------------


def test_resampled_means_leave_missing_values_out():
    values = np.array([[[0.0], [1.0], [np.nan]], [[0.5], [0.5], [0.5]], [[np.nan]] * 3])
    means = resampled_means(values, 50)
    assert means.shape == (51, 3, 1)
    assert means[0, :2, 0].tolist() == [0.5, 0.5]
    assert np.isnan(means[:, 2]).all()  # nothing was measured
    assert (means[:, 1] == 0.5).all()
    assert np.isfinite(means[:, 0]).all()
    assert 0 < means[1:, 0].std() < 0.5


def test_a_resample_is_the_same_for_all_policies():
    values = np.random.default_rng(0).random((1, 20, 1)) + np.array([0.0, 1.0])[:, None, None]
    means = resampled_means(values, 10)
    assert means[:, 1] - means[:, 0] == pytest.approx(np.ones((11, 1)))


def test_interval_by_hand():
    # one run: 1.96 sd of the resamples. Three runs 0, 1, 2 without any noise of prompts: 1 +- 4.303 * 1 / sqrt(3)
    resampled = np.random.default_rng(0).normal(1, 0.1, (4001, 1))
    resampled[0] = 1.0
    one = seed_interval(resampled, prompts=10_000)
    assert (one.low, one.high) == pytest.approx((1 - 0.196, 1 + 0.196), abs=0.01)
    three = seed_interval(np.tile([0.0, 1.0, 2.0], (100, 1)), prompts=100)
    assert (three.mean, three.high - 1) == pytest.approx((1, 4.303 / 3**0.5), rel=1e-3)


def test_noise_bias_is_exact_for_what_is_linear_or_quadratic_in_the_noise():
    # an indicator 5 + f(s) is asked for at s = 1, then twice at 2^(1/2) and at 2; f(1) is its bias
    def measured(values):
        table = iter(values)
        return lambda means_BMK: np.array([next(table) for _ in means_BMK])

    means = np.zeros((3, 1, 1))
    for bias in (lambda s: s, lambda s: s * s, lambda s: 0.3 * s - 2 * s * s):
        known = [5 + bias(1), *[5 + bias(2**0.5)] * 2, *[5 + bias(2)] * 2]
        assert noise_bias(measured(known), means) == pytest.approx(bias(1))


def test_one_prompt_has_no_interval():
    interval = seed_interval(np.ones((3, 2)), prompts=1)
    assert interval.mean == 1
    assert np.isnan(interval.low)


# --- a world whose truth is known -------------------------------------------------------------------------------------


def test_intervals_cover_what_further_runs_are_worth():
    """Three and five runs of two methods, below the front of a third: 95 % intervals hold the truth in 93 to 97 %."""
    shares = coverage(SEEDS_MATTER, np.random.default_rng(0), repetitions=1000, resamples=80)
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def test_a_front_chosen_on_validation_is_unbiased_on_test_and_one_chosen_on_test_is_not():
    """Forty policies that differ by less than their noise; biases of the hypervolume and of the vectors of the front."""
    world, rng, repetitions = World((8,), (0.7,), spread=0.03, prompts=50), np.random.default_rng(1), 1000
    rows = []
    for _ in range(repetitions):
        draw = world.draw(rng)
        yardstick = draw.yardstick(60)
        bias, test_MK = yardstick.selection_bias(), yardstick.test_BMK[0]
        validated, tested = yardstick.front_M, nondominated_rows(test_MK)
        volume = [float(hypervolumes(draw.truth_MK[None, rows_M], np.zeros(2))[0]) for rows_M in (validated, tested)]
        errors = [(test_MK - draw.truth_MK)[rows_M].mean() for rows_M in (validated, tested)]
        honest, optimistic = bias["hypervolume_on_validation"] - volume[0], bias["hypervolume_on_test"] - volume[1]
        rows.append((*errors, honest, optimistic, bias["bias"]))
    means, errors = np.mean(rows, axis=0), np.std(rows, axis=0) / repetitions**0.5
    vector_honest, vector_optimistic, honest, optimistic, estimated = means
    assert abs(vector_honest) < 3 * errors[0]
    assert vector_optimistic > 10 * errors[1]
    assert abs(honest) < 0.15 * optimistic
    assert estimated == pytest.approx(optimistic, rel=0.25)


def test_drawing_three_seeds_with_replacement_does_not_cover():
    """Why seeds are not resampled: the plain percentile interval of three runs misses the truth far too often."""
    rng = np.random.default_rng(0)
    runs_NR = rng.normal(size=(2000, 3))
    means_NB = np.stack([runs_NR[:, rng.integers(0, 3, 3)].mean(axis=1) for _ in range(400)], axis=1)
    low_N, high_N = np.quantile(means_NB, [0.025, 0.975], axis=1)
    assert ((low_N < 0) & (high_N > 0)).mean() < 0.85
    ours = [seed_interval(np.tile(runs_R, (3, 1)), 1000) for runs_R in runs_NR]
    assert np.mean([i.low < 0 < i.high for i in ours]) == pytest.approx(0.95, abs=0.015)


def test_dominance_is_the_share_of_resamples_and_pairs_of_runs():
    values = np.random.default_rng(0).random((4, 30, 2))
    values[0] += 2  # run 0 of method 0 is better than all; the others are noise
    yardstick = Yardstick(values.mean(axis=1), resampled_means(values, 100), 30, np.zeros(2))
    methods = [[np.array([0]), np.array([1])], [np.array([2, 3])]]
    found = yardstick.dominance(methods)
    fronts = [fronts_of(yardstick.validation_MK, method) for method in methods]

    def better(a, b, means):
        covers = [all(any((means[p] >= means[q]).all() for p in x) for q in y) for x, y in ((a, b), (b, a))]
        return covers[0] and not covers[1]

    means_BMK = yardstick.test_BMK[1:]
    expected = np.mean([[better(a, b, means) for means in means_BMK] for a in fronts[0] for b in fronts[1]])
    assert found[0, 1] == pytest.approx(expected)
    assert 0.5 <= found[0, 1] < 1
    assert found[1, 1] == 0  # a run does not dominate itself
