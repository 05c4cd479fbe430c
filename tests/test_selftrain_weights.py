"""Weights of samples: by hand, by properties, against other ways to the same numbers, and on bad input."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import rel_entr, softmax

from align.selftrain.weights import (
    answer_entropy,
    compose,
    distribution_shift,
    dual_step,
    effective_share,
    entropy_weights,
    importance_weights,
    keep_nearest,
    loss_weights,
    shuffled,
    trajectory_weights,
)

LN2 = math.log(2)
few = settings(max_examples=40)


def vectors(low: float, high: float, least: int = 1):
    return arrays.arrays(float, st.integers(least, 30), elements=st.floats(low, high, allow_subnormal=False))


LOSSES = vectors(1e-3, 50.0)
ANSWERS = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=20)


# --- entropy of answers -----------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    assert answer_entropy(["5", "5", "7", "7"]) == 1.0  # two halves: one bit
    assert answer_entropy(["5", "5", "7", None]) == pytest.approx(1.5)  # 1/2 * 1 + 2 * 1/4 * 2
    assert answer_entropy([None, None]) == 0.0  # of one mind, if not about an answer
    assert all(answer_entropy(["5"] * n) == 0.0 for n in range(1, 50))  # without rounding
    # shares 3/4, 1/4: 2 - 3/4 log2 3 = 0.811278
    assert answer_entropy(["5", "7", "5", "5"]) == pytest.approx(0.8112781)


@few
@given(ANSWERS)
def test_entropy_agrees_with_another_way(answers):
    shares = np.array(list(Counter(answers).values())) / len(answers)
    divergence = rel_entr(shares, np.full(len(shares), 1 / len(shares))).sum() / LN2  # from uniform over the clusters
    assert answer_entropy(answers) == pytest.approx(math.log2(len(shares)) - divergence, abs=1e-12)


@few
@given(ANSWERS, st.randoms(use_true_random=False))
def test_entropy_knows_neither_order_nor_names(answers, random):
    mixed = random.sample(answers, len(answers))
    assert answer_entropy(mixed) == answer_entropy(answers)
    assert answer_entropy([f"answer {answer}" for answer in answers]) == answer_entropy(answers)
    assert 0 <= answer_entropy(answers) <= math.log2(len(answers)) + 1e-12


@pytest.mark.parametrize(("clusters", "n"), [(2, 8), (3, 16), (4, 8)])
def test_the_bias_of_few_samples_is_as_stated(clusters, n):
    """Of a uniform distribution: (m - 1) / (2 n ln 2) bits too low."""
    generator = np.random.default_rng(0)
    draws = [list(map(str, row)) for row in generator.integers(0, clusters, (8000, n))]
    bias = np.mean([answer_entropy(draw) for draw in draws]) - math.log2(clusters)
    assert bias == pytest.approx(-(clusters - 1) / (2 * n * LN2), rel=0.2)


def test_entropy_weights_by_hand():
    assert entropy_weights([1.0, 2.0, 0.0], 2) == pytest.approx([1, 4, 0])
    assert entropy_weights([1.0, 2.0, 0.0], -1) == pytest.approx([1, 0.5, 0])  # infinity is no weight
    assert entropy_weights([1.0, 2.0, 0.0], 0) == pytest.approx([1, 1, 1])
    for power in (-1, 0.5, 2):
        assert entropy_weights([0.0, 0.0], power) == pytest.approx([1, 1])  # one answer cluster everywhere


@few
@given(vectors(0.01, 5.0), st.floats(-3, 3))
def test_entropy_weights_keep_or_turn_the_order(entropies, power):
    order = np.sign(np.subtract.outer(entropies, entropies))
    weights = entropy_weights(entropies, power)
    ratios = np.subtract.outer(np.log(weights), np.log(weights))
    expected = power * np.subtract.outer(np.log(entropies), np.log(entropies))
    assert ratios == pytest.approx(expected, abs=1e-9)
    if abs(power) > 0.01:
        far = np.abs(expected) > 1e-6
        assert (np.sign(ratios) == np.sign(power) * order)[far].all()


@few
@given(vectors(0.0, 5.0))
def test_power_0_is_uniform(entropies):
    assert (entropy_weights(entropies, 0) == 1).all()


@few
@given(vectors(0.01, 5.0), st.sampled_from([-2, 0.5, 3]), st.floats(0.1, 10))
def test_the_unit_of_entropy_cancels(entropies, power, unit):
    one, other = (compose([entropy_weights(unit * entropies, power)], 3.0, 0.0) for unit in (1.0, unit))
    assert one.values_n == pytest.approx(other.values_n)


def test_a_mean_of_one_is_the_papers():
    """f(h_i) = h_i^a N / sum_k h_k^a, where no cap is met."""
    entropies = np.array([0.5, 1.0, 1.5, 2.0])
    for power in (-2, -0.5, 0.5, 1, 3):
        expected = entropies**power * 4 / (entropies**power).sum()
        assert compose([entropy_weights(entropies, power)], math.inf, 0.0).values_n == pytest.approx(expected)


# --- distance from trusted samples ------------------------------------------------------------------------------------


def test_distribution_shift_by_hand():
    # mean of the trusted: (1 + 3) / 2 = 2; w' = 2, 1, 1/2, 4
    assert distribution_shift([1.0, 2.0, 4.0, 0.5], [1.0, 3.0]) == pytest.approx([2, 1, 2, 4])
    assert importance_weights([1.0, 2.0, 4.0, 0.5], [1.0, 3.0], cap=3.0) == pytest.approx([2, 1, 0.5, 3])


def test_losses_of_0_are_furthest_from_others_and_nearest_to_themselves():
    assert distribution_shift([0.0, 1.0], [1.0]).tolist() == [math.inf, 1.0]
    assert distribution_shift([0.0, 1.0], [0.0]).tolist() == [1.0, math.inf]
    assert importance_weights([0.0, 1.0], [1.0], cap=2.0).tolist() == [2.0, 1.0]
    assert importance_weights([0.0, 1.0], [0.0], cap=2.0).tolist() == [1.0, 0.0]
    assert distribution_shift([-1e-7, 1.0], [1.0])[0] == math.inf  # a log-probability of 0, less rounding
    assert keep_nearest(np.array([math.inf, 1.0, 2.0]), 0.6).tolist() == [0, 1, 1]


@few
@given(LOSSES, LOSSES)
def test_distribution_shift_is_distance_of_logarithms(losses, trusted):
    extent = distribution_shift(losses, trusted)
    assert extent == pytest.approx(np.exp(np.abs(np.log(losses) - math.log(trusted.mean()))))
    assert (extent >= 1).all()
    assert distribution_shift(7 * losses, 7 * trusted) == pytest.approx(extent)  # so the unit cancels
    expected = np.clip(trusted.mean() / losses, 0, 2.5)
    assert importance_weights(losses, trusted, cap=2.5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("extent", "share", "kept"),
    [
        ([3, 1, 2, 4], 0.5, [0, 1, 1, 0]),
        ([3, 1, 2, 4], 0.51, [1, 1, 1, 0]),
        ([3, 1, 2, 4], 1.0, [1, 1, 1, 1]),
        ([3, 1, 2, 4], 0.01, [0, 1, 0, 0]),  # one at least
        ([2, 1, 2, 2], 0.5, [1, 1, 1, 1]),  # ties with the last that is kept are kept
    ],
)
def test_the_rank_filter_by_hand(extent, share, kept):
    assert keep_nearest(np.array(extent), share).tolist() == kept


def test_the_rank_filter_does_not_round_a_share_up():
    assert keep_nearest(np.arange(1.0, 101), 0.07).sum() == 7  # 0.07 * 100 = 7.000000000000001


@few
@given(vectors(1.0, 9.0), st.integers(1, 100))
def test_the_rank_filter_keeps_the_share(extent, percent):
    kept = keep_nearest(extent, percent / 100) == 1
    wanted = -(-percent * len(extent) // 100)
    assert kept.sum() >= wanted
    assert (extent < extent[kept].max()).sum() < wanted  # without those that tie it is less
    assert not (~kept).any() or extent[~kept].min() > extent[kept].max()


# --- losses and returns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scores"),
    [
        # losses 1, 2, 3, 5: h = 2 (l - 1) / 4 - 1 = -1, -.5, 0, 1
        ("lin_upper", [0, 0.5, 1, 1]),
        ("quadratic", [0, 0.75, 1, 0]),
        ("extremes", [1, 0.5, 0, 1]),
    ],
)
def test_loss_weights_by_hand(shape, scores):
    expected = 4 * np.exp(np.array(scores) / 0.5) / np.exp(np.array(scores) / 0.5).sum()
    assert loss_weights([1.0, 2.0, 3.0, 5.0], shape, 0.5) == pytest.approx(expected)


def test_trajectory_weights_by_hand():
    # returns 2, 4, 3: 0, 1, .5; divided by .25: 0, 4, 2
    total = 1 + math.exp(4) + math.exp(2)
    expected = [3 / total, 3 * math.exp(4) / total, 3 * math.exp(2) / total]
    assert trajectory_weights([2.0, 4.0, 3.0], 0.25) == pytest.approx(expected)


SOFT = {
    "lin_upper": lambda values, temperature: loss_weights(values, "lin_upper", temperature),
    "quadratic": lambda values, temperature: loss_weights(values, "quadratic", temperature),
    "extremes": lambda values, temperature: loss_weights(values, "extremes", temperature),
    "trajectory": trajectory_weights,
}


@pytest.mark.parametrize("kind", SOFT)
@few
@given(values=vectors(-100.0, 100.0), temperature=st.floats(0.05, 10), shift=st.floats(-10, 10))
def test_softmax_weights(kind, values, temperature, shift):
    weights = SOFT[kind](values, temperature)
    assert weights.mean() == pytest.approx(1)
    assert (weights >= 0).all()
    assert SOFT[kind](values, 1e9) == pytest.approx(np.ones_like(values))
    assert (SOFT[kind](values, math.inf) == 1).all()
    assert (SOFT[kind](np.full_like(values, shift), temperature) == 1).all()  # all equal
    if np.ptp(values) > 1e-3:  # neither place nor unit matters
        assert SOFT[kind](3 * values + shift, temperature) == pytest.approx(weights, rel=1e-6, abs=1e-9)
        unit = (values - values.min()) / np.ptp(values)
        if kind == "trajectory":
            assert weights == pytest.approx(len(values) * softmax(unit / temperature))


def test_a_temperature_near_0_takes_the_best_alone():
    assert trajectory_weights([1.0, 3.0, 2.0], 1e-300).tolist() == [0, 3, 0]


# --- multipliers ------------------------------------------------------------------------------------------------------


def test_a_dual_step_by_hand():
    # .5 + .1 (2 - 1) = .6;  .5 + .1 (0 - 1) = .4;  0 + .1 (.5 - 1) < 0
    assert dual_step([0.5, 0.5, 0.0], [2.0, 0.0, 0.5], 1.0, 0.1) == pytest.approx([0.6, 0.4, 0])
    # with a leak of 2: .5 + .1 (2 - 1 - 1) = .5;  .5 + .1 (0 - 1 - 1) = .3
    assert dual_step([0.5, 0.5, 0.0], [2.0, 0.0, 0.5], 1.0, 0.1, 2.0) == pytest.approx([0.5, 0.3, 0])


@few
@given(vectors(0.0, 5.0), st.floats(-2, 2), st.floats(0.01, 2), st.floats(0, 0.9))
def test_multipliers_are_never_below_0_and_follow_the_violation(duals, threshold, rate, leak):
    losses = np.linspace(-3, 3, len(duals))
    after = dual_step(duals, losses, threshold, rate, leak)
    assert (after >= 0).all()
    plain = dual_step(duals, losses, threshold, rate)
    assert (plain[losses > threshold] >= duals[losses > threshold]).all()
    assert (plain[losses <= threshold] <= duals[losses <= threshold]).all()
    assert (after <= plain).all()


def test_the_leak_bounds_what_cannot_be_met_and_nothing_else_does():
    leaky, plain = np.zeros(2), np.zeros(2)
    for _ in range(500):
        leaky, plain = dual_step(leaky, [3.0, 0.0], 1.0, 0.1, 0.5), dual_step(plain, [3.0, 0.0], 1.0, 0.1)
    assert leaky == pytest.approx([(3 - 1) / 0.5, 0])  # where d + rate (l - t - leak d) = d
    assert plain == pytest.approx([500 * 0.1 * 2, 0])


def test_multipliers_solve_a_program():
    """min (x - 2)^2 subject to x^2 <= 1 has x = 1 and, from 2 (x - 2) + 2 d x = 0, the multiplier d = 1."""
    dual = np.zeros(1)
    for _ in range(2000):
        x = 2 / (1 + dual[0])  # where the Lagrangian is least
        dual = dual_step(dual, [x**2], threshold=1.0, rate=0.05)
    assert dual == pytest.approx([1.0], abs=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------

ONES = [1.0, 1.0]
OF_LOSSES = {
    "distribution_shift": lambda losses: distribution_shift(losses, ONES),
    "trusted": lambda losses: distribution_shift(ONES, losses),
    "keep_nearest": lambda losses: keep_nearest(losses, 0.5),
    "importance_weights": lambda losses: importance_weights(losses, ONES, 2.0),
    "loss_weights": lambda losses: loss_weights(losses, "quadratic", 1.0),
    "trajectory_weights": lambda losses: trajectory_weights(losses, 1.0),
    "dual_step": lambda losses: dual_step(np.ones(len(losses)), losses, 1.0, 0.1),
    "entropy_weights": lambda losses: entropy_weights(losses, 1.0),
    "compose": lambda losses: compose([losses], 2.0, 0.1),
    "shuffled": lambda losses: shuffled(losses, 0),
    "effective_share": effective_share,
}


@pytest.mark.parametrize("kind", OF_LOSSES)
def test_nothing_and_what_is_no_number_are_refused(kind):
    with pytest.raises(ValueError, match="at least one sample"):
        OF_LOSSES[kind](np.array([]))
    with pytest.raises(ValueError, match="number 1 of 3 is nan, which is no finite number"):
        OF_LOSSES[kind](np.array([1.0, math.nan, 2.0]))
    with pytest.raises(ValueError, match="number 2 of 3 is -inf"):
        OF_LOSSES[kind](np.array([1.0, 1.0, -math.inf]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: answer_entropy([]), "no answers"),
        (lambda: entropy_weights([1.0, -0.1], 1), "number 1 of 2 is -0.1, which is no finite number of 0 or more"),
        (lambda: entropy_weights(ONES, math.nan), "power of entropy weights is nan"),
        (lambda: entropy_weights([0.1, 2.0], 5000), "to the power of 5000"),
        (lambda: entropy_weights([0.1, 0.2], 5000), "to the power of 5000"),
        (lambda: distribution_shift([-0.1], ONES), "losses .nats per token.: number 0 of 1 is -0.1"),
        (lambda: distribution_shift(ONES, []), "losses of trusted samples .* at least one"),
        (lambda: importance_weights(ONES, ONES, 0), "cap of importance weights is 0"),
        (lambda: keep_nearest(ONES, 0), "share of samples to keep is 0"),
        (lambda: keep_nearest(ONES, 1.1), "share of samples to keep is 1.1"),
        (lambda: loss_weights(ONES, "upper", 1), "shape 'upper'; there are: lin_upper, quadratic, extremes"),
        (lambda: loss_weights(ONES, "extremes", 0), "temperature of weights is 0"),
        (lambda: trajectory_weights(ONES, math.nan), "temperature of weights is nan"),
        (lambda: trajectory_weights([-1.5e308, 1.5e308], 1), "further apart"),
        (lambda: dual_step(ONES, [1.0], 1, 0.1), "2 multipliers and 1 losses"),
        (lambda: dual_step([-1.0], [1.0], 1, 0.1), "multipliers: number 0 of 1 is -1"),
        (lambda: dual_step(ONES, ONES, 1, 10, 1), "rate 10 and leak 1 does not settle"),
        (lambda: dual_step(ONES, ONES, math.nan, 0.1), "threshold nan"),
        (lambda: compose([], 2, 0), "no weights to compose"),
        (lambda: compose([np.ones(2), np.ones(3)], 2, 0), "2 weights and 3 other weights"),
        (lambda: compose([np.ones(2)], 0.5, 0), "cap of 1 or more, not 0.5"),
        (lambda: compose([np.ones(2)], 2, 1.5), "not 1.5"),
        (lambda: compose([np.array([1.0, -1.0])], 2, 0), "number 1 of 2 is -1"),
        (lambda: compose([np.ones((2, 2))], 2, 0), r"shape \(2, 2\)"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
