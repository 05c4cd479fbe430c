"""Every scheme on numbers small enough to follow with a pencil; the arithmetic is in the comments."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from align.config import WeightingConfig
from align.weighting import Observation, Signal, build_scheme
from align.weighting.covariance import covariances
from align.weighting.gradient import cosines, influence, min_norm
from rewards.types import Missing, Objective

OBJECTIVES = [
    Objective("a", True, (0.0, 1.0), Missing.NEUTRAL),
    Objective("b", False, (0.0, 10.0), Missing.NEUTRAL),  # 4 raw is .6 scaled
]


def scheme_of(**options):
    return build_scheme(TypeAdapter(WeightingConfig).validate_python(options))


def see(step: int = 0, rewards=None, **signals) -> Observation:
    rewards = np.zeros((1, 2, 2)) if rewards is None else np.array(rewards, dtype=float)
    return Observation(step, rewards, {Signal(name): np.array(value, dtype=float) for name, value in signals.items()})


# --- hypervolume ------------------------------------------------------------------------------------------------------


def hypervolume_scales(points, **options) -> list[float]:
    scheme = scheme_of(**{"type": "hypervolume", "reference": "initial", **options})
    state, scales = scheme.init(OBJECTIVES), []
    for count in range(1, len(points) + 1):
        state = scheme.update(state, see(count, validation=points[:count]))
        scales.append(state.step_scale)
    return scales


def test_hypervolume_scale_with_the_initial_policy_as_reference():
    # reference (.2, .3). (.4, .5): box .2 * .2 = .04, grown by .04 -> .5 + 1.5 tanh(.04 / .1)
    # (.3, .9): its box .1 * .6 = .06, of which .1 * .2 = .02 is there already -> grown by .04 again
    # (.3, .4): dominated, grown by 0 -> .5
    points = [[0.2, 0.3], [0.4, 0.5], [0.3, 0.9], [0.3, 0.4]]
    grown = 0.5 + 1.5 * math.tanh(0.4)
    assert hypervolume_scales(points, scale=0.1) == pytest.approx([1.0, grown, grown, 0.5])


def test_hypervolume_scale_adapts_to_the_mean_growth():
    # growths .04 and .02 * .5 = .01 ((.4, .5) -> (.42, .8): .22 * .5 = .11, less .04: .07)
    points = [[0.2, 0.3], [0.4, 0.5], [0.42, 0.8]]
    first = 0.5 + 1.5 * math.tanh(0.04 / 0.04)  # the mean of one growth is that growth
    second = 0.5 + 1.5 * math.tanh(0.07 / 0.055)  # (.04 + .07) / 2 = .055
    assert hypervolume_scales(points) == pytest.approx([1.0, first, second])


def test_hypervolume_mean_one_divides_by_the_running_mean():
    points = [[0.2, 0.3], [0.4, 0.5], [0.3, 0.4]]
    grown = 0.5 + 1.5 * math.tanh(0.4)
    assert hypervolume_scales(points, scale=0.1, mean_one=True) == pytest.approx([1.0, 1.0, 0.5 / ((grown + 0.5) / 2)])


def test_hypervolume_reference_in_raw_units():
    # b is minimised with bounds [0, 10]: 8 raw is .2 scaled. (.4, .5) above (0, .2): .4 * .3 = .12; (.5, .5): .5 * .3 = .15
    scales = hypervolume_scales([[0.4, 0.5], [0.5, 0.5]], scale=0.1, reference={"b": 8.0})
    assert scales == pytest.approx([1.0, 0.5 + 1.5 * math.tanh(0.3)])


def test_hypervolume_published_placement_scales_the_weights():
    scheme = scheme_of(type="hypervolume", scale=0.1, reference="initial", placement="rewards", weights={"a": 3, "b": 1})
    state = scheme.init(OBJECTIVES)
    for points in ([[0.2, 0.3]], [[0.2, 0.3], [0.4, 0.5]]):
        state = scheme.update(state, see(validation=points))
    factor = 0.5 + 1.5 * math.tanh(0.4)
    assert state.weights_K == pytest.approx((0.75 * factor, 0.25 * factor))
    assert state.step_scale == 1.0


def test_hypervolume_waits_for_new_vectors_and_survives_none():
    scheme = scheme_of(type="hypervolume", scale=0.1)
    state = scheme.update(scheme.init(OBJECTIVES), see())
    assert state == scheme.init(OBJECTIVES)
    for points in ([[0.2, 0.3]], [[0.2, 0.3], [0.4, 0.5]]):
        state = scheme.update(state, see(validation=points))
    assert scheme.update(state, see(9, validation=[[0.2, 0.3], [0.4, 0.5]])) == state


def test_hypervolume_passes_over_vectors_that_are_not_finite():
    assert hypervolume_scales([[0.2, 0.3], [math.nan, 0.9], [0.4, 0.5]], scale=0.1) == pytest.approx(
        [1.0, 1.0, 0.5 + 1.5 * math.tanh(0.4)]
    )


def test_hypervolume_of_one_objective_is_its_gain():
    scheme = scheme_of(type="hypervolume", scale=0.1, reference="initial")
    state = scheme.init(OBJECTIVES[:1])
    for points in ([[0.2]], [[0.2], [0.5]], [[0.2], [0.5], [0.4]]):
        state = scheme.update(state, see(rewards=np.zeros((1, 2, 1)), validation=points))
        assert state.weights_K == (1.0,)
    assert state.step_scale == 0.5
    assert state.memory["volume"] == pytest.approx(0.3)


def test_hypervolume_does_not_count_what_is_only_watched():
    # the first objective grows from .2 to .6, the second one, without a share, becomes worse: grown by .4
    points = [[0.2, 0.9], [0.6, 0.1]]
    assert hypervolume_scales(points, scale=1.0, weights={"a": 1, "b": 0}) == pytest.approx(
        [1.0, 0.5 + 1.5 * math.tanh(0.4)]
    )


def test_hypervolume_says_when_its_reference_is_never_left_behind():
    scheme = scheme_of(type="hypervolume", reference={"a": 0.9})
    state = scheme.init(OBJECTIVES)
    points = [[0.5, 0.5], [0.6, 0.6], [0.7, 0.7], [0.8, 0.8], [0.85, 0.9]]
    remarks = []
    for count in range(1, len(points) + 1):
        state = scheme.update(state, see(validation=points[:count]))
        remarks.append(len(state.remarks))
    assert remarks == [0, 0, 0, 1, 1]
    assert "weighting.reference" in state.remarks[0]
    assert state.step_scale == 0.5


# --- hypervolume_gradient ---------------------------------------------------------------------------------------------


def test_hypervolume_gradient_from_the_worst_bounds():
    # at (.8, .2): derivatives (.2, .8), so the objective that is behind gets .8 of the weight
    scheme = scheme_of(type="hypervolume_gradient")
    assert scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.8, 0.2]])).weights_K == pytest.approx((0.2, 0.8))
    # the prior multiplies: (3 * .2, 1 * .8) / 1.4
    scheme = scheme_of(type="hypervolume_gradient", weights={"a": 3, "b": 1})
    state = scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.8, 0.2]]))
    assert state.weights_K == pytest.approx((0.6 / 1.4, 0.8 / 1.4))


def test_hypervolume_gradient_against_the_archive():
    # v = (.5, .6) between (.2, .9) and (.7, .3): right uncovers .6 - .3 = .3, up uncovers .5 - .2 = .3; with (.7, .4)
    # instead .6 - .4 = .2 and .3 -> (.2, .3) / .5
    scheme = scheme_of(type="hypervolume_gradient", against="archive")
    state = scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.2, 0.9], [0.7, 0.4], [0.5, 0.6]]))
    assert state.weights_K == pytest.approx((0.4, 0.6))
    # v = (.5, .5) behind (.6, .9): nearest way out is .1 to the right, so all weight goes to the first objective
    state = scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.6, 0.9], [0.5, 0.5]]))
    assert state.weights_K == pytest.approx((1.0, 0.0))


def test_hypervolume_gradient_lifts_an_objective_off_its_reference():
    # at (0, .6) the derivatives are (.6, 0): all weight to the one that has nothing yet
    scheme = scheme_of(type="hypervolume_gradient")
    assert scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.0, 0.6]])).weights_K == pytest.approx((1.0, 0.0))


def test_hypervolume_gradient_below_its_reference_goes_back_to_it():
    # the initial policy (.6, .5) is the reference; at (.4, .8) the way back is .2 in the first objective
    scheme = scheme_of(type="hypervolume_gradient", reference="initial")
    state = scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.6, 0.5], [0.4, 0.8]]))
    assert state.weights_K == pytest.approx((1.0, 0.0))


def test_hypervolume_gradient_from_batches_keeps_a_moving_average():
    # batch means (.8, .2), then (.4, .6): average .5 * (.8, .2) + .5 * (.4, .6) = (.6, .4) -> weights (.4, .6)
    scheme = scheme_of(type="hypervolume_gradient", vector="batches", average=0.5)
    state = scheme.update(scheme.init(OBJECTIVES), see(0, [[[0.6, 0.2], [1.0, 0.2]]]))
    assert state.weights_K == pytest.approx((0.2, 0.8))
    state = scheme.update(state, see(1, [[[0.4, 0.6], [0.4, 0.6]]]))
    assert state.weights_K == pytest.approx((0.4, 0.6))
    assert state.memory["vector"] == pytest.approx({"a": 0.6, "b": 0.4})


def test_hypervolume_gradient_passes_over_vectors_that_are_not_finite():
    scheme = scheme_of(type="hypervolume_gradient")
    state = scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.8, 0.2], [math.nan, 0.5]]))
    assert state.weights_K == pytest.approx((0.2, 0.8))


# --- gradient, mgda ---------------------------------------------------------------------------------------------------

GRAM = [[4.0, -1.0], [-1.0, 2.0]]  # g_a = (2, 0), g_b = (-.5, sqrt 1.75)


def test_influence():
    # rows sum to 3 and 1, the mean square is 3
    assert influence(np.array(GRAM), cosine=False, self_term=True) == pytest.approx([1.0, 1 / 3])
    assert influence(np.array(GRAM), cosine=False, self_term=False) == pytest.approx([-1 / 3, -1 / 3])
    cosine = -1 / math.sqrt(8)
    assert influence(np.array(GRAM), cosine=True, self_term=True) == pytest.approx([1 + cosine, 1 + cosine])
    assert influence(np.array(GRAM), cosine=True, self_term=False) == pytest.approx([cosine, cosine])
    assert cosines(np.array([[0.0, 0.0], [0.0, 4.0]])) == pytest.approx(np.array([[0.0, 0.0], [0.0, 1.0]]))


def test_gradient_is_one_step_of_mirror_ascent():
    # w = (.5, .5) * (exp(.3 * 1), exp(.3 / 3)) / Z
    scheme = scheme_of(type="gradient", step_size=0.3)
    state = scheme.update(scheme.init(OBJECTIVES), see(gram=GRAM))
    up, down = math.exp(0.3), math.exp(0.1)
    assert state.weights_K == pytest.approx((up / (up + down), down / (up + down)))
    assert state.memory["influence"] == pytest.approx({"a": 1.0, "b": 1 / 3})
    state = scheme.update(state, see(1, gram=GRAM))  # the next step starts where this one ended
    assert state.weights_K == pytest.approx((up**2 / (up**2 + down**2), down**2 / (up**2 + down**2)))


@pytest.mark.parametrize("cosine", [False, True])
def test_gradient_does_not_see_a_common_scale(cosine):
    scheme = scheme_of(type="gradient", cosine=cosine)
    grams = [scale * np.array(GRAM) for scale in (1e-6, 1, 1e6)]
    weights = [scheme.update(scheme.init(OBJECTIVES), see(gram=gram)).weights_K for gram in grams]
    assert weights[0] == pytest.approx(weights[1])
    assert weights[2] == pytest.approx(weights[1])


def test_mgda_of_two_gradients_has_a_closed_form():
    # w_a = (<g_b, g_b> - <g_a, g_b>) / |g_a - g_b|^2 = (2 + 1) / (4 + 2 + 2) = 3 / 8
    assert min_norm(np.array(GRAM)) == pytest.approx([3 / 8, 5 / 8])
    # <g_b, g_b> < <g_a, g_b>: the shorter one alone
    assert min_norm(np.array([[4.0, 1.5], [1.5, 1.0]])) == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_mgda_worsens_no_objective(seed):
    """The min-norm point d has <g_k, d> >= <d, d> for every k, and it is a minimum over the simplex by brute force."""
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(4, 6))
    gram = gradients @ gradients.T
    weights = min_norm(gram)
    assert (gram @ weights >= weights @ gram @ weights - 1e-6).all()
    others = generator.dirichlet(np.ones(4), 20_000)
    assert weights @ gram @ weights <= np.einsum("nk,kl,nl->n", others, gram, others).min() + 1e-9


# --- batch statistics -------------------------------------------------------------------------------------------------


def test_pama_gives_all_to_the_weakest_positive_advantage():
    # group means (.5, .5); positive parts: a (.5, 0) -> mean .25; b (.1, 0) -> mean .05
    scheme = scheme_of(type="pama")
    state = scheme.update(scheme.init(OBJECTIVES), see(0, [[[1.0, 0.6], [0.0, 0.4]]]))
    assert state.weights_K == (0.0, 1.0)
    assert state.memory["positive_advantage"] == pytest.approx({"a": 0.25, "b": 0.05})


def test_an_objective_that_says_nothing_does_not_take_all_the_weight():
    # a is right everywhere, b differs: the weakest positive advantage would be a's 0, the shortest gradient a's
    scheme = scheme_of(type="pama")
    state = scheme.update(scheme.init(OBJECTIVES), see(0, [[[1.0, 0.6], [1.0, 0.4]]]))
    assert state.weights_K == (0.5, 0.5)
    scheme = scheme_of(type="mgda", weights={"a": 3, "b": 1})
    for gram in ([[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]):
        assert scheme.update(scheme.init(OBJECTIVES), see(gram=gram)).weights_K == pytest.approx((0.75, 0.25))


def test_covariance_by_hand():
    # one group, advantages (1, -1): Cov(a) = ((.5)(1) + (-.5)(-1)) / (2 - 1) = 1; Cov(b) = (.1)(1) + (-.1)(-1) = .2
    rewards = np.ma.masked_invalid([[[1.0, 0.6], [0.0, 0.4]]])
    assert covariances(rewards, np.array([[1.0, -1.0]])) == pytest.approx([1.0, 0.2])
    # target .5: a is past it, b lacks .3: weights (.5, .5 e^(.1 * .3)) / Z
    scheme = scheme_of(type="covariance", rate=0.1, target=0.5, cap=0.9)
    seen = see(0, rewards.data, advantages=[[1.0, -1.0]])
    state = scheme.update(scheme.init(OBJECTIVES), seen)
    grown = math.exp(0.03)
    assert state.weights_K == pytest.approx((1 / (1 + grown), grown / (1 + grown)))
    # the mean of b is .5: with its cap at .5 it gains nothing any more
    scheme = scheme_of(type="covariance", rate=0.1, target=0.5, cap={"a": 0.9, "b": 0.5})
    assert scheme.update(scheme.init(OBJECTIVES), seen).weights_K == pytest.approx((0.5, 0.5))
    # moving average: .75 * .2 + .25 * .6 with covariance .6 in the next batch
    scheme = scheme_of(type="covariance", average=0.75, target=0.5)
    state = scheme.update(scheme.init(OBJECTIVES), seen)
    state = scheme.update(state, replace(see(1, [[[1.0, 0.8], [0.0, 0.2]]], advantages=[[1.0, -1.0]]), step=1))
    assert state.memory["covariance"]["b"] == pytest.approx(0.3)


def test_variation_by_hand():
    # a: 1, 0 -> mean .5, std sqrt(.5); b: .6, .4 -> mean .5, std sqrt(.02) = sqrt(.5) / 5: weights 5 : 1
    scheme = scheme_of(type="variation")
    state = scheme.update(scheme.init(OBJECTIVES), see(0, [[[1.0, 0.6], [0.0, 0.4]]]))
    assert state.weights_K == pytest.approx((5 / 6, 1 / 6))


def test_saturation_by_hand():
    # means (.5, .8): room (.5, .2), squared (.25, .04)
    rewards = [[[1.0, 0.9], [0.0, 0.7]]]
    for gamma, expected in ((1, (5 / 7, 2 / 7)), (2, (25 / 29, 4 / 29)), (0, (0.5, 0.5))):
        scheme = scheme_of(type="saturation", gamma=gamma)
        assert scheme.update(scheme.init(OBJECTIVES), see(0, rewards)).weights_K == pytest.approx(expected)


def test_moving_averages_see_batches_between_two_moves():
    # means of a: .2, .9, .2, .9 with average .5: .2, .55, .375, .6375
    scheme = scheme_of(type="hypervolume_gradient", vector="batches", average=0.5, every=2, warm_up=1)
    state = scheme.init(OBJECTIVES)
    for step, mean in enumerate((0.2, 0.9, 0.2, 0.9)):
        state = scheme.update(state, see(step, [[[mean, 0.5], [mean, 0.5]]]))
    assert state.memory["vector"]["a"] == pytest.approx(0.6375)


def test_the_pull_works_without_a_proposal():
    scheme = scheme_of(type="hypervolume_gradient", pull=0.5, weights={"a": 1, "b": 1})
    state = scheme.update(scheme.init(OBJECTIVES), see(validation=[[0.8, 0.2]]))  # (.2, .8) pulled to (.35, .65)
    state = scheme.update(state, see(1))
    assert state.weights_K == pytest.approx((0.425, 0.575))  # half the way back


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_moves_keep_their_distance_where_batches_serve_several_updates(every):
    """With S = 2 updates a batch a scheme is shown steps 0, 2, 4, ...: it moves at the first one that is late enough."""
    scheme = scheme_of(type="variation", warm_up=1, every=every)
    state, moves = scheme.init(OBJECTIVES), []
    for step in range(0, 20, 2):
        assert scheme.due(state, step) == (step >= 1 and (not moves or step - moves[-1] >= every))
        state = scheme.update(state, see(step, [[[1.0, 0.6], [0.0, 0.4]]]))
        if state.memory["moved"] == [step]:
            moves.append(step)
    assert moves == {1: list(range(2, 20, 2)), 2: list(range(2, 20, 2)), 3: [2, 6, 10, 14, 18], 5: [2, 8, 14]}[every]


def test_the_first_weights_keep_to_the_ceiling():
    assert scheme_of(type="variation", weights={"a": 9, "b": 1}, ceiling=0.6).init(OBJECTIVES).weights_K == pytest.approx(
        (0.6, 0.4)
    )


def test_pull_smoothing_and_floor_in_one_move():
    # proposal (.2, .8); pulled by .5 to (.5, .5): (.35, .65); smoothed by .5 with (.5, .5): (.425, .575); floor .45
    scheme = scheme_of(type="hypervolume_gradient", pull=0.5, smoothing=0.5)
    seen = see(validation=[[0.8, 0.2]])
    assert scheme.update(scheme.init(OBJECTIVES), seen).weights_K == pytest.approx((0.425, 0.575))
    scheme = scheme_of(type="hypervolume_gradient", pull=0.5, smoothing=0.5, floor=0.45)
    assert scheme.update(scheme.init(OBJECTIVES), seen).weights_K == pytest.approx((0.45, 0.55))
