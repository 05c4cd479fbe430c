"""The configuration: every mistake is named with key, value and way out, before anything is loaded."""

import json
from pathlib import Path
from typing import get_args

import pytest

from align.advice import advise
from align.config import Config
from align.config.advantages import _Combinations, _Estimators
from align.load import ConfigError, json_schema, load_config
from align.plan import Schedule, make_plan
from align.trl_options import CHOICES, NOT_OFFERED, OWNED, option_types
from tests.conftest import QUICKSTART, ROOT


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    config = load_config(str(path))
    make_plan(config, processes=1)
    make_plan(config, processes=2)


def test_resolved_configuration_reads_back_the_same():
    config = load_config(QUICKSTART)
    again = Config.model_validate(json.loads(config.model_dump_json()))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_fingerprint_sees_everything_but_the_folder():
    config = load_config(QUICKSTART)
    assert load_config(QUICKSTART, ["--output=elsewhere"]).fingerprint() == config.fingerprint()
    assert load_config(QUICKSTART, ["--seed=1"]).fingerprint() != config.fingerprint()


def test_overrides_reach_every_depth_and_kind():
    config = load_config(
        QUICKSTART,
        [
            "--steps=7",
            "--weighting.weights.accuracy=2",
            "--objectives.accuracy.bounds=[0,2]",
            "--trl.learning_rate=1e-5",
            "--weighting.type=schedule",
            "--estimator=rloo",
            "--policy.lora.r=4",
            "trl.loss_type=bnpo",
        ],
    )
    assert config.steps == 7
    assert config.weighting.weights["accuracy"] == 2
    assert config.objectives["accuracy"].bounds == (0, 2)
    assert config.trl == load_config(QUICKSTART).trl | {"learning_rate": 1e-5, "loss_type": "bnpo"}
    assert config.weighting.type == "schedule"
    assert config.estimator.type == "rloo"
    assert config.policy.lora.r == 4


BAD = [  # override, what the message must say
    ("--objectives.accuracy.weight=2", r"objectives.accuracy: an objective has no weight of its own: .*weighting\.weights$"),
    ("--objectives.accuracy.wait=2", r"objectives.accuracy: unknown key 'wait'; there are: reward, args, .*, missing$"),
    ("--weightin.type=fixed", r"unknown key 'weightin'; did you mean 'weighting'\?"),
    ("--rollout.prompts_per_bach=2", r"rollout: unknown key 'prompts_per_bach'; did you mean 'prompts_per_batch'\?"),
    ("--steps=lots", "steps: 'lots' is not valid: input should be a valid integer"),
    ("--steps=0", "steps: 0 is not valid: input should be greater than 0"),
    ("--policy=tiny", "policy: 'tiny' is not valid: it is a table; write"),
    ("--objectives.acuracy.missing=neutral", r"objectives.acuracy.reward is missing; did you mean objectives.accuracy\?"),
    ("--weighting.weights.acuracy=1", r"weighting.weights: unknown objective 'acuracy'; did you mean 'accuracy'\?"),
    ("--weighting.weights.accuracy=-1", "weighting.weights.accuracy: -1.0 is negative; weights are shares"),
    ("--weighting.weights.accuracy=.nan", "weighting.weights.accuracy: nan is not valid: input should be a finite number"),
    ("--weighting.weights={accuracy: 0, brevity: 0, clarity: 0}", "all weights are 0"),
    ("--weighting.type=magic", "weighting.type: 'magic' does not exist; one of 'fixed', 'schedule'"),
    ("--objectives.accuracy.bounds=[1,0]", r"bounds \[1.0, 0.0\] are not in order"),
    ("--objectives.humour={reward: brevity}", "weighting.weights gives no weight for 'humour'"),
    ("--objectives.accuracy.missing=zero", "objectives.accuracy.missing: 'zero' is not valid"),
    ("--rollout.samples_per_prompt=1", "rollout.samples_per_prompt: 1 is not valid: input should be greater than"),
    ("--evaluation.reference.accuracy=2", r"evaluation.reference.accuracy: 2.0 leaves nothing above it"),
    ("--evaluation.reference.accuracy=1", r"evaluation.reference.accuracy: 1.0 leaves nothing above it within the bounds"),
    ("--evaluation.reference.speed=0", "evaluation.reference: unknown objective 'speed'"),
    ("--prompts.evaluation=null", "prompts.evaluation is missing: name held-out prompts, or set evaluation.every to 0"),
    ("--prompts.system=Hello", "prompts.system needs a chat template"),
    ("--prompts.train={type: file}", "prompts.train.path is missing"),
    ("--prompts.train={path: x.jsonl}", "prompts.train.type is missing"),
    ("--combination=magic", "combination.type: 'magic' does not exist; one of 'sum_then_normalize'"),
    ("--combination={type: soft_min, kappa: 0}", "combination.kappa: 0 is not valid: input should be greater than 0"),
    ("--combination={type: soft_min, kappa: .inf}", "combination.kappa: inf is not valid: input should be a finite number"),
    ("--combination={type: product, margin: 0}", "combination.margin: 0 is not valid: input should be greater than 0"),
    ("--combination={type: chebyshev, augmentation: -1}", "combination.augmentation: -1 is not valid"),
    ("--combination={type: dvao, kappa: 1}", "combination: unknown key 'kappa'"),
    ("--trl.learning_rat=1", "trl.learning_rat is not an option of TRL's GRPOConfig; did you mean 'learning_rate'"),
    ("--trl.beta=much", "trl.beta: 'much' is not valid"),
    ("--trl.beta=.inf", "trl.beta: inf is not a finite number"),
    ("--trl.loss_type=ppo", "trl.loss_type: 'ppo' is not one of grpo, bnpo"),
    ("--trl.num_generations=4", "trl.num_generations is decided by `rollout.samples_per_prompt`: set that instead"),
    ("--trl.vllm_mode=server", "trl.vllm_mode is decided by `rollout.engine`"),
    ("--trl.logging_steps=5", "trl.logging_steps cannot be set: every step is logged"),
    ("--trl=fast", "trl: must be a table of TRL options"),
    ("--weighting={type: schedule, weights: {accuracy: 1, brevity: 1, clarity: 1}, "
     "milestones: [{step: 5, weights: {x: 1}}]}",
     r"weighting.milestones\[0\].weights: unknown objective 'x'"),
    ("--weighting={type: schedule, weights: {accuracy: 1, brevity: 1, clarity: 1}, milestones: [{step: 5, weights: "
     "{accuracy: 1, brevity: 1, clarity: 1}}, {step: 5, weights: {accuracy: 1, brevity: 1, clarity: 1}}]}",
     "milestones must come in order of step"),
    ("steps", "cannot read the override 'steps': write --section.key=value"),
    ("--steps=[1,", "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), BAD, ids=[override[:40] for override, _ in BAD])
def test_every_mistake_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [override])


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, ["--steps=lots", "--weighting.weights.accuracy=x", "--trl.beta=x"])
    assert all(key in str(caught.value) for key in ("steps", "weighting.weights.accuracy", "trl.beta"))


def test_files_that_are_no_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no configuration at 'absent.yaml'"):
        load_config("absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2")
    with pytest.raises(ConfigError, match=r"bad.yaml cannot be read"):
        load_config(str(bad))
    bad.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match=r"bad.yaml"):
        load_config(str(bad))
    bad.write_text("accuracy: 1\naccuracy: 2\n")
    with pytest.raises(ConfigError, match="duplicate key"):
        load_config(str(bad))


def test_an_objective_given_twice_is_refused(tmp_path: Path):
    text = Path(QUICKSTART).read_text().replace("  brevity: {", "  accuracy: {reward: brevity}\n  brevity: {")
    twice = tmp_path / "twice.yaml"
    twice.write_text(text)
    with pytest.raises(ConfigError, match="duplicate key accuracy"):
        load_config(str(twice))


# --- the table of TRL's options ---------------------------------------------------------------------------------------


def test_the_table_knows_exactly_the_options_of_the_installed_trl():
    from dataclasses import fields

    from trl import GRPOConfig

    assert set(option_types()) == {field.name for field in fields(GRPOConfig) if field.init}
    assert {*OWNED, *NOT_OFFERED, *CHOICES} <= set(option_types())


def test_every_owner_exists():
    keys = json.dumps(json_schema())
    for owner in {o for o in OWNED.values() if o != "--resume"}:
        assert all(f'"{part}"' in keys for part in owner.split("."))


def test_the_committed_schema_is_the_current_one():
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == json_schema()


# --- batch arithmetic and schedule --------------------------------------------------------------------------------------


def plan(*overrides, processes=1):
    return make_plan(load_config(QUICKSTART, list(overrides)), processes)


def test_batch_arithmetic_by_hand():
    # 12 prompts x 8 = 96 samples; 2 processes x 48; micro-batches of 8: 6 passes; 3 updates: 2 passes each; 2 iterations:
    # 6 optimiser steps per batch; 20 steps: 4 batches, 48 prompts
    made = plan(
        "--rollout.prompts_per_batch=12", "--learner.micro_batch_size=8", "--learner.updates_per_batch=3",
        "--learner.iterations_per_batch=2", "--steps=20", processes=2,
    )  # fmt: skip
    assert (made.samples_per_batch, made.samples_per_process, made.micro_batch_size) == (96, 48, 8)
    assert (made.passes_per_batch, made.accumulation, made.steps_per_batch) == (6, 2, 6)
    assert (made.batches, made.prompts) == (4, 48)
    assert [made.samples_by(step) for step in (0, 1, 6, 7)] == [0, 96, 96, 192]


def test_batches_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="prompts_per_batch=16 cannot be split over 3 processes without breaking a"):
        plan(processes=3)
    with pytest.raises(ValueError, match=r"128 samples per process .* not divisible .* learner.micro_batch_size=48"):
        plan("--learner.micro_batch_size=48")
    with pytest.raises(ValueError, match=r"not divisible into learner.updates_per_batch=5"):
        plan("--learner.updates_per_batch=5")


def test_schedule_ends_with_an_evaluation_and_a_checkpoint():
    schedule = Schedule(steps=10, evaluate_every=4, save_every=3)
    assert [s for s in range(11) if schedule.evaluates_at(s)] == [0, 4, 8, 10]
    assert [s for s in range(11) if schedule.saves_at(s)] == [3, 6, 9, 10]
    assert not any(Schedule(10, 0, 3).evaluates_at(s) for s in range(11))


def test_a_resolved_configuration_is_read_back_literally(tmp_path):
    texts = ["plain", "\U0001f600 é", "${seed}", "\\${seed}", "\\\\${x}", "a\\b", "1e-3", "null", "[1, 2]"]
    for text in texts:
        data = load_config(QUICKSTART, ["--prompts.chat=true"]).model_dump(mode="json")
        data["prompts"]["system"] = text
        (tmp_path / "config.json").write_text(json.dumps(data))
        read = load_config(str(tmp_path / "config.json"), ["--seed=3"])
        assert (read.prompts.system, read.seed) == (text, 3)


def test_what_may_change_on_resume_leaves_the_fingerprint_alone():
    config = load_config(QUICKSTART)
    for override in (
        "--output=elsewhere",
        "--steps=999",
        "--objectives.accuracy.missing=drop_sample",
        "--rollout.top_p=1.0",
    ):
        assert load_config(QUICKSTART, [override]).fingerprint() == config.fingerprint(), override
    for override in ("--seed=1", "--objectives.accuracy.bounds=[0, 2]", "--rollout.top_p=0.9", "--estimator=grpo"):
        assert load_config(QUICKSTART, [override]).fingerprint() != config.fingerprint(), override


def test_the_schema_allows_the_short_forms():
    properties = json_schema()["properties"]
    for key, models in (("estimator", _Estimators), ("combination", _Combinations)):
        names = [get_args(model.model_fields["type"].annotation)[0] for model in get_args(models)]
        assert {"enum": names, "type": "string"} in properties[key]["anyOf"]


# --- advice ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["--weighting={type: schedule, weights: {accuracy: 1, brevity: 1, clarity: 1}}"],
            "the schedule is the same as fixed weights",
        ),
        (
            ["--combination=normalize_then_sum", "--estimator={type: grpo, scale: none}"],
            "estimator.scale=none has no effect",
        ),
        (
            ["--combination=normalize_then_sum", "--estimator={type: reinforce, whiten: false}"],
            "estimator.whiten=false has no effect",
        ),
        (["--combination=normalize_then_sum", "--estimator=rloo"], "the advantages are those of grpo"),
        (["--weighting={type: fixed, weights: {accuracy: 1, brevity: 1, clarity: 0}}"], "objective 'clarity' has weight 0"),
        (["--evaluation.every=1000"], "only the first and the last policy are evaluated"),
        (["--evaluation.every=0"], "there will be no Pareto archive"),
    ],
)
def test_choices_that_do_not_do_what_they_seem_to(overrides, warning):
    assert advise(load_config(QUICKSTART)) == []
    assert any(warning in line for line in advise(load_config(QUICKSTART, overrides)))
