"""Rounds of self-training, whole: real policies, in this process and in several."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import DeepSpeedPlugin
from safetensors.torch import load_file

from align import cli
from align.advice import advise
from align.learner_args import check_sharding
from align.load import ConfigError, load_config
from align.plan import make_plan
from align.rounds import rounds
from align.sampling import round_seed
from align.selftrain import round as round_module
from align.train import train
from tests import rounds_run
from tests.conftest import QUICKSTART, ROOT, environment, read_lines

CONFIG = str(ROOT / "configs" / "rounds.yaml")
TINY = (
    '--selftrain.filter={"at_least": {"accuracy": 1.0}}',
    "--rounds.count=2",
    "--rounds.prompts=8",
    "--rounds.batch_size=8",
    "--rounds.learning_rate=1e-3",
    "--rollout.samples_per_prompt=4",
    "--prompts.train.args.count=32",
    "--prompts.evaluation.args.count=8",
)
UNSEEN = "--evaluation.every=0"


def run(folder: Path, *more: str) -> int:
    return rounds(CONFIG, "", [f"--output={folder}", *TINY, *more])


def weights_of(folder: Path, number: int, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    file = folder / "checkpoints" / f"checkpoint-{number}" / name
    return {key: tensor.numpy() for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rounds") / "run"
    assert run(folder) == 0
    return folder


def test_what_rounds_leave(straight):
    metrics = read_lines(straight / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert 0 < row["rounds/kept"] < 1
        assert 0 < row["rounds/ess"] <= 1
        assert row["rounds/weight_mean"] == pytest.approx(1)
        assert row["rounds/weight_max"] >= 1
        assert row["loss"] != row["rounds/unweighted_loss"]
        assert row["rounds/steps"] == -(-row["rounds/chosen"] // 8)
    samples = pq.read_table(straight / "samples").to_pylist()
    assert len(samples) == 2 * 8 * 4
    assert {(s["step"], s["policy_version"]) for s in samples} == {(1, 0), (2, 1)}
    for row in metrics:
        values = [s["value/accuracy"] for s in samples if s["step"] == row["step"]]
        assert row["rounds/kept"] == row["objectives/accuracy/mean"] == sum(values) / 32
    prompts = [s["prompt_id"] for s in samples]
    assert len(set(prompts)) == 16  # the second round has prompts of its own
    points = read_lines(straight / "archive.jsonl")
    assert [(p["step"], p["samples"], p["checkpoint"]) for p in points] == [
        (0, 0, ""), (1, 32, "checkpoints/checkpoint-1"), (2, 64, "checkpoints/checkpoint-2"),
    ]  # fmt: skip
    assert (straight / "report.html").stat().st_size > 10_000


def test_every_round_goes_on_with_the_weights_of_the_one_before(straight):
    start = load_file(ROOT / "align" / "policies" / "arithmetic" / "model.safetensors")
    steps = [np.abs(weights_of(straight, n)["lm_head.weight"] - start["lm_head.weight"].numpy()).max() for n in (1, 2)]
    assert 0 < steps[0] < steps[1]


def test_a_round_draws_by_a_seed_for_each_use():
    config = load_config(CONFIG, [])
    assert len({round_seed(config, number, use) for number in (1, 2) for use in range(4)}) == 8


def test_its_checkpoints_can_be_evaluated(straight, capsys, tmp_path):
    assert cli.main(["eval", str(straight), "--checkpoints=2", f"--json={tmp_path / 'figures.json'}"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["step 2"]["values"] == read_lines(straight / "archive.jsonl")[2]["values"]  # the same seeds


@pytest.mark.parametrize("cut_off", ["between two rounds", "within the second"])
def test_a_resumed_run_ends_as_if_nothing_had_happened(straight, tmp_path, cut_off):
    folder = tmp_path / "run"
    if cut_off == "between two rounds":
        assert run(folder, "--rounds.count=1") == 0
        more = ["--rounds.count=2"]
    else:
        shutil.copytree(straight, folder)
        (folder / "checkpoints" / "checkpoint-2" / "paretune.json").unlink()
        (folder / "checkpoints" / "checkpoint-2" / "model.safetensors").write_bytes(b"cut off")
        more = []
    assert cli.main(["rounds", "--resume", str(folder), *more]) == 0
    for name in ("metrics.jsonl", "archive.jsonl", "samples/shard-000000.rank0.parquet", "evaluation/step-000002.parquet"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name
    mine, theirs = weights_of(folder, 2), weights_of(straight, 2)
    assert all((mine[key] == theirs[key]).all() for key in theirs)


def test_choices_that_do_not_do_what_they_seem_to():
    assert not advise(load_config(CONFIG, []))
    section = "--selftrain={filter: {}, weights: [{type: loss, warm_up: 3}]}"
    assert advise(load_config(CONFIG, [section])) == [
        "selftrain.filter asks for nothing, so every sample passes, right or wrong",
        "selftrain.weights[0].warm_up=3 leaves no round of 3 with weights",
    ]


def test_a_complete_run_says_so(straight, capsys):
    assert rounds("", str(straight), []) == 0
    assert "is complete: 2 rounds (a larger --rounds.count goes on)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_pairs(tmp_path, method):
    assert run(tmp_path / "run", f"--rounds.method={method}", "--rounds.count=1", UNSEEN) == 0
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 0 < row["rounds/chosen"] <= 8  # one pair per prompt at most
    rows = row["rounds/chosen"] * (2 if method == "kto" else 1)
    assert row["rounds/steps"] == -(-rows // 8)
    # At the start the policy is its own reference: ln 2 of a pair, 1/2 of a sample; some steps on it is little less.
    assert row["rounds/unweighted_loss"] == pytest.approx({"dpo": np.log(2), "kto": 0.5}[method], abs=0.2)


def test_adapters(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, "--policy.lora={r: 4}", UNSEEN) == 0
    first, second = (weights_of(folder, n, "adapter_model.safetensors") for n in (1, 2))
    assert first.keys() == second.keys()
    moved = max(np.abs(second[key] - first[key]).max() for key in first)
    size = max(np.abs(first[key]).max() for key in first if "lora_B" in key)
    assert 0 < moved < 20 * size  # it went on from them


def test_sharded_processes_follow_plain_ones(launch, tmp_path):
    pytest.importorskip("deepspeed")
    more = ("--rounds.method=dpo", "--evaluation.every=0")
    given = ["--config", CONFIG, *TINY, *more]
    plain = launch("align.rounds", *given, f"--output={tmp_path / 'ddp'}", processes=2)
    assert plain.returncode == 0, plain.stderr
    assert "2 process(es) x 1 x 4" in plain.stdout
    file = ROOT / "configs" / "accelerate" / "zero3_cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "align.rounds"]
    sharded = subprocess.run(
        [*launcher, *given, f"--output={tmp_path / 'zero'}"],
        cwd=ROOT, env={k: v for k, v in environment(2).items() if k != "ACCELERATE_USE_CPU"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert "2 rounds in" in sharded.stdout, sharded.stderr
    rows = zip(read_lines(tmp_path / "ddp" / "metrics.jsonl"), read_lines(tmp_path / "zero" / "metrics.jsonl"), strict=True)
    for a, b in rows:
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["rounds/kept"] == a["rounds/kept"]
    samples = pq.read_table(tmp_path / "ddp" / "samples").to_pylist()
    assert len(samples) == 2 * 8 * 4
    assert len({s["prompt_id"] for s in samples}) == 16


def test_two_processes_train_as_one(launch, tmp_path):
    """On the same samples: several steps of SFT, and one of KTO, whose divergence is of a micro-batch of all processes."""
    rounds_run.main(str(tmp_path / "one"), [])
    result = launch("tests.rounds_run", str(tmp_path / "two"), processes=2)
    assert result.stdout.count("went through the rounds") == 2, result.stderr[-3000:]
    start = load_file(ROOT / "align" / "policies" / "arithmetic" / "model.safetensors")
    for method, steps in (("sft", 2), ("kto", 1)):
        folders = [tmp_path / f"{name}.{method}" for name in ("one", "two")]
        (a,), (b,) = (read_lines(folder / "metrics.jsonl") for folder in folders)
        assert a["rounds/steps"] == b["rounds/steps"] == steps
        assert 0 < a["rounds/kept"] < 1
        assert a["rounds/ess"] < 0.99
        assert a == pytest.approx(b, rel=1e-4)
        one, two = (weights_of(folder, 1) for folder in folders)
        moved = max(np.abs(one[name] - tensor.numpy()).max() for name, tensor in start.items())
        gap = max(np.abs(one[name] - two[name]).max() for name in one)
        assert gap < 1e-3 * moved


# --- what cannot be run -------------------------------------------------------------------------------------------------


def test_nothing_passes(tmp_path, capsys):
    assert run(tmp_path / "run", "--selftrain.filter={at_least: {accuracy: 1, brevity: 0.99}}", UNSEEN) == 2
    said = capsys.readouterr().err
    assert "round 1: none of 32 samples passes the filter (" in said
    assert "fail brevity at_least 0.99" in said
    assert "ease selftrain.filter" in said


def test_no_pairs(tmp_path, capsys):
    everything = "--selftrain.filter={}"
    assert run(tmp_path / "run", everything, "--rounds.method=dpo", UNSEEN) == 2
    said = capsys.readouterr().err
    assert "no pairs for rounds.method=dpo: 32 of 32 samples pass" in said
    assert "rounds.method=sft" in said


def test_all_pass(tmp_path, capsys):
    everything = "--selftrain.filter={}"
    assert run(tmp_path / "run", everything, UNSEEN) == 2
    assert "rounds.mixed_only leaves such prompts out" in capsys.readouterr().err
    assert run(tmp_path / "other", everything, UNSEEN, "--rounds.mixed_only=false", "--rounds.count=1") == 0


def test_zero3_must_write_whole_weights():
    pytest.importorskip("deepspeed")
    config = load_config(CONFIG, [*TINY])
    for stage, whole in ((3, True), (2, False)):
        plugin = DeepSpeedPlugin(zero_stage=stage, zero3_save_16bit_model=whole)
        check_sharding(config, SimpleNamespace(fsdp=None, deepspeed_plugin=plugin))
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_save_16bit_model=False)
    with pytest.raises(ValueError, match="zero3_save_16bit_model: true in deepspeed_config of the accelerate file"):
        check_sharding(config, SimpleNamespace(fsdp=None, deepspeed_plugin=plugin))


def test_each_command_knows_its_configurations(tmp_path, capsys):
    assert train(CONFIG, "", [f"--output={tmp_path / 'run'}"]) == 2
    assert "start it by `paretune rounds`" in capsys.readouterr().err
    assert rounds(QUICKSTART, "", [f"--output={tmp_path / 'run'}"]) == 2
    assert "there is no such section" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--rounds.method=ppo", "rounds.method: 'ppo' is not valid"),
        ("--rounds.lr=1", "unknown key 'lr'"),
        ("--steps=100", "steps=100: rounds.count=3 says how long rounds go on: remove steps"),
        ("--rollout.prompts_per_batch=8", "rollout.prompts_per_batch=8: rounds sample rounds.prompts=256: remove it"),
        ("--rounds={prompts: 4}", "rounds.count is missing"),
        ("--estimator=rloo", "estimator: rounds fine-tune without advantages: remove it"),
        ("--weighting={type: covariance}", "weighting: rounds weight samples and not objectives: remove it"),
        ("--learner.iterations_per_batch=2", "learner: rounds take its micro_batch_size alone"),
        ("--rollout={engine: vllm, lookahead: 1}", "rollout.lookahead: a round is sampled before"),
        ("--evaluation.every=2", "every round is evaluated and saved"),
        ("--trl.learning_rate=1e-3", "trl.learning_rate is decided by `rounds.learning_rate`"),
        ("--trl.loss_type=dapo", "trl.loss_type is an option of GRPO"),
        ("--trl.report_to=tensorboard", "trl.report_to cannot be set for rounds: a round is one line"),
        (
            "--rounds={count: 1, method: dpo, per_prompt: 2}",
            "rounds.per_prompt: rounds.method=dpo takes one pair per prompt",
        ),
    ],
)
def test_what_contradicts_itself(override, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "processes", "sentence"),
    [
        (["--rounds.batch_size=7"], 2, "rounds.batch_size=7 cannot be split over 2 process(es): choose"),
        (["--learner.micro_batch_size=5"], 1, "rounds.batch_size=32 cannot be split over 1 process(es) of learner.micro"),
        (["--rounds.batch_size=2", "--rounds.method=kto"], 2, "make it 4 at least"),
        (["--rounds.prompts=1"], 2, "rounds.prompts=1 cannot be shared by 2 processes"),
    ],
)
def test_numbers_that_do_not_fit(overrides, processes, sentence):
    with pytest.raises(ValueError, match="rounds") as error:
        make_plan(load_config(CONFIG, overrides), processes)
    assert sentence in str(error.value)


# --- values that are missing --------------------------------------------------------------------------------------------


def fickle(text: str) -> float | None:
    """A reward that judges texts of an even length alone."""
    return None if len(text) % 2 else 1.0


def judged(missing: str) -> tuple[str, ...]:
    fickly = {"reward": "tests.test_rounds:fickle", "missing": missing}
    return (f"--objectives={json.dumps({'accuracy': {'reward': 'arithmetic_accuracy'}, 'fickle': fickly})}", UNSEEN)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[list[str], int, int | None]]:
    """Texts of the group, and the places of the right sample and the wrong one, of all that is trained on."""
    seen: list = []
    for name in ("sft_rows", "dpo_rows"):
        monkeypatch.setattr(round_module, name, partial(_noted, getattr(round_module, name), seen))
    return seen


def _noted(make_rows, seen, groups, chosen, *rest):
    texts = [[sample.text for sample in groups[p].samples] for p in chosen.prompts]
    seen += zip(texts, chosen.right, chosen.wrong or [None] * len(chosen), strict=True)
    return make_rows(groups, chosen, *rest)


def test_a_sample_that_nobody_could_judge_is_neither_right_nor_wrong(tmp_path, taken):
    asked = "--selftrain.filter={at_least: {accuracy: 1, fickle: 0}}"
    more = ("--rounds.method=dpo", "--rounds.count=1", "--rounds.prompts=32", asked)
    assert run(tmp_path / "run", *judged("drop_sample"), *more) == 0
    assert len(taken) > 2
    for texts, right, wrong in taken:
        assert fickle(texts[right]) == fickle(texts[wrong]) == 1


@pytest.mark.parametrize("missing", ["drop_sample", "drop_group"])
def test_what_the_policies_leave_out_is_not_trained_on(tmp_path, taken, missing):
    more = ("--selftrain.filter={}", "--selftrain.weights=[uniform]", "--rounds.mixed_only=false", "--rounds.count=1")
    assert run(tmp_path / "run", *judged(missing), *more, "--rounds.prompts=64") == 0
    assert taken
    for texts, right, _ in taken:
        assert all(fickle(text) for text in (texts if missing == "drop_group" else [texts[right]]))


def test_a_missing_value_stops_the_rounds_and_loses_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, *judged("fail"), "--rounds.count=1") == 2
    said = capsys.readouterr().err
    assert "objective 'fickle' has no value for " in said
    assert "Whole rounds are kept: mend it, then " in said
    assert not (folder / "metrics.jsonl").exists()
    assert not list((folder / "checkpoints").glob("*"))
    assert rounds("", str(folder), ["--objectives.fickle.missing=drop_sample"]) == 0
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1]


def test_values_are_not_filled_in(tmp_path):
    with pytest.raises(ConfigError, match=r"objectives\.fickle\.missing=neutral: a filter cannot judge a value"):
        load_config(CONFIG, [*TINY, *judged("neutral")])
