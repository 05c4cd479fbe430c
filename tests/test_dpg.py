"""Distributional policy gradient: by hand, by properties, and against an enumerated model and autograd."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from align.config.advantages import DpgEstimator
from align.control import ControlError, ControlState, control, fit_control, unreached
from align.dpg import divergences, dpg_advantages, jackknifed_moments, log_means, log_target, normalised, policy_moments
from align.selftrain.tilt import TiltError, fit_tilt
from rewards.types import Missing, Objective
from tests.test_tilt import DOUBLED, GIVEN, HAS_C, LENGTH, divergence

FEATURES = np.column_stack([HAS_C, LENGTH])
COEFFICIENTS = np.array([1.3, -0.4])
COUNT = len(GIVEN)
UNIFORM = np.full((1, COUNT), -math.log(COUNT))  # a proposal under which each string, once, is the whole expectation


def policy(seed: int = 0) -> np.ndarray:
    """Some other distribution over the strings."""
    p = GIVEN * np.exp(np.random.default_rng(seed).normal(0, 0.5, COUNT))
    return p / p.sum()


def enumerated(holds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p over all strings, by exact sums, and log(P / q) of each."""
    unnormalised = GIVEN * np.exp(FEATURES @ COEFFICIENTS) * holds
    log_p = log_target(np.log(GIVEN)[None], FEATURES[None], COEFFICIENTS, holds[None])
    return unnormalised / unnormalised.sum(), log_p - UNIFORM


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_weights_and_advantages_by_hand():
    # q = a, lambda = ln 3, phi = 1, 0, 0, 0: P/q = 3, 1, 1, 1, Z = 6/4, w = 2, 2/3, 2/3, 2/3; r = pi/q = 1, 1, 1/2, 1
    log_weights = log_target(
        np.zeros((1, 4)), np.array([[[1.0], [0], [0], [0]]]), np.array([math.log(3)]), np.full((1, 4), True)
    )
    assert log_means(log_weights) == pytest.approx([math.log(1.5)])
    log_w = normalised(log_weights, log_means(log_weights))
    log_r = np.log([[1, 1, 0.5, 1]])
    assert dpg_advantages(log_w, log_r, True, 10) == pytest.approx(np.array([[1, -1 / 3, 1 / 6, -1 / 3]]))
    assert dpg_advantages(log_w, log_r, False, 10) == pytest.approx(np.array([[2, 2 / 3, 2 / 3, 2 / 3]]))
    assert dpg_advantages(log_w, log_r, False, 1.5) == pytest.approx(np.array([[1.5, 2 / 3, 2 / 3, 2 / 3]]))
    # q = pi: KL = mean w ln w = (2 ln 2 + 3 * 2/3 ln(2/3)) / 4 = 0.143841; TV = (1 + 3 * 1/3) / 8 = 1/4; ess = 1 / (4/3)
    figures = divergences(log_w, np.zeros((1, 4)), np.array([[1.0, 0, 0, 0]]))
    assert figures["kl_target_policy"] == pytest.approx(0.1438410)
    assert figures["kl_target_proposal"] == pytest.approx(0.1438410)
    assert figures["tv"] == pytest.approx(0.25)
    assert figures["ess"] == pytest.approx(0.75)
    assert figures["kl_policy_reference"] == pytest.approx(0.25)
    assert policy_moments(np.array([[[1.0], [0], [0], [0]]]), log_r) == pytest.approx([1 / 3.5])


@pytest.mark.parametrize("holds", [np.full(COUNT, True), DOUBLED == 0], ids=["moments", "hybrid"])
def test_estimates_are_those_of_the_enumerated_distribution(holds):
    p, log_weights = enumerated(holds)
    pi = policy()
    log_normaliser = log_means(log_weights)
    assert log_normaliser == pytest.approx([math.log((GIVEN * np.exp(FEATURES @ COEFFICIENTS) * holds).sum())])
    log_w, log_r = normalised(log_weights, log_normaliser), np.log(pi)[None] - UNIFORM
    assert np.exp(log_w[0] + UNIFORM[0]) == pytest.approx(p)
    figures = divergences(log_w, log_r, np.log(pi / GIVEN)[None])
    inside = p > 0
    assert figures["kl_target_policy"] == pytest.approx(divergence(p[inside], pi[inside]))
    assert figures["kl_target_proposal"] == pytest.approx(divergence(p[inside], np.exp(UNIFORM[0, inside])))
    assert figures["tv"] == pytest.approx(0.5 * np.abs(p - pi).sum())
    assert figures["kl_policy_reference"] == pytest.approx(divergence(pi, GIVEN))
    assert policy_moments(FEATURES[None], log_r) == pytest.approx(pi @ FEATURES)


@pytest.mark.parametrize("baseline", [True, False])
def test_the_expected_step_is_down_the_gradient_of_the_forward_divergence(baseline):
    p, log_weights = enumerated(DOUBLED == 0)
    theta = torch.tensor(np.log(policy()), requires_grad=True)
    log_pi = theta.log_softmax(0)
    target = torch.tensor(p)
    kl = torch.where(target > 0, target * (torch.log(target.clamp(min=1e-300)) - log_pi), 0.0).sum()
    wanted = torch.autograd.grad(kl, theta, retain_graph=True)[0]
    log_r = log_pi.detach().numpy()[None] - UNIFORM
    advantages = dpg_advantages(normalised(log_weights, log_means(log_weights)), log_r, baseline, np.inf)
    ours = torch.autograd.grad(-(torch.tensor(advantages[0]) * log_pi).mean(), theta)[0]
    assert ours.numpy() == pytest.approx(wanted.numpy(), abs=1e-12)


rows = st.lists(st.floats(-5, 5), min_size=2, max_size=6)


@given(rows, st.floats(-50, 50), st.randoms())
def test_a_prompts_advantages_ignore_the_scale_of_its_target_and_the_order_of_its_samples(log_weights, shift, random):
    log_weights = np.array([log_weights])
    order = random.sample(range(log_weights.shape[1]), log_weights.shape[1])

    def advantages(logs):
        return dpg_advantages(normalised(logs, log_means(logs)), np.zeros(logs.shape), True, np.inf)

    assert advantages(log_weights + shift) == pytest.approx(advantages(log_weights), abs=1e-9)
    assert advantages(log_weights[:, order]) == pytest.approx(advantages(log_weights)[:, order], abs=1e-12)
    assert advantages(log_weights).sum() == pytest.approx(0, abs=1e-9)  # w has mean one
    log_w = normalised(log_weights, log_means(log_weights))
    assert min(divergences(log_w, np.zeros(log_w.shape), log_w)[key] for key in ("kl_target_policy", "tv")) >= -1e-12


def test_at_the_target_nothing_moves():
    p, _ = enumerated(np.full(COUNT, True))
    few = np.log(p[:7])[None] + 3.7  # any few samples of q = pi = p: all weights are equal
    log_weights = few - np.log(p[:7])
    assert dpg_advantages(normalised(log_weights, log_means(log_weights)), np.zeros((1, 7)), True, 10) == pytest.approx(0)


def test_nothing_overflows_and_what_is_left_out_or_unknown_has_no_advantage():
    logs = np.array([[900.0, 899.0, np.nan], [-np.inf, -np.inf, np.nan], [-900.0, -np.inf, -900.0], [np.nan] * 3])
    log_z = log_means(logs)
    assert log_z[[0, 2]] == pytest.approx([900 + math.log((1 + math.exp(-1)) / 2), -900 + math.log(2 / 3)])
    assert np.isneginf(log_z[[1, 3]]).all()
    log_w = normalised(logs, log_z)
    advantages = dpg_advantages(log_w, np.where(np.isnan(logs), np.nan, 0.0), True, 10)
    assert advantages[[1, 3]].tolist() == [[0, 0, 0]] * 2
    assert advantages[2] == pytest.approx([0.5, -1, 0.5])
    assert advantages[0, 2] == 0
    assert all(math.isfinite(value) for value in divergences(log_w, np.zeros(logs.shape), np.zeros(logs.shape)).values())
    nothing = divergences(log_w[1:2], np.zeros((1, 3)), np.zeros((1, 3)))
    assert all(math.isnan(value) for value in nothing.values())


# --- the tilt with a normaliser for each prompt -----------------------------------------------------------------------


def test_groups_keep_their_shares_by_hand():
    # Two prompts: 1 of 4 samples has the feature, 3 of 4 have it; wanted 3/4 on average. With odds e^lambda = t:
    # t / (t + 3) + 3 t / (3 t + 1) = 3/2  <=>  3 t^2 - 10 t - 9 = 0  <=>  t = (5 + sqrt 52) / 3 = 4.070367
    features = np.array([1.0, 0, 0, 0, 1, 1, 1, 0])[:, None]
    groups = np.repeat([7, 3], 4)
    tilt = fit_tilt(features, [0.75], groups_N=groups)
    t = (5 + math.sqrt(52)) / 3
    assert tilt.coefficients_F == pytest.approx([math.log(t)])
    assert [tilt.weights_N[groups == g].sum() for g in (7, 3)] == pytest.approx([4, 4])
    assert tilt.log_normaliser == pytest.approx((math.log((t + 3) / 4) + math.log((3 * t + 1) / 4)) / 2)
    pooled = fit_tilt(features, [0.75])
    assert pooled.coefficients_F == pytest.approx([math.log(3)])  # odds 1 become 3, and the second prompt grows


def test_the_jackknife_by_hand():
    # w = 2, 1, 1 and phi = 1, 0, 0: m = 1/2; without each sample 0, 2/3, 2/3; 3 * 1/2 - 2 * 4/9 = 11/18. One alone: 5
    weights, features = np.array([2.0, 1, 1, 9]), np.array([1.0, 0, 0, 5])[:, None]
    assert jackknifed_moments(weights, features, np.array([4, 4, 4, 1])) == pytest.approx([(11 / 18 + 5) / 2])


def test_small_groups_do_not_bend_the_fit():
    """Rates that differ from prompt to prompt, 8 samples each: the plain fit overshoots, the jackknifed one does not."""
    rng, plain, ours = np.random.default_rng(3), [], []
    every_rate = rng.beta(3, 15, 100_000)

    def truly(coefficient):
        tilted = every_rate * np.exp(coefficient)
        return (tilted / (tilted + 1 - every_rate)).mean()

    for _ in range(5):
        raw = (rng.random((256, 8)) < rng.beta(3, 15, (256, 1))).astype(float)[:, :, None]
        plain.append(truly(fit_tilt(raw.reshape(-1, 1), [0.5], groups_N=np.repeat(np.arange(256), 8)).coefficients_F[0]))
        ours.append(truly(fit_control(estimator(moments={"style": 0.5}), OBJECTIVES[:1], raw)[0].coefficients[0]))
    assert np.mean(plain) > 0.58
    assert np.mean(ours) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_fit_of_tiny_groups_settles_near_the_enumerated_tilt(group):
    """Of 0.4 of a feature, whose rate is 0.26, and a mean length of 3: all but two samples alone go straight there."""
    rng = np.random.default_rng(1)
    raw = FEATURES[rng.choice(COUNT, (512, group), p=GIVEN)]
    objectives = [Objective("c", True, (0.0, 1.0), Missing.FAIL), Objective("length", True, (0.0, 5.0), Missing.FAIL)]
    options = estimator(moments={"c": 0.4, "length": 3.0})
    state, figures = fit_control(options, objectives, raw)
    assert not unreached(options, figures)
    tilted = GIVEN * np.exp(FEATURES @ state.coefficients)
    assert tilted @ FEATURES / tilted.sum() == pytest.approx([0.4, 3.0], abs=0.03)


def test_groups_of_two_by_hand():
    # Half of the groups are (1, 0), the others (0, 0). With odds t = e^lambda m = t / (2 (t + 1)), the means of one sample
    # are 0 or 1: m_J = 2 m - 1/4. Wanted is 0.3: m = 0.275, t / (t + 1) = 0.55, lambda = ln(0.55 / 0.45).
    raw = np.array([[1, 0], [0, 0]] * 5, float)[:, :, None]
    state, figures = fit_control(estimator(moments={"style": 0.3}), OBJECTIVES[:1], raw)
    assert state.coefficients[0] == pytest.approx(math.log(0.55 / 0.45), abs=1e-6)
    assert figures["fit/reached/style"] == pytest.approx(0.3)


def test_one_group_is_the_pool():
    one, pool = (fit_tilt(FEATURES, [0.5, 3.0], np.log(GIVEN), 1e-9, groups) for groups in (np.zeros(COUNT, int), None))
    assert one.coefficients_F.tolist() == pool.coefficients_F.tolist()


def test_a_moment_that_no_prompt_can_move_is_out_of_reach_and_named():
    features = np.array([1.0, 1, 0, 0])[:, None]  # a matter of the prompt alone
    with pytest.raises(
        TiltError, match=r"moment 0.7 of feature mood is out of reach: over 4 samples it lies in \[0.5, 0.5\]"
    ):
        fit_tilt(features, [0.7], groups_N=np.array([0, 0, 1, 1]), names=["mood"])
    with pytest.raises(ValueError, match="groups of shape"):
        fit_tilt(features, [0.7], groups_N=np.array([0, 0, 1]))


# --- what a run remembers ---------------------------------------------------------------------------------------------

OBJECTIVES = [
    Objective("style", True, (0.0, 1.0), Missing.DROP_SAMPLE),
    Objective("length", True, (0.0, 100.0), Missing.FAIL),
    Objective("rude", False, (0.0, 1.0), Missing.FAIL),
]


def raw_values(rng: np.random.Generator, prompts: int = 20, group: int = 50) -> np.ndarray:
    style = rng.random((prompts, group)) < 0.2
    length = rng.integers(1, 100, (prompts, group))
    rude = rng.random((prompts, group)) < 0.3
    return np.stack([style, length, rude], axis=2).astype(float)


def estimator(**options) -> DpgEstimator:
    return DpgEstimator(type="dpg", **options)


def test_the_fit_meets_moments_in_their_units_and_leaves_out_what_does_not_hold():
    raw = raw_values(np.random.default_rng(0), prompts=60)
    raw[0, 0, 0] = np.nan
    options = estimator(moments={"style": 0.5, "length": 40.0}, always=["rude"])
    state, figures = fit_control(options, OBJECTIVES, raw)
    lengths = np.arange(1, 100)
    slope = brentq(lambda c: np.average(lengths, weights=np.exp(c * lengths)) - 40, -1, 1)
    assert state.coefficients[0] == pytest.approx(math.log(4), abs=0.2)  # odds 1 / 4 become 1
    assert state.coefficients[1] == pytest.approx(slope, abs=0.003)
    assert figures["fit/always"] == pytest.approx(0.7, abs=0.03)
    assert figures["fit/reached/length"] == pytest.approx(40.0, abs=1e-2)
    assert ControlState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_fit_says_which_moments_it_has_not_reached():
    """Eight corrections leave a few millionths of what the jackknife finds missing in groups of four."""
    for tolerance, count in ((1e-8, 1), (0.01, 0)):
        options = estimator(moments={"style": 0.6}, fit={"tolerance": tolerance})
        _, figures = fit_control(options, OBJECTIVES[:1], np.array([[1, 1, 1, 0], [1, 0, 0, 0]] * 6, float)[:, :, None])
        reached = figures["fit/reached/style"]
        assert figures["fit/gap/style"] == pytest.approx(abs(reached - 0.6))
        assert unreached(options, figures) == [f"style {reached:.3g} in the place of 0.6"] * count


@pytest.mark.parametrize("normaliser", ["prompt", "batch"])
def test_a_batch_moves_the_policy_towards_the_target_whatever_drew_it(normaliser):
    rng = np.random.default_rng(1)
    options = estimator(moments={"style": 0.5}, always=["rude"], normaliser=normaliser)
    state, _ = fit_control(options, OBJECTIVES, raw_values(rng))
    raw = raw_values(rng, 4, 8)
    raw[1, 2, 0] = np.nan
    log_probs = np.broadcast_to(rng.normal(-20, 3, (4, 8)), (3, 4, 8)).copy()
    after, advantages, figures = control(options, OBJECTIVES, state, raw, log_probs, step=0)
    good = (raw[:, :, 2] == 0) & (raw[:, :, 0] == 1)
    assert (advantages[good] > 0).all()
    assert (advantages[raw[:, :, 2] == 1][raw[:, :, 0][raw[:, :, 2] == 1] >= 0] == -1).all()  # w = 0, less r = 1
    assert advantages[1, 2] == 0
    assert figures["moment/style"] == pytest.approx(np.nanmean(raw[:, :, 0]))
    assert figures["always"] == pytest.approx(1 - raw[:, :, 2][~np.isnan(raw[:, :, 0])].mean())
    assert len(after.window) == 2
    assert after.window[1][1] == 31
    scaled = control(options, OBJECTIVES, state, raw, log_probs - 5.0, step=0)  # the same samples, all rarer by e^-5
    assert scaled[1] == pytest.approx(advantages)


def test_one_normaliser_is_of_the_last_batches_by_their_sizes():
    options = estimator(moments={"style": 0.5}, normaliser="batch", window=2)
    state = ControlState((0.0,), ((5.0, 100), (math.log(2.0), 24)))
    raw, log_probs = np.zeros((1, 8, 3)), np.zeros((3, 1, 8))
    state, advantages, figures = control(options, OBJECTIVES, state, raw, log_probs, step=0)
    # the first leaves the window; (24 * 2 + 8 * 1) / 32 = 1.75, w = 1 / 1.75, A = w - 1
    assert state.window == ((math.log(2.0), 24), (0.0, 8))
    assert figures["log_normaliser"] == pytest.approx(math.log(1.75))
    assert advantages == pytest.approx(1 / 1.75 - 1)


def test_the_proposal_becomes_the_policy_only_when_that_is_nearer():
    options = estimator(moments={"style": 0.5}, proposal="adaptive", every=2)
    state = ControlState((math.log(4),), ((0.0, 8),))
    raw = np.zeros((1, 8, 3))
    raw[0, :2, 0] = 1
    for step, nearer in enumerate([False, False, True, True, False, True]):
        log_r = np.where(raw[0, :, 0] == 1, 0.5, -0.3) * (1 if nearer else -1)
        log_probs = np.stack([log_r, np.zeros(8), np.zeros(8)])[:, None]
        state, _, figures = control(options, OBJECTIVES, state, raw, log_probs, step)
        assert (figures["kl_target_policy"] < figures["kl_target_proposal"]) == nearer
        assert figures["proposal"] == (0 if step < 4 else 4)  # the one that drew this batch
        assert state.batches == (step + 1) % 2
    assert state.proposal == 4  # the last two batches together were no nearer


@pytest.mark.parametrize(
    ("options", "change", "sentence"),
    [
        ({"moments": {"style": 0.5}}, (0, 0.0), "feature style never fires: it is 0 in all 1000 samples"),
        ({"moments": {"length": 99.5}}, (1, 40.0), r"feature length is 40 in all 1000 samples"),
        ({"moments": {"length": 99.5}}, None, r"moment 99.5 of feature length is out of reach: .* lies in \[\d.*, 9\d.*\]"),
        ({"always": ["rude"]}, (2, 1.0), "estimator.always: rude held in none of 1000 samples"),
        ({"always": ["length"]}, None, "'length' had the value .* have to be 0 or 100; put it into estimator.moments"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_had_are_refused(options, change, sentence):
    raw = raw_values(np.random.default_rng(2))
    if change is not None:
        raw[:, :, change[0]] = change[1]
    with pytest.raises(ControlError, match=sentence):
        fit_control(estimator(**options), OBJECTIVES, raw)
