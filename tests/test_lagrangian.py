"""Constrained optimisation: dual steps by hand, what must hold always, a closed loop, thresholds searched, real runs."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.lagrangian import LagrangianWeighting
from align.weighting import Observation, Signal, WeightState, build_scheme
from rewards.types import Missing, Objective
from tests.conftest import QUICKSTART, read_lines
from tests.test_resume import RUN, assert_equal, kill_at, resume, start

OBJECTIVES = [
    Objective("a", True, (0.0, 1.0), Missing.NEUTRAL),
    Objective("b", False, (0.0, 10.0), Missing.NEUTRAL),  # 4 raw is .6 scaled
    Objective("c", True, (0.0, 1.0), Missing.NEUTRAL),
]
SGD = {"type": "sgd", "rate": 2.0, "momentum": 0.5}
PID = {"type": "pid", "proportional": 2.0, "integral": 0.5, "derivative": 1.0}
both_duals = pytest.mark.parametrize("dual", [SGD, PID], ids=["sgd", "pid"])
M = 1 / (1 + math.exp(-0.1))  # .52498, the sigmoid of .1


def scheme_of(**options):
    return build_scheme(LagrangianWeighting(type="lagrangian", **options))


def see(*means: float, step: int = 0, vectors=()) -> Observation:
    """A batch of two samples with these scaled means; a mean of NaN is an objective that is missing throughout."""
    rewards = np.stack([np.array(means) - 0.05, np.array(means) + 0.05])[None]
    signals = {Signal.VALIDATION: np.array(vectors, dtype=float)} if len(vectors) else {}
    return Observation(step, rewards, signals)


def walk(scheme, observations, objectives=OBJECTIVES) -> list[WeightState]:
    states = [scheme.init(objectives)]
    for observation in observations:
        states.append(scheme.update(states[-1], observation))
    return states[1:]


def latents(states, name: str) -> list[float]:
    return [state.memory["constraints"][name]["latent"] for state in states]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_sgd_with_momentum_for_at_least():
    # theta .6, mean .4 twice: e = .2. l = 0, m' = .25: v = .25 * .2 = .05, l = 2 * .05 = .1.
    # m' = m (1 - m) = .249376: v = .5 * .05 + .249376 * .2 = .0748752, l = .1 + .1497504 = .2497504.
    states = walk(scheme_of(constraints={"a": {"at_least": 0.6}}, optimize="c", dual=SGD), [see(0.4, 0.5, 0.5)] * 2)
    assert latents(states, "a") == pytest.approx([0.1, 0.2497504], abs=1e-7)
    assert states[0].weights_K == pytest.approx((M, 0.0, 1 - M))
    assert states[0].kl_weight == 0.0
    assert states[0].memory["multiplier"] == {"a": pytest.approx(M)}
    assert states[0].memory["violation"] == {"a": pytest.approx(0.2)}


def test_at_most_takes_weight_away_from_the_sum():
    # theta .6, mean .8: e = .8 - .6 = .2, so l = .1 as above. Shares over their mean, (1.5, .9, .6), of 1 - m, less m for a.
    scheme = scheme_of(weights={"a": 5, "b": 3, "c": 2}, constraints={"a": {"at_most": 0.6}}, optimize="all", dual=SGD)
    state = walk(scheme, [see(0.8, 0.5, 0.5)])[0]
    assert state.weights_K == pytest.approx((1.5 * (1 - M) - M, 0.9 * (1 - M), 0.6 * (1 - M)))


def test_equal_pushes_an_overshoot_back():
    # l = 0, m = tanh 0 = 0, m' = 1. theta .6, mean .8: e = -.2, v = -.2, l = -.4, m = -.379949; the KL gets 1 - m.
    state = walk(scheme_of(constraints={"a": {"equal": 0.6}}, dual=SGD), [see(0.8, 0.5, 0.5)])[0]
    assert state.weights_K == pytest.approx((-0.379949, 0.0, 0.0), abs=1e-6)
    assert state.kl_weight == pytest.approx(1.379949, abs=1e-6)
    assert state.memory["violation"] == {"a": pytest.approx(0.2)}


def test_objectives_to_minimise_keep_their_units():
    # b at most 4 is scaled at least .6; a mean of 6 is scaled .4, violated by 2. at least 4 is scaled at most .6.
    state = walk(scheme_of(constraints={"b": {"at_most": 4}}, optimize="c", dual=SGD), [see(0.5, 0.4, 0.5)])[0]
    assert state.weights_K == pytest.approx((0.0, M, 1 - M))
    assert state.memory["threshold"] == {"b": pytest.approx(4)}
    assert state.memory["violation"] == {"b": pytest.approx(2)}
    state = walk(scheme_of(constraints={"b": {"at_least": 4}}, optimize="c", dual=SGD), [see(0.5, 0.8, 0.5)])[0]
    assert state.weights_K == pytest.approx((0.0, -M, 1 - M))  # a mean of 2 is violated by 2
    assert state.memory["violation"] == {"b": pytest.approx(2)}


def test_several_constraints_share_one():
    # m = .52498 for a, and c (theta .5, mean .5, e = 0) stays at .5: KL 1 - (.52498 + .5) / 2, the others halved.
    scheme = scheme_of(constraints={"a": {"at_least": 0.6}, "c": {"at_least": 0.5}}, dual=SGD)
    state = walk(scheme, [see(0.4, 0.5, 0.5)])[0]
    assert state.weights_K == pytest.approx((M / 2, 0.0, 0.25))
    assert state.kl_weight == pytest.approx(1 - M / 2 - 0.25)


def test_pid():
    # e = .2, .3, .1. I = .1, .25, .3. l = I + 2 e + growth: .1 + .4 = .5; .25 + .6 + .1 = .95; .3 + .2 = .5 (growth -.2
    # does not count, but for `equal`: .3).
    observations = [see(mean, 0.5, 0.5) for mean in (0.4, 0.3, 0.5)]
    for kind, last in (("at_least", 0.5), ("equal", 0.3)):
        states = walk(scheme_of(constraints={"a": {kind: 0.6}}, optimize="c", dual=PID), observations)
        assert latents(states, "a") == pytest.approx([0.5, 0.95, last])


def test_moving_average_of_the_batch_means():
    # average .5: .4, then .5 * .4 + .5 * .8 = .6
    scheme = scheme_of(constraints={"a": {"at_least": 0.7}}, optimize="c", average=0.5)
    states = walk(scheme, [see(0.4, 0.5, 0.5), see(0.8, 0.5, 0.5)])
    assert [state.memory["violation"]["a"] for state in states] == pytest.approx([0.3, 0.1])


def test_where_multipliers_start():
    constraints = {"a": {"at_least": 0.6, "multiplier": 0.9}, "b": {"at_most": 4}, "c": {"equal": 0.5}}
    state = scheme_of(constraints=constraints).init(OBJECTIVES)
    assert state.memory["multiplier"] == pytest.approx({"a": 0.9, "b": 0.5, "c": 0.0})
    state = scheme_of(constraints=constraints, multiplier=0.7).init(OBJECTIVES)
    assert state.memory["multiplier"] == pytest.approx({"a": 0.9, "b": 0.7, "c": 0.7})


# --- what is optimised, and initial thresholds ------------------------------------------------------------------------


def test_without_constraints_nothing_may_become_worse():
    scheme = scheme_of(weights={"a": 1, "b": 2, "c": 4})  # c is optimised, a and b are held
    assert scheme.needs == {Signal.VALIDATION}
    before = scheme.update(scheme.init(OBJECTIVES), see(0.1, 0.1, 0.1))
    assert before.weights_K == pytest.approx((0.25, 0.25, 0.5))  # m = .5 twice, which waits for a held-out vector
    assert before.memory["threshold"] == before.memory["violation"] == {}
    nan = math.nan
    after = scheme.update(before, see(0.1, 0.1, 0.1, vectors=[[nan, 0.2, 0.2], [0.3, 0.4, 0.9], [0.9, 0.9, 0.9]]))
    assert after.memory["threshold"] == pytest.approx({"a": 0.3, "b": 6})
    assert after.memory["violation"] == pytest.approx({"a": 0.2, "b": 3})
    assert min(after.memory["multiplier"].values()) > 0.5


def test_watched_objectives_are_not_held():
    assert set(scheme_of(weights={"a": 1, "b": 0, "c": 4}).init(OBJECTIVES).memory["multiplier"]) == {"a"}


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"constraints": {"a": {"equal": 0.6}}}, {Signal.KL}),
        ({"constraints": {"a": {"equal": "initial"}}}, {Signal.KL, Signal.VALIDATION}),
        ({"constraints": {"a": {"at_least": 0.6}}, "optimize": "b"}, set()),
        ({"constraints": {"a": {"at_least": 0.6}}, "optimize": "b", "search": {"gold": "c"}}, {Signal.VALIDATION}),
    ],
)
def test_only_what_is_needed_is_paid_for(options, needs):
    assert scheme_of(**options).needs == needs


# --- what always holds ------------------------------------------------------------------------------------------------

means = st.lists(st.tuples(*[st.floats(0.0, 1.0)] * 3), min_size=1, max_size=12)
TWO = {"a": {"at_least": 0.6}, "b": {"at_most": 4}}  # both keep an objective good


@both_duals
@given(means=means, rate=st.floats(0.1, 50.0))
def test_weights_sum_to_one_and_nothing_vanishes(dual, means, rate):
    dual = dual | ({"rate": rate} if dual is SGD else {"proportional": rate})
    for options in ({}, {"optimize": "c"}):
        for state in walk(scheme_of(constraints=TWO, dual=dual, **options), [see(*m) for m in means]):
            assert sum(state.weights_K) + state.kl_weight == pytest.approx(1)
            assert 0.05 - 1e-9 <= (state.weights_K[2] if options else state.kl_weight) <= 0.95 + 1e-9  # 1 - cap, 1 - floor
            assert min(state.weights_K[:2]) >= 0.025 - 1e-9  # floor / 2


@both_duals
@given(means=means)
def test_the_order_of_objectives_and_constraints_does_not_matter(dual, means):
    straight = walk(scheme_of(constraints=TWO, dual=dual), [see(*m) for m in means])[-1]
    turned = walk(
        scheme_of(constraints=dict(reversed(TWO.items())), dual=dual), [see(*m[::-1]) for m in means], OBJECTIVES[::-1]
    )[-1]
    assert turned.weights_K[::-1] == pytest.approx(straight.weights_K)
    assert turned.kl_weight == pytest.approx(straight.kl_weight)


@both_duals
def test_a_constraint_that_holds_loses_weight_down_to_the_floor(dual):
    states = walk(scheme_of(constraints={"a": {"at_least": 0.6}}, dual=dual), [see(0.9, 0.5, 0.5)] * 300)
    multipliers = [state.memory["multiplier"]["a"] for state in states]
    assert multipliers == sorted(multipliers, reverse=True)
    assert multipliers[-1] == pytest.approx(0.05)
    assert states[-1].memory["multiplier"] == states[-2].memory["multiplier"]
    assert not states[-1].remarks


@both_duals
def test_a_batch_without_values_makes_no_dual_step(dual):
    scheme = scheme_of(constraints={"a": {"at_least": 0.6}, "c": {"at_least": 0.6}}, dual=dual)
    first, second = walk(scheme, [see(0.4, 0.5, 0.4), see(math.nan, 0.5, 0.4)])
    assert second.memory["constraints"]["a"] == first.memory["constraints"]["a"]
    assert second.memory["multiplier"]["c"] > first.memory["multiplier"]["c"]
    alone = walk(scheme, [see(math.nan, 0.5, 0.4)])[0]
    assert set(alone.memory["violation"]) == {"c"}


def test_the_mean_is_that_of_the_values_that_are_there():
    rewards = np.full((1, 4, 3), 0.5)
    rewards[0, :, 0] = [0.2, 0.4, math.nan, math.nan]
    state = walk(scheme_of(constraints={"a": {"at_least": 0.6}}), [Observation(0, rewards, {})])[0]
    assert state.memory["violation"]["a"] == pytest.approx(0.3)


@both_duals
def test_delay(dual):
    scheme = scheme_of(constraints={"a": {"at_least": 0.6}}, dual=dual, delay=3)
    states = walk(scheme, [see(0.4, 0.5, 0.5, step=step) for step in range(5)])
    assert [state.memory["multiplier"]["a"] > 0.5 for state in states] == [False, False, False, True, True]
    assert states[0].memory["violation"]["a"] == pytest.approx(0.2)  # it is watched all the same


@both_duals
def test_a_saved_state_goes_on_as_if_nothing_had_happened(dual):
    constraints = {"a": {"equal": "initial"}, "b": {"equal": "initial"}}
    scheme = scheme_of(constraints=constraints, dual=dual, average=0.3, search={"gold": "c", "steps": 4})
    generator = np.random.default_rng(0)
    vectors = generator.uniform(0.2, 0.8, (40, 3))
    straight = resumed = scheme.init(OBJECTIVES)
    for step in range(40):
        seen = see(*generator.uniform(0.1, 0.9, 3), step=step, vectors=vectors[: 1 + step // 2])
        straight = scheme.update(straight, seen)
        resumed = scheme.update(WeightState.from_json(json.loads(json.dumps(resumed.to_json(), allow_nan=False))), seen)
        assert resumed == straight
        assert resumed.digest() == straight.digest()
    assert straight.memory["search_points"] > 3


# --- a closed loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [{"type": "sgd"}, {"type": "pid"}], ids=["sgd", "pid"])
@pytest.mark.parametrize("constraint", [{"at_least": 0.7}, {"equal": 0.7}, {"equal": 0.4}, {"at_most": 0.4}], ids=str)
def test_a_policy_of_one_number_is_held_at_its_threshold(dual, constraint):
    """x climbs by the weight of a, whose mean is sigmoid(x), and is drawn back to the reference, 0, by that of the KL."""
    scheme, x, seen = scheme_of(constraints={"a": constraint}, dual=dual), 0.0, []
    state = scheme.init(OBJECTIVES)
    for _ in range(600):
        seen.append(1 / (1 + math.exp(-x)))
        state = scheme.update(state, see(seen[-1], 0.5, 0.5))
        x += 0.1 * (state.weights_K[0] - state.kl_weight * x)
    assert seen[-1] == pytest.approx(next(iter(constraint.values())), abs=0.02)
    assert not state.remarks


# --- out of reach -----------------------------------------------------------------------------------------------------


@both_duals
def test_a_threshold_out_of_reach_is_said_once_and_the_kl_stays(dual):
    scheme = scheme_of(constraints={"a": {"at_least": 0.6}}, dual=dual)
    states = walk(scheme, [see(0.2, 0.5, 0.5)] * 300)
    assert states[-1].kl_weight == pytest.approx(0.05)
    (remark,) = states[-1].remarks
    assert "a is 0.2, not at least 0.6, though its multiplier has been at the cap 0.95 for 20 dual steps" in remark
    at_cap = [state.memory["multiplier"]["a"] >= 0.95 * 0.95 for state in states]
    assert [bool(state.remarks) for state in states].index(True) == at_cap.index(True) + 19


@both_duals
def test_equal_out_of_reach_from_above(dual):
    state = walk(scheme_of(constraints={"a": {"equal": 0.3}}, dual=dual), [see(0.6, 0.5, 0.5)] * 300)[-1]
    assert state.kl_weight == pytest.approx(1.95)
    assert "a is 0.6, not equal 0.3" in state.remarks[0]


@both_duals
def test_a_long_violation_does_not_wind_the_multiplier_up(dual):
    batches = [see(0.2, 0.5, 0.5)] * 300 + [see(0.9, 0.5, 0.5)] * 15
    multiplier = walk(scheme_of(constraints={"a": {"at_least": 0.6}}, dual=dual), batches)[-1].memory["multiplier"]["a"]
    assert multiplier < 0.9  # 300 steps up, yet on its way down within 15


def test_constraints_that_do_not_go_together():
    states = walk(scheme_of(constraints=TWO, dual=PID), [see(0.3, 0.3, 0.5)] * 300)
    remark = states[-1].remarks[-1]
    assert remark.startswith("a is 0.3, not at least")
    assert " and b is 7, not at most 4" in remark
    assert "These thresholds may not go together: relax one of them" in remark
    assert states[-1].kl_weight == pytest.approx(0.05)


def test_a_moment_at_the_cap_is_not_worth_a_word():
    batches = ([see(0.2, 0.5, 0.5)] * 15 + [see(0.9, 0.5, 0.5)]) * 3
    scheme = scheme_of(constraints={"a": {"at_least": 0.6}}, dual={"type": "pid", "proportional": 0, "integral": 0.7})
    states = walk(scheme, batches)
    assert sum(state.memory["multiplier"]["a"] >= 0.95 - 1e-9 for state in states) > 20  # but never so many in a row
    assert not states[-1].remarks


# --- thresholds searched ----------------------------------------------------------------------------------------------


def searched(gold, follow: bool = True, **options) -> list[WeightState]:
    """States under held-out vectors that stand at the thresholds (or stay where they were), one every second step."""
    constraints = {"a": {"equal": "initial"}, "b": {"equal": "initial"}}
    scheme = scheme_of(constraints=constraints, search={"gold": "c", "steps": 10, "spread": 0.1, **options})
    state, states, vectors = scheme.init(OBJECTIVES), [], [[0.5, 0.4, gold(0.5, 0.4)]]
    for step in range(400):
        state = scheme.update(state, see(0.5, 0.4, 0.5, step=step, vectors=vectors))
        states.append(state)
        if step % 2:
            thresholds = [state.memory["constraints"][name]["threshold"] for name in ("a", "b")] if follow else (0.5, 0.4)
            vectors.append([*thresholds, gold(*thresholds)])
    return states


def test_the_search_finds_where_gold_is_best():
    states = searched(lambda a, b: 1 - (a - 0.6) ** 2 - (b - 0.65) ** 2, stop=1e-6)
    assert states[-1].memory["threshold"] == pytest.approx({"a": 0.6, "b": 3.5}, abs=0.01)  # b: 10 (1 - .65)
    assert states[-1].memory["search"]["ended"]
    assert states[-1].memory["threshold"] == states[-50].memory["threshold"]
    assert [r for r in states[-1].remarks if "the search of thresholds has ended after" in r and "keeps a 0.6" in r]


def test_the_first_points_lie_at_and_beside_the_initial_policy():
    states = searched(lambda a, b: a)
    seen = list(dict.fromkeys(tuple(s.memory["constraints"][n]["threshold"] for n in ("a", "b")) for s in states))
    assert seen[:2] == [
        pytest.approx((0.6, 0.4)),
        pytest.approx((0.5, 0.5)),
    ]
    assert states[0].memory["search_points"] == 1  # the start itself is judged by the first vector


def test_a_point_that_is_not_reached_is_judged_when_its_steps_are_used_up():
    states = searched(lambda a, b: 0.5, follow=False, stop=0.0)
    assert [s.memory["search_points"] for s in states[:25]] == [1] * 10 + [2] * 10 + [3] * 5
    remarks = states[-1].remarks
    assert remarks[0].startswith("search, point 1: a ")
    assert not [remark for remark in remarks if "at the cap" in remark]  # out of reach on purpose


# --- real runs --------------------------------------------------------------------------------------------------------

HELD = {"type": "lagrangian", "constraints": {"accuracy": {"at_least": 0.65}}, "optimize": "brevity"}
NEAR = {
    "type": "lagrangian",
    "constraints": {"accuracy": {"equal": "initial"}, "brevity": {"at_least": 0.6}},
    "dual": "pid",
}


@pytest.mark.parametrize("options", [HELD, NEAR], ids=["an objective is optimised", "the KL is optimised"])
def test_a_run(make_learner, tmp_path, options):
    learner = make_learner(f"--weighting={json.dumps(options)}", "--steps=5")
    learner.train()
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 5
    for row in rows:
        for name in options["constraints"]:
            assert {f"weighting/{key}/{name}" for key in ("multiplier", "threshold", "violation")} <= set(row)
        weights = [row[f"weights/{name}"] for name in ("accuracy", "brevity", "clarity")]
        assert sum(weights) + row.get("weights/kl", 0.0) == pytest.approx(1)
        assert ("weights/kl" in row) == (options is NEAR)
    violation = rows[0]["weighting/threshold/accuracy"] - rows[0]["objectives/accuracy/mean"]
    assert rows[0]["weighting/violation/accuracy"] == pytest.approx(abs(violation) if options is NEAR else violation)
    assert (
        len({row["weighting/multiplier/brevity" if options is NEAR else "weighting/multiplier/accuracy"] for row in rows})
        > 1
    )


def test_the_type_alone_runs_on_the_quickstart(launch, tmp_path):
    result = launch(
        "align.train", "--config", QUICKSTART, f"--output={tmp_path / 'run'}", "--weighting.type=lagrangian",
        "--steps=3", "--evaluation.every=2", "--prompts.evaluation.args.count=16", "--rollout.prompts_per_batch=4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    row = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert set(row) >= {"weighting/threshold/accuracy", "weighting/violation/accuracy"}
    assert row["weights/clarity"] == 0
    assert "accuracy=0." in result.stderr
    assert " (at least 0." in result.stderr


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    options = NEAR | {"search": {"gold": "clarity", "steps": 3}}
    more = (f"--weighting={json.dumps(options)}", *RUN)
    assert start(tmp_path / "straight", *more).wait(timeout=240) == 0
    kill_at(start(tmp_path / "killed", *more), tmp_path / "killed", 5)
    result = resume(tmp_path / "killed", processes=1)
    assert result.returncode == 0, result.stderr
    assert_equal(tmp_path / "straight", tmp_path / "killed")
