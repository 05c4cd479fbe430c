"""Constrained problems that cannot be posed, or are not what they seem: said before any model loads."""

import json
from types import SimpleNamespace

import pytest

from align.advice import advise
from align.callbacks import ProgressCallback
from align.load import ConfigError, load_config
from tests.conftest import QUICKSTART

HELD = {"accuracy": {"at_least": 0.65}}
NO_EVALUATION = "--evaluation.every=0"
REFUSED = [
    # constraints
    (
        {"constraints": {"acuracy": {"equal": 0.5}}},
        (),
        "weighting.constraints: unknown objective 'acuracy'; did you mean 'acc",
    ),
    (
        {"constraints": {"accuracy": {}}},
        (),
        "weighting.constraints.accuracy: a constraint is exactly one of at_least, at_most",
    ),
    ({"constraints": {"accuracy": {"at_least": 0.5, "equal": 0.6}}}, (), "equal; there are at_least, equal"),
    ({"constraints": {"accuracy": {"atleast": 0.5}}}, (), "unknown key 'atleast'; did you mean 'at_least'?"),
    (
        {"constraints": {"accuracy": {"at_least": "start"}}},
        (),
        "weighting.constraints.accuracy.at_least: 'start' is neither a number nor the word initial",
    ),
    # thresholds
    (
        {"constraints": {"accuracy": {"at_least": 65}}},
        (),
        "constraints.accuracy.at_least: 65.0 does not lie between the bounds",
    ),
    (
        {"constraints": {"accuracy": {"at_least": 0}}},
        (),
        "at_least: 0.0 is a bound of the objective, so it holds whatever the",
    ),
    (
        {"constraints": {"accuracy": {"at_least": 1}}},
        (),
        "at_least: 1.0 is a bound of the objective, so no mean but the bound",
    ),
    (
        {"constraints": {"accuracy": {"at_most": 1}}},
        (),
        "at_most: 1.0 is a bound of the objective, so it holds whatever the",
    ),
    (
        {"constraints": {"accuracy": {"at_most": 0}}},
        (),
        "at_most: 0.0 is a bound of the objective, so no mean but the bound",
    ),
    (
        {"constraints": {"accuracy": {"equal": 1}}},
        (),
        "equal: 1.0 does not lie between the bounds of the objective, 0.0 and 1.0",
    ),
    (
        {"constraints": {"accuracy": {"equal": "initial"}}},
        (NO_EVALUATION,),
        "accuracy.equal=initial is read off the first eval",
    ),
    ({"optimize": "brevity"}, (NO_EVALUATION,), "weighting.constraints.accuracy.at_least=initial is read off"),
    # what is optimised
    (
        {"constraints": HELD, "optimize": "brevty"},
        (),
        "weighting.optimize: unknown objective 'brevty'; did you mean 'brevity'?",
    ),
    (
        {"constraints": HELD, "optimize": "accuracy"},
        (),
        "weighting.constraints.accuracy: this objective is the one that is opt",
    ),
    ({"optimize": "all"}, (), "weighting.constraints is empty and, with weighting.optimize=all, there is nothing to hold"),
    ({"optimize": "kl"}, (), "with weighting.optimize=kl, there is nothing to hold: give constraints"),
    (
        {"weights": {"accuracy": 1, "brevity": 0, "clarity": 0}},
        (),
        "with weighting.optimize=accuracy, there is nothing to hold",
    ),
    (
        {"constraints": HELD},
        ("--objectives.kl={reward: brevity}",),
        "objectives.kl: weighting.optimize has a meaning of its own",
    ),
    ({"constraints": HELD, "weights": {"accuracy": 1}}, (), "weighting.weights gives no weight for 'brevity': add it"),
    # multipliers
    ({"constraints": HELD, "cap": 1.0}, (), "weighting.cap: 1.0 is not valid"),
    ({"constraints": HELD, "cap": 0.0}, (), "weighting.cap: 0.0 is not valid"),
    ({"constraints": HELD, "cap": 0.4, "floor": 0.4}, (), "weighting.floor=0.4 is not below weighting.cap=0.4: lower it"),
    (
        {"constraints": HELD, "multiplier": 0.97},
        (),
        "weighting.multiplier=0.97: the multiplier of accuracy (at_least) lies betw",
    ),
    ({"optimize": "brevity", "multiplier": -0.5}, (), "weighting.multiplier=-0.5: the multiplier of accuracy (at_least)"),
    (
        {"constraints": {"accuracy": {"equal": 0.5, "multiplier": -0.99}}},
        (),
        "weighting.constraints.accuracy.multiplier=-0.99: the multiplier of accuracy (equal) lies between -0.95 and 0.95",
    ),
    ({"constraints": HELD, "dual": {"type": "pid", "proportional": 0, "integral": 0}}, (), "integral are both 0, so the"),
    ({"constraints": HELD, "dual": "adam"}, (), "weighting.dual.type: 'adam' does not exist; one of 'sgd', 'pid'"),
    # search
    ({"constraints": HELD, "search": {"gold": "clearness"}}, (), "weighting.search.gold: unknown objective 'clearness'"),
    (
        {"constraints": HELD, "search": {"gold": "accuracy"}},
        (),
        "search.gold=accuracy: it is constrained, so it cannot judge",
    ),
    (
        {"constraints": HELD, "optimize": "clarity", "search": {"gold": "clarity"}},
        (),
        "gold=clarity: it is trained on, so it",
    ),
    (
        {"constraints": HELD, "optimize": "all", "search": {"gold": "clarity"}},
        (),
        "or set its share in weighting.weights to 0",
    ),
    (
        {"constraints": HELD, "search": {"gold": "clarity"}},
        (NO_EVALUATION,),
        "weighting.search judges by held-out vectors, but",
    ),
    (
        {"constraints": HELD, "search": {"gold": "clarity", "steps": 5}},
        (),
        "search.steps=5 is less than evaluation.every=10",
    ),
    # streams that are not standardised
    (
        {"constraints": HELD},
        ("--combination=sum_then_normalize",),
        "combination=sum_then_normalize: weighting.type=lagrangian",
    ),
    ({"constraints": HELD}, ("--combination=dvao",), "take estimate_then_sum, normalize_then_sum or mo_grpo"),
    ({"constraints": HELD}, ("--estimator=rloo",), "estimator.type=rloo does not divide by a standard deviation"),
    (
        {"constraints": HELD},
        ("--estimator={type: grpo, scale: none}",),
        "estimator.scale=none does not divide by a standard",
    ),
    ({"constraints": HELD}, ("--estimator={type: reinforce, whiten: false}",), "estimator.whiten=false does not divide by"),
]
ALLOWED = [
    ({"constraints": HELD}, (NO_EVALUATION,)),
    ({"constraints": HELD, "weights": {"accuracy": 0, "brevity": 1, "clarity": 0}, "optimize": "all"}, ()),
    ({"constraints": {"accuracy": {"equal": 0.5, "multiplier": -0.5}, "brevity": {"at_most": 0.8}}}, ()),
    ({"constraints": HELD, "search": {"gold": "clarity"}}, ()),
    ({"constraints": HELD}, ("--combination=mo_grpo", "--estimator=rloo")),
    ({"constraints": HELD}, ("--combination=normalize_then_sum", "--estimator={type: grpo, scale: none}")),
    ({"constraints": HELD}, ("--estimator=reinforce",)),
    ({"constraints": HELD, "dual": "sgd"}, ("--estimator={type: grpo, scale: group}",)),
]


def config_of(options: dict, *more: str):
    return load_config(QUICKSTART, [f"--weighting={json.dumps({'type': 'lagrangian', **options})}", *more])


@pytest.mark.parametrize(("options", "more", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_contradictions_are_refused(options, more, message):
    with pytest.raises(ConfigError) as error:
        config_of(options, *more)
    assert message in str(error.value)


@pytest.mark.parametrize(("options", "more"), ALLOWED, ids=lambda v: str(v)[:60])
def test_their_neighbours_are_not(options, more):
    config_of(options, *more)


def test_a_threshold_of_an_objective_to_minimise_is_in_its_units():
    length = ("--objectives.brevity.direction=minimize", "--objectives.brevity.bounds=[0, 32]")
    config_of({"constraints": {"brevity": {"at_most": 20}}, "optimize": "accuracy"}, *length)
    with pytest.raises(ConfigError, match=r"at_most: 32\.0 is a bound of the objective, so it holds whatever"):
        config_of({"constraints": {"brevity": {"at_most": 32}}, "optimize": "accuracy"}, *length)


def test_the_combination_is_the_one_that_the_scheme_needs_unless_another_is_named():
    assert config_of({"constraints": HELD}).combination.type == "estimate_then_sum"
    assert config_of({"constraints": HELD}, "--combination=mo_grpo").combination.type == "mo_grpo"
    assert load_config(QUICKSTART, []).combination.type == "sum_then_normalize"


WATCHED = "objective 'clarity' has a share, but is neither optimised nor constrained: it is watched, not trained on"


@pytest.mark.parametrize(
    ("options", "more", "warning"),
    [
        ({"constraints": HELD, "optimize": "brevity"}, (), WATCHED),
        ({"weights": {"accuracy": 1, "brevity": 2, "clarity": 0}}, (), "objective 'clarity' has weight 0: it is watched"),
        ({"constraints": HELD}, ("--trl.beta=0.1",), "weighting.optimize=kl and trl.beta=0.1 both keep the policy near"),
        (
            {},
            ("--evaluation.temperature=0",),
            "compares held-out vectors (evaluation.temperature=0.0) with batches (rollout.temperature=1.0)",
        ),
        ({"constraints": HELD, "delay": 160}, (), "weighting.delay=160 leaves no step of 160"),
        (
            {"constraints": HELD, "search": {"gold": "clarity", "steps": 90}},
            ("--evaluation.every=80",),
            "evaluation.every=80 brings 1 new vectors in 160 steps",
        ),
    ],
)
def test_what_is_not_as_it_seems_is_warned_of(options, more, warning):
    assert any(warning in line for line in advise(config_of(options, *more)))


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"weights": {"accuracy": 2, "brevity": 1, "clarity": 1}}, ()),
        ({"weights": {"accuracy": 2, "brevity": 1, "clarity": 1}}, ("--evaluation.every=80",)),  # the first vector is enough
        ({"constraints": HELD, "optimize": "all"}, ()),
        ({"constraints": {n: {"equal": 0.5} for n in ("accuracy", "brevity", "clarity")}}, ("--evaluation.temperature=0",)),
        (
            {
                "constraints": {"clarity": {"at_least": 0.5}, **HELD},
                "optimize": "brevity",
                "weights": {"accuracy": 0, "brevity": 1, "clarity": 0},
            },
            ("--trl.beta=0.1",),
        ),
    ],
)
def test_what_is_as_it_seems_is_not(options, more):
    assert not advise(config_of(options, *more))


@pytest.mark.parametrize(
    ("kind", "violation", "shown"),
    [
        ("at_least", 0.03, "0.62 (at least 0.65!)"),
        ("at_most", -0.03, "0.62 (at most 0.65)"),
        ("equal", 0.03, "0.62 (equal 0.65)"),
    ],
)
def test_the_progress_bar_shows_the_constraint(kind, violation, shown):
    progress = ProgressCallback(["a", "b"], 10, {"a": kind})
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    progress.on_train_begin(SimpleNamespace(disable_tqdm=True), state, None)
    bar = progress._bar = SimpleNamespace(n=0, update=lambda n: None)
    bar.set_postfix = lambda values, refresh: vars(bar).update(postfix=values)
    logs = {"loss": 0.0, "objectives/a/mean": 0.62, "objectives/b/mean": 0.5}
    progress.on_log(None, state, None, logs)
    assert bar.postfix == {"a": "0.62", "b": "0.50"}  # no threshold yet
    progress.on_log(None, state, None, logs | {"weighting/threshold/a": 0.65, "weighting/violation/a": violation})
    assert bar.postfix == {"a": shown, "b": "0.50"}
