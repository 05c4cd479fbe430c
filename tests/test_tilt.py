"""The tilt of a pool, against a small language model of which every string and its probability are known."""

import itertools
import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from align.selftrain.tilt import TiltError, fit_tilt
from align.selftrain.weights import effective_share

START = {"a": 0.6, "b": 0.3, "c": 0.1}
NEXT = {  # a Markov chain of letters that may stop after each, and stops after the fifth
    "a": {"a": 0.4, "b": 0.2, "c": 0.1, "": 0.3},
    "b": {"a": 0.2, "b": 0.3, "c": 0.1, "": 0.4},
    "c": {"a": 0.1, "b": 0.1, "c": 0.6, "": 0.2},
}
LONGEST = 5


def probability(text: str) -> float:
    total = START[text[0]]
    for letter, follower in itertools.pairwise(text):
        total *= NEXT[letter][follower]
    return total * (NEXT[text[-1]][""] if len(text) < LONGEST else 1.0)


STRINGS = ["".join(letters) for n in range(1, LONGEST + 1) for letters in itertools.product("abc", repeat=n)]  # 363
GIVEN = np.array([probability(text) for text in STRINGS])
HAS_C = np.array([float("c" in text) for text in STRINGS])
LENGTH = np.array([float(len(text)) for text in STRINGS])
DOUBLED = np.array([float(any(x == y for x, y in itertools.pairwise(text))) for text in STRINGS])
ENDS_IN_A = np.array([float(text.endswith("a")) for text in STRINGS])
FEATURES = np.column_stack([HAS_C, LENGTH, DOUBLED, ENDS_IN_A])


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def test_the_model_is_one():
    assert GIVEN.sum() == pytest.approx(1)
    base_rate = float(GIVEN @ HAS_C)
    assert 0.2 < base_rate < 0.3  # far from what the tilts below want


# --- by hand, and against exact sums ----------------------------------------------------------------------------------


def test_a_feature_by_hand():
    # 1 of 4 samples has it, half should: odds 1 / 3 become 1, so lambda = ln 3, w = 2, 2/3, 2/3, 2/3,
    # Z = (3 + 1 + 1 + 1) / 4 = 1.5, KL = ln 3 / 2 - ln 1.5 = 0.143841, ESS = 16 / (4 (4 + 4/3)) = 0.75
    tilt = fit_tilt([[1.0], [0.0], [0.0], [0.0]], [0.5])
    assert tilt.coefficients_F == pytest.approx([math.log(3)])
    assert tilt.weights_N == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    assert tilt.log_normaliser == pytest.approx(math.log(1.5))
    assert tilt.divergence == pytest.approx(0.1438410)
    assert tilt.ess == pytest.approx(0.75)
    assert tilt.moments_F == pytest.approx([0.5])


def test_one_moment_agrees_with_brute_force():
    """All strings, weighted by what the model gives them: lambda by a search on exact sums."""

    def moment(coefficient):
        p = GIVEN * np.exp(coefficient * LENGTH)
        return p @ LENGTH / p.sum()

    coefficient = brentq(lambda c: moment(c) - 3.5, -5, 5, xtol=1e-14)
    unnormalised = GIVEN * np.exp(coefficient * LENGTH)
    exact = unnormalised / unnormalised.sum()
    tilt = fit_tilt(LENGTH[:, None], [3.5], np.log(GIVEN))
    assert tilt.coefficients_F == pytest.approx([coefficient], abs=1e-8)
    assert tilt.weights_N / len(STRINGS) == pytest.approx(exact, abs=1e-10)
    assert tilt.log_normaliser == pytest.approx(math.log(unnormalised.sum()), abs=1e-8)
    assert tilt.divergence == pytest.approx(divergence(exact, GIVEN), abs=1e-8)
    assert tilt.moments_F == pytest.approx([3.5], abs=1e-8)


WANTED = np.array([0.5, 3.2, 0.4, 0.25])


def test_several_moments_agree_with_scipy():
    def lost(coefficients):  # minus the dual, and its gradient, written out
        p = GIVEN * np.exp(FEATURES @ coefficients)
        return math.log(p.sum()) - coefficients @ WANTED, FEATURES.T @ p / p.sum() - WANTED

    found = minimize(lost, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-11})
    tilt = fit_tilt(FEATURES, WANTED, np.log(GIVEN))
    assert tilt.coefficients_F == pytest.approx(found.x, abs=1e-7)
    assert tilt.moments_F == pytest.approx(WANTED, abs=1e-8)
    p = tilt.weights_N / len(STRINGS)
    assert p @ FEATURES == pytest.approx(WANTED, abs=1e-8)
    assert tilt.divergence == pytest.approx(divergence(p, GIVEN), abs=1e-8)
    assert tilt.divergence == pytest.approx(-found.fun, abs=1e-8)  # there is no gap to the dual


def test_no_other_distribution_with_these_moments_is_nearer():
    """Against a solver that looks for the distribution itself and knows nothing of exponentials."""
    some = np.argsort(GIVEN)[-24:]
    given, features, wanted = GIVEN[some] / GIVEN[some].sum(), FEATURES[some][:, :2], [0.4, 2.5]
    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones_like(p)},
        {"type": "eq", "fun": lambda p: p @ features - wanted, "jac": lambda p: features.T},
    ]
    found = minimize(
        lambda p: divergence(p, given), given, jac=lambda p: np.log(p / given) + 1, method="SLSQP",
        bounds=[(1e-9, 1)] * len(given), constraints=constraints, options={"ftol": 1e-13, "maxiter": 500},
    )  # fmt: skip
    tilt = fit_tilt(features, wanted, np.log(given))
    assert tilt.divergence == pytest.approx(found.fun, abs=1e-6)
    assert tilt.weights_N / len(given) == pytest.approx(found.x, abs=1e-4)


@pytest.mark.parametrize("of_another", [False, True])
def test_draws_agree_with_exact_sums_within_their_error(of_another):
    """20,000 draws from the model, and from another one with the ratio as weights."""
    generator = np.random.default_rng(1)
    proposal = GIVEN**0.5 / (GIVEN**0.5).sum() if of_another else GIVEN
    drawn = generator.choice(len(STRINGS), 20_000, p=proposal)
    log_weights = np.log(GIVEN / proposal)[drawn] + 5.0  # up to a constant
    exact = fit_tilt(FEATURES, WANTED, np.log(GIVEN))
    tilt = fit_tilt(FEATURES[drawn], WANTED, log_weights)
    assert tilt.moments_F == pytest.approx(WANTED, abs=1e-8)
    assert tilt.coefficients_F == pytest.approx(exact.coefficients_F, abs=0.15)
    assert tilt.divergence == pytest.approx(exact.divergence, abs=0.03)
    assert tilt.log_normaliser == pytest.approx(exact.log_normaliser, abs=0.15)
    # a moment that was not asked for is that of the exact tilt: how often a string ends in b
    ends = np.array([float(text.endswith("b")) for text in STRINGS])
    expected = exact.weights_N @ ends / len(STRINGS)
    error = math.sqrt(expected * (1 - expected) / (len(drawn) * tilt.ess))
    assert tilt.weights_N @ ends[drawn] / len(drawn) == pytest.approx(expected, abs=4 * error)


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 3))
def test_what_every_tilt_keeps_to(seed, size):
    """Moments that some weights have can be had, with mean one, and in any order and unit."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(60, size)) * generator.lognormal(0, 2, size)
    some = generator.dirichlet(np.ones(60))
    wanted = some @ features
    tilt = fit_tilt(features, wanted)
    assert tilt.weights_N.mean() == pytest.approx(1)
    assert (tilt.weights_N >= 0).all()
    assert (np.abs(tilt.moments_F - wanted) <= 1e-6 * np.ptp(features, axis=0)).all()
    assert tilt.moments_F == pytest.approx(tilt.weights_N @ features / 60)
    assert tilt.ess == pytest.approx(effective_share(tilt.weights_N))
    uniform = np.full(60, 1 / 60)
    assert 0 <= tilt.divergence <= divergence(some, uniform) + 1e-9  # of those with the moments it is the nearest
    # weights are exp(lambda . phi) up to a factor, and Z is the mean of it
    log_powers = features @ tilt.coefficients_F
    assert np.log(tilt.weights_N) == pytest.approx(log_powers - tilt.log_normaliser, abs=1e-8)
    order, unit = generator.permutation(60), generator.lognormal(0, 1, size)
    other = fit_tilt(3 + unit * features[order], 3 + unit * wanted)
    assert other.weights_N == pytest.approx(tilt.weights_N[order], abs=1e-6)
    assert other.coefficients_F * unit == pytest.approx(
        tilt.coefficients_F, rel=1e-4, abs=1e-6 / np.ptp(features, axis=0).min()
    )


def test_moments_that_are_there_already_change_nothing():
    tilt = fit_tilt(FEATURES, GIVEN @ FEATURES, np.log(GIVEN))
    assert tilt.coefficients_F == pytest.approx(np.zeros(4), abs=1e-9)
    assert tilt.weights_N / len(STRINGS) == pytest.approx(GIVEN)
    assert (tilt.divergence, tilt.log_normaliser) == pytest.approx((0, 0), abs=1e-9)


def test_a_constant_on_the_log_weights_changes_nothing():
    one, other = (fit_tilt(FEATURES, WANTED, np.log(GIVEN) + constant) for constant in (0.0, 5000.0))
    for a, b in zip(astuple(one), astuple(other), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_samples_that_do_not_count_do_not():
    features = np.vstack([FEATURES, [[0.0, 99.0, 0.0, 0.0], [math.nan] * 4]])
    log_weights = np.append(np.log(GIVEN), [-math.inf, -math.inf])
    tilt = fit_tilt(features, WANTED, log_weights)
    assert tilt.coefficients_F == pytest.approx(fit_tilt(FEATURES, WANTED, np.log(GIVEN)).coefficients_F)
    assert tilt.weights_N[-2:].tolist() == [0, 0]
    assert tilt.ess == pytest.approx(effective_share(tilt.weights_N))
    assert tilt.weights_N.mean() == pytest.approx(1)


def test_a_feature_that_must_always_hold_comes_as_near_as_the_tolerance():
    """Half with an a at the end, and never a c: the second wants an infinite coefficient."""
    for tolerance in (1e-2, 1e-6):
        tilt = fit_tilt(np.column_stack([ENDS_IN_A, HAS_C]), [0.5, 0.0], np.log(GIVEN), tolerance)
        assert tilt.moments_F == pytest.approx([0.5, 0.0], abs=tolerance)
        assert -math.log(1 / tolerance) - 8 < tilt.coefficients_F[1] < -math.log(1 / tolerance) + 4
    without = GIVEN * (HAS_C == 0)  # where the limit can be had exactly
    exact = fit_tilt(ENDS_IN_A[:, None], [0.5], np.where(without > 0, np.log(GIVEN), -math.inf))
    assert tilt.weights_N == pytest.approx(exact.weights_N, abs=1e-4)
    left_out = -math.log(without.sum())  # KL of the model without c from the model
    assert tilt.divergence == pytest.approx(exact.divergence + left_out, abs=1e-4)


def test_features_that_determine_one_another_are_no_trouble():
    both = np.column_stack([HAS_C, 1 - HAS_C, HAS_C])
    tilt = fit_tilt(both, [0.5, 0.5, 0.5], np.log(GIVEN))
    alone = fit_tilt(HAS_C[:, None], [0.5], np.log(GIVEN))
    assert tilt.weights_N == pytest.approx(alone.weights_N)
    assert tilt.divergence == pytest.approx(alone.divergence)


def test_a_rare_feature_shows_in_the_effective_sample_size():
    rare = np.zeros((1000, 1))
    rare[:3] = 1
    assert fit_tilt(rare, [0.5]).ess == pytest.approx(1 / (1000 * (3 / 6**2 + 997 / 1994**2)))  # weights 1/6 and 1/1994


def test_weights_that_are_worlds_apart_at_first():
    tilt = fit_tilt([[0.0], [1.0]], [0.5], [0.0, -600.0])  # no curvature to speak of where the climb begins
    assert tilt.coefficients_F == pytest.approx([600.0])
    assert tilt.divergence == pytest.approx(300 - math.log(2))  # 1/2 ln(1/2) + 1/2 (ln(1/2) + 600)


def test_features_of_any_unit_far_from_0():
    length = 1e6 + 1e-3 * LENGTH
    tilt = fit_tilt(length[:, None], [1e6 + 3.5e-3], np.log(GIVEN))
    assert tilt.weights_N == pytest.approx(fit_tilt(LENGTH[:, None], [3.5], np.log(GIVEN)).weights_N, rel=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "moments", "message"),
    [
        ([HAS_C, 0 * HAS_C], [0.5, 0.5], "feature 1 never fires: it is 0 in all 363 samples, and no weights make it 0.5"),
        ([HAS_C, 0 * HAS_C + 2], [0.5, 2.0], "feature 1 is 2 in all 363 samples"),
        ([HAS_C, LENGTH], [0.5, 5.5], r"moment 5.5 of feature 1 is out of reach: over 363 samples it lies in \[1, 5\]"),
        ([HAS_C], [-0.1], r"moment -0.1 of feature 0 is out of reach: over 363 samples it lies in \[0, 1\]"),
        # three in four with a c, and three in four without
        ([HAS_C, 1 - HAS_C], [0.75, 0.75], r"moment 0.75 of feature 1 is out of reach together with 0.75 of feature 0: over "
         r"363 samples it then lies in \[0.25, 0.25\]"),
        # a string of one letter has none doubled: 4 in 10 doubled have length 2 at least, so the mean is 1.4 at least
        ([DOUBLED, LENGTH], [0.4, 1.2], r"moment 1.2 of feature 1 .* it then lies in \[1.4, 5\]"),
        ([HAS_C, DOUBLED, LENGTH], [0.5, 0.4, 1.2], r"moment 1.2 of feature 2 .* 0.5 of feature 0, 0.4 of feature 1"),
    ],
)  # fmt: skip
def test_moments_that_cannot_be_had_are_named_with_their_range(features, moments, message):
    with pytest.raises(TiltError, match=message):
        fit_tilt(np.column_stack(features), moments, np.log(GIVEN))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_tilt(np.empty((0, 1)), [0.5]), r"features of shape \(0, 1\)"),
        (lambda: fit_tilt(np.ones((3, 0)), []), r"features of shape \(3, 0\)"),
        (lambda: fit_tilt(np.ones(3), [0.5]), r"features of shape \(3,\)"),
        (lambda: fit_tilt(np.eye(3), [0.5]), r"moments of shape \(1,\)"),
        (lambda: fit_tilt([[0.0], [math.nan]], [0.5]), "finite numbers"),
        (lambda: fit_tilt([[0.0], [1.0]], [math.nan]), "finite numbers"),
        (lambda: fit_tilt([[0.0], [1.0]], [0.5], [0.0]), r"log weights of shape \(1,\) for 2 samples"),
        (lambda: fit_tilt([[0.0], [1.0]], [0.5], [0.0, math.nan]), "log weights must be numbers"),
        (lambda: fit_tilt([[0.0], [1.0]], [0.5], [-math.inf, -math.inf]), "not -infinity for all"),
        (lambda: fit_tilt([[0.0], [1.0]], [0.5], [0.0, -math.inf]), "feature 0 never fires: it is 0 in all 1 samples"),
        (lambda: fit_tilt([[0.0], [1.0]], [0.5], tolerance=0), "tolerance of a tilt is 0"),
    ],
)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
