"""Choices of schemes that contradict the rest, or do nothing: said before any model loads, with key, value and way out."""

import json

import pytest

from align.advice import advise
from align.config import describe
from align.load import ConfigError, load_config
from tests.conftest import QUICKSTART, WEIGHTS

CONTRADICTIONS = [
    # unknown names, in every table of every scheme
    ({"type": "gradient", "weights": {**WEIGHTS, "speed": 1}}, (), "weighting.weights: unknown objective 'speed'"),
    ({"type": "variation", "weights": {"accuracy": 1, "brevity": 1}}, (), "weighting.weights gives no weight for 'clarity'"),
    ({"type": "mgda", "weights": {**WEIGHTS, "clarity": -1}}, (), "weighting.weights.clarity: -1.0 is negative"),
    ({"type": "hypervolume", "reference": {"acuracy": 0}}, (), "weighting.reference: unknown objective 'acuracy'; did you"),
    ({"type": "covariance", "target": {"accuracy": 0.1}}, (), "weighting.target has no number for 'brevity': add it"),
    ({"type": "covariance", "cap": {"x": 1, **WEIGHTS}}, (), "weighting.cap: unknown objective 'x'"),
    # one objective: nothing to decide
    *(
        ({"type": kind, "weights": {"accuracy": 1, "brevity": 0, "clarity": 0}}, (), "only ['accuracy'] has a share")
        for kind in ("gradient", "mgda", "pama", "hypervolume_gradient", "covariance", "variation", "saturation")
    ),
    # reference points that nothing can be above
    ({"type": "hypervolume", "reference": {"accuracy": 1.0}}, (), "weighting.reference.accuracy: 1.0 leaves nothing above"),
    ({"type": "hypervolume_gradient", "reference": {"brevity": 1.5}}, (), "weighting.reference.brevity: 1.5 leaves nothing"),
    # held-out vectors without evaluation
    ({"type": "hypervolume"}, ("--evaluation.every=0",), "but evaluation.every is 0: give a number of steps"),
    ({"type": "hypervolume_gradient"}, ("--evaluation.every=0",), "or take weighting.vector=batches"),
    ({"type": "hypervolume_gradient", "vector": "batches", "against": "archive"}, ("--evaluation.every=0",), "is 0"),
    # bounds on weights that leave no point of the simplex
    ({"type": "pama", "floor": 0.4}, (), "weighting.floor=0.4 times 3 objectives is more than 1: lower it"),
    ({"type": "pama", "ceiling": 0.3}, (), "weighting.ceiling=0.3 times 3 objectives is less than 1: raise it"),
    ({"type": "pama", "smoothing": 1.0}, (), "weighting.smoothing: 1.0 is not valid"),
    # gradients that cannot be had as asked
    (
        {"type": "gradient", "probe": {"features": "exact", "backward": "ordinary"}},
        (),
        "weighting.probe.backward=ordinary: exact needs backward passes of its own; take extra or auto",
    ),
    (
        {"type": "mgda", "probe": {"backward": "ordinary"}},
        ("--trl.beta=0.1",),
        "weighting.probe.backward=ordinary: with trl.beta=0.1",
    ),
    (
        {"type": "gradient", "probe": {"features": "norms"}},
        ("--policy.lora={}",),
        "weighting.probe.features=norms: under policy.lora normalisation layers are frozen; take sketch",
    ),
]


def config_of(weighting: dict, *more: str):
    return load_config(QUICKSTART, [f"--weighting={json.dumps(weighting)}", *more])


@pytest.mark.parametrize(("weighting", "more", "message"), CONTRADICTIONS, ids=lambda v: str(v)[:60])
def test_contradictions_are_refused(weighting, more, message):
    with pytest.raises(ConfigError) as error:
        config_of(weighting, *more)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("weighting", "more"),
    [
        ({"type": "hypervolume_gradient", "vector": "batches"}, ("--evaluation.every=0",)),
        ({"type": "gradient", "probe": {"features": "norms", "backward": "ordinary"}}, ()),
        ({"type": "gradient", "probe": {"features": "sketch"}}, ("--policy.lora={}",)),
        ({"type": "pama", "floor": 0.33, "ceiling": 0.34}, ()),
        ({"type": "hypervolume", "weights": {"accuracy": 1, "brevity": 0, "clarity": 0}}, ()),
    ],
)
def test_their_neighbours_are_not(weighting, more):
    config_of(weighting, *more)


@pytest.mark.parametrize(
    ("weighting", "more", "warning"),
    [
        ({"type": "pama", "warm_up": 160}, (), "weighting.warm_up=160 leaves no step of 160"),
        (
            {"type": "pama", "weights": {"accuracy": 9, "brevity": 1, "clarity": 1}, "ceiling": 0.5},
            (),
            "starts at the nearest",
        ),
        ({"type": "pama", "floor": 0.25, "ceiling": 0.3333333333333333}, (), "leaves equal weights as the only ones"),
        ({"type": "lagrangian"}, (), "have the same share, and so the first is optimised"),
        ({"type": "saturation", "every": 200}, (), "weighting.every=200 is more than the 160 steps"),
        ({"type": "variation", "pull": 1.0}, (), "weighting.pull=1 holds the weights where they start"),
        ({"type": "saturation", "gamma": 0}, (), "weighting.gamma=0 gives the same weights as weighting.type=fixed"),
        ({"type": "hypervolume"}, ("--evaluation.every=100",), "brings 1 new vectors in 160 steps"),
        ({"type": "hypervolume"}, ("--evaluation.every=160",), "brings 0 new vectors in 160 steps"),
        ({"type": "saturation"}, ("--combination=dvao",), "made for standardised objectives, but combination is dvao"),
        (
            {"type": "hypervolume_gradient", "vector": "batches", "against": "archive"},
            ("--evaluation.temperature=0",),
            "compares held-out vectors (evaluation.temperature=0.0) with batches (rollout.temperature=1.0)",
        ),
        (
            {
                "type": "lagrangian",
                "weights": {"accuracy": 1, "brevity": 1, "clarity": 0},
                "constraints": {"accuracy": {"equal": "initial"}, "brevity": {"equal": "initial"}},
                "optimize": "kl",
                "search": {"gold": "clarity"},
            },
            ("--steps=25",),
            "weighting.search tries 3 points before it makes its first choice",
        ),
        ({"type": "gradient"}, ("--combination=dvao",), "combination dvao does not add up the objectives' gradients"),
        ({"type": "mgda"}, ("--combination=soft_min",), "combination soft_min does not add up"),
        ({"type": "gradient"}, ("--estimator=grpo", "--combination=sum_then_normalize"), "does not add up"),
    ],
)
def test_choices_that_do_little_are_warned_of(weighting, more, warning):
    assert any(warning in line for line in advise(config_of(weighting, *more)))


@pytest.mark.parametrize(
    ("kind", "combination"),
    [("gradient", "estimate_then_sum"), ("mgda", "estimate_then_sum"), ("saturation", "normalize_then_sum"),
     ("pama", "sum_then_normalize")],
)  # fmt: skip
def test_schemes_take_the_combination_that_their_weights_are_for(kind, combination):
    config = load_config(QUICKSTART, [f"--weighting={{type: {kind}}}", "--estimator=grpo"])
    assert config.combination.type == combination
    assert not advise(config)


def test_switching_the_type_keeps_what_the_new_one_has():
    config = load_config(QUICKSTART, ["--weighting.type=gradient", "--weighting.step_size=0.2"])
    assert config.weighting.weights == {"accuracy": 0.4, "brevity": 0.6, "clarity": 0.0}  # the schedule's; no milestones
    assert config.weighting.step_size == 0.2
    assert load_config(QUICKSTART, ["--estimator.type=rloo"]).estimator.type == "rloo"  # grpo's scale is gone
    assert load_config(QUICKSTART, ["--combination.type=dvao"]).combination.type == "dvao"
    pulled = load_config(QUICKSTART, ["--weighting={type: saturation, pull: 0.1, gamma: 2}", "--weighting.type=covariance"])
    assert pulled.weighting.pull == 0.1  # of all adaptive schemes; gamma is gone
    bounded = ["--weighting={type: covariance, cap: 0.5, average: 0.5, floor: 0.1}", "--weighting.type=lagrangian"]
    fresh = load_config(QUICKSTART, [*bounded, "--weighting.optimize=brevity"])
    assert fresh.weighting.cap == 0.95  # a key of the same name, but of another meaning
    assert fresh.weighting.floor == 0.05
    before = ["--weighting.vector=batches", "--weighting.type=hypervolume_gradient"]
    assert load_config(QUICKSTART, before).weighting.vector == "batches"  # asked for, if before the type
    with pytest.raises(ConfigError, match="unknown key 'gamma'"):
        load_config(QUICKSTART, ["--weighting.gamma=2", "--weighting.type=hypervolume_gradient"])
    kept = load_config(QUICKSTART, ["--weighting.type=schedule"])
    assert kept.weighting.milestones  # the same type: nothing is dropped
    with pytest.raises(ConfigError, match=r"prompts\.train\.path is missing"):
        load_config(QUICKSTART, ["--prompts.train.type=file"])
    with pytest.raises(ConfigError, match="'gradients' does not exist"):
        load_config(QUICKSTART, ["--weighting.type=gradients"])


def test_options_can_be_given_below_a_short_name():
    assert load_config(QUICKSTART, ["--combination=soft_min", "--combination.kappa=2"]).combination.kappa == 2
    assert load_config(QUICKSTART, ["--weighting=gradient", "--weighting.pull=0.1"]).weighting.pull == 0.1
    dual = ["--weighting={type: lagrangian, optimize: brevity, dual: sgd}", "--weighting.dual.rate=0.3"]
    assert load_config(QUICKSTART, dual).weighting.dual.rate == 0.3
    with pytest.raises(ConfigError, match="combination: unknown key 'kapa'; did you mean 'kappa'"):
        load_config(QUICKSTART, ["--combination=soft_min", "--combination.kapa=2"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--weighting={type: hypervolume, reference: inital}"], "weighting.reference: 'inital' is not valid: "),
        (["--weighting={type: gradient, probe: norms}"], "weighting.probe: 'norms' is not valid: it is a table; write"),
    ],
)
def test_a_wrong_kind_of_value_is_one_line(overrides, line):
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, overrides)
    said = str(error.value).splitlines()[1:]
    assert len(said) == 1
    assert said[0].strip().startswith(line)


def test_the_problem_is_said_in_one_line():
    constrained = "--weighting={type: lagrangian, constraints: {accuracy: {at_least: 0.65}}, optimize: brevity}"
    assert describe(load_config(QUICKSTART, [constrained])) == "lagrangian: optimise brevity; accuracy at least 0.65"
    config = load_config(QUICKSTART, ["--weighting.type=gradient"])
    assert describe(config) == "gradient: accuracy 0.4  brevity 0.6  clarity 0"
