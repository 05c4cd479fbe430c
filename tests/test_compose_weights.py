"""Weights put together: mean one, the cap, collapse, and the shuffled control."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import brentq

from align.selftrain.weights import compose, effective_share, keep_nearest, shuffled

few = settings(max_examples=40)
RAW = arrays.arrays(float, st.integers(1, 30), elements=st.just(0.0) | st.floats(1e-6, 1e6))


def test_compose_by_hand():
    # product 1, 2, 3, 6, mean 3: divided by 3
    weights = compose([np.array([1.0, 1, 3, 3]), np.array([1.0, 2, 1, 2])], cap=10, least_ess=0.1)
    assert weights.values_n == pytest.approx([1 / 3, 2 / 3, 1, 2])
    assert weights.ess == pytest.approx(144 / (4 * 50))  # (1 + 2 + 3 + 6)^2 / (4 (1 + 4 + 9 + 36))
    assert not weights.collapsed


def test_the_cap_by_hand():
    # 1, 2, 3, 6 with cap 1.5: the largest is capped, the others share 4 - 1.5 = 2.5 as 1 : 2 : 3, none above 1.5
    weights = compose([np.array([1.0, 2, 3, 6])], cap=1.5, least_ess=0)
    assert weights.values_n == pytest.approx([2.5 / 6, 5 / 6, 7.5 / 6, 1.5])
    assert weights.values_n[3] == 1.5  # exactly
    # with cap 1.2: 2.8 shared as 1 : 2 : 3 would give 1.4 to the third; two capped leave 1.6 as 1 : 2
    assert compose([np.array([1.0, 2, 3, 6])], cap=1.2, least_ess=0).values_n == pytest.approx([1.6 / 3, 3.2 / 3, 1.2, 1.2])
    assert compose([np.array([1.0, 2, 3, 6])], cap=1, least_ess=0).values_n == pytest.approx(np.ones(4))


@pytest.mark.parametrize(
    ("raw", "cap", "least", "ess"),
    [
        ([0.0, 0.0, 0.0], 5.0, 0.0, 0.0),
        ([1.0, 0.0, 0.0, 0.0], 5.0, 0.3, 0.25),  # one of four counts
        ([1.0, 0.0, 0.0, 0.0], 3.0, 0.0, 0.25),  # the one at its cap of 3 brings the mean to 3/4
        ([8.0, 1.0, 1.0], math.inf, 0.6, 100 / (3 * 66)),
    ],
)
def test_weights_that_collapse_become_uniform_and_say_so(raw, cap, least, ess):
    weights = compose([np.array(raw)], cap, least)
    assert weights.collapsed
    assert (weights.values_n == 1).all()
    assert weights.ess == pytest.approx(ess)


def test_the_fewest_that_reach_a_mean_of_one_do_not_collapse():
    weights = compose([np.array([1.0, 0.0, 0.0, 0.0])], 4.0, 0.25)
    assert weights.values_n.tolist() == [4, 0, 0, 0]
    assert not weights.collapsed


@few
@given(RAW, st.floats(1, 20))
def test_composed_weights_have_mean_one_and_the_cap(raw, cap):
    weights = compose([raw], cap, 0.0)
    assert weights.values_n.mean() == pytest.approx(1, abs=1e-9)
    assert (weights.values_n <= cap).all()
    assert 0 <= weights.ess <= 1
    assert weights.collapsed == ((raw > 0).sum() * cap < len(raw) * (1 - 1e-9))
    if weights.collapsed:
        return
    assert weights.ess == pytest.approx(weights.values_n.sum() ** 2 / (len(raw) * (weights.values_n**2).sum()))
    assert weights.ess >= 1 / len(raw) - 1e-12
    below = (weights.values_n < cap * (1 - 1e-9)) & (raw > 0)
    if below.any():  # one scale for all of these
        scales = weights.values_n[below] / raw[below]
        assert scales == pytest.approx(np.full(below.sum(), scales[0]), rel=1e-6)


@few
@given(RAW, st.floats(1.01, 20))
def test_the_scale_agrees_with_a_search_for_it(raw, cap):
    assume((raw > 0).sum() * cap > 1.001 * len(raw))
    unit = raw / raw.max()
    smallest = unit[unit > 0].min()
    scale = brentq(
        lambda log_s: np.minimum(np.exp(log_s) * unit, cap).mean() - 1, -1, math.log(cap / smallest) + 1, xtol=1e-13
    )
    assert compose([raw], cap, 0.0).values_n == pytest.approx(np.minimum(math.exp(scale) * unit, cap), rel=1e-8, abs=1e-10)


@few
@given(RAW, st.floats(1, 20), st.integers(0, 99), st.floats(1e-200, 1e200))
def test_neither_order_nor_scale_of_a_factor_matters(raw, cap, seed, factor):
    other = np.random.default_rng(seed + 1).random(len(raw))
    weights = compose([raw, other], cap, 0.1)
    order = np.random.default_rng(seed).permutation(len(raw))
    permuted = compose([raw[order], other[order]], cap, 0.1)
    assert (permuted.values_n == weights.values_n[order]).all()
    assert (permuted.ess, permuted.collapsed) == (weights.ess, weights.collapsed)
    scaled = compose([raw, factor * other], cap, 0.1)
    assert scaled.ess == pytest.approx(weights.ess)
    if abs(weights.ess - 0.1) > 1e-6:
        assert scaled.values_n == pytest.approx(weights.values_n, abs=1e-9)


def test_products_beyond_double_precision():
    tiny, huge = np.array([1e-300, 2e-300]), np.array([1e-300, 3e-300])
    assert compose([tiny, huge], 10, 0).values_n == pytest.approx([2 / 7, 12 / 7])
    assert compose([1 / tiny, 1 / huge], 10, 0).values_n == pytest.approx([12 / 7, 2 / 7])


def test_shuffled_weights_are_the_same_ones_elsewhere():
    raw = np.arange(50.0)
    mixed = shuffled(raw, seed=3)
    assert sorted(mixed) == sorted(raw)
    assert (mixed != raw).any()
    assert (shuffled(raw, seed=3) == mixed).all()
    assert (shuffled(raw, seed=4) != mixed).any()
    assert compose([mixed], 1.5, 0).ess == compose([raw], 1.5, 0).ess  # an equal control


def test_effective_share_of_a_filter_is_its_share():
    assert effective_share(keep_nearest(np.arange(1.0, 11), 0.3)) == pytest.approx(0.3)
    assert effective_share(np.full(7, 0.1)) == 1.0
    assert effective_share(np.zeros(7)) == 0.0
