"""Training for real, on a tiny policy: every estimator, loss and option that the seam carries."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from align.trl_options import CHOICES
from tests import forks
from tests.conftest import QUICKSTART, ROOT, command, environment, overrides, read_lines, torchrun


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Whole runs in one process and in two, each made once: the folder, and what was said."""
    made = {}

    def run(processes: int) -> tuple[Path, subprocess.CompletedProcess]:
        if processes not in made:
            folder = tmp_path_factory.mktemp("ran") / "run"
            words = torchrun("align.train", *overrides(folder), processes=processes)
            made[processes] = folder, forks.run(words, cwd=ROOT, env=environment(processes), timeout=240)
        folder, result = made[processes]
        assert result.returncode == 0, result.stderr
        return folder, result

    return run


def test_a_run_leaves_files_that_people_and_scripts_can_read(ran):
    folder, result = ran(1)
    for line in ("held out", "trained 4 steps", "hypervolume", "report.html"):
        assert line in result.stdout
    assert {p.name for p in folder.iterdir()} >= {
        "config.json", "environment.json", "metrics.jsonl", "timings.jsonl", "archive.jsonl", "samples", "evaluation",
        "checkpoints", "report.html", "front.png",
    }  # fmt: skip
    metrics = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert math.isclose(sum(row[f"weights/{name}"] for name in ("accuracy", "brevity", "clarity")), 1)
        assert row["objectives/brevity/missing"] == 0
        assert row["policy_age"] == 0
        assert "reward" not in row  # TRL's own sum, which trains nothing here
    assert [row["step"] for row in read_lines(folder / "timings.jsonl")] == [1, 2, 3, 4]
    assert not any("time" in key for key in metrics[0])
    archive = read_lines(folder / "archive.jsonl")
    assert [point["step"] for point in archive] == [0, 2, 4]
    assert [point["checkpoint"] for point in archive] == ["", "checkpoints/checkpoint-2", "checkpoints/checkpoint-4"]
    assert [point["samples"] for point in archive] == [0, 32, 64]
    samples = pq.read_table(folder / "samples").to_pylist()
    assert len(samples) == 4 * 16
    assert {row["step"] for row in samples} == {1, 2, 3, 4}
    assert all(row["policy_version"] == row["step"] - 1 for row in samples)
    step_one = [row["value/brevity"] for row in samples if row["step"] == 1]
    assert metrics[0]["objectives/brevity/mean"] == pytest.approx(sum(step_one) / 16)
    assert len(pq.read_table(folder / "evaluation" / "step-000002.parquet")) == 16


def test_the_evaluation_of_a_checkpoint_can_be_repeated(ran, launch, tmp_path):
    folder, _ = ran(1)
    result = launch("align.cli", "eval", str(folder), "--checkpoints=0,4", "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    archive = {point["step"]: point for point in read_lines(folder / "archive.jsonl")}
    for step in (0, 4):
        assert figures[f"step {step}"]["values"] == archive[step]["values"]
        assert figures[f"step {step}"]["standard_errors"] == archive[step]["standard_errors"]
    refused = launch("align.cli", "eval", str(folder), "--checkpoints=3")
    assert refused.returncode == 2
    assert "it has 0, 2, 4" in refused.stderr


def test_two_processes_train_on_one_batch_together(ran):
    folder, result = ran(2)
    assert "2 process(es)" in result.stdout
    samples = pq.read_table(folder / "samples").to_pylist()
    assert len(list((folder / "samples").glob("*.rank1.parquet"))) == 1
    assert len(samples) == 4 * 16
    metrics = read_lines(folder / "metrics.jsonl")
    for row in metrics:
        values = [s["value/brevity"] for s in samples if s["step"] == row["step"]]
        assert row["objectives/brevity/mean"] == pytest.approx(sum(values) / 16)
    assert read_lines(folder / "archive.jsonl")[0]["prompts"] == 16
    groups = {(s["step"], s["prompt_id"]) for s in samples}
    assert all(sum((s["step"], s["prompt_id"]) == g for s in samples) == 4 for g in groups)  # no group is split


ZERO = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
deepspeed_config: {zero_stage: STAGE, zero3_init_flag: false, zero3_save_16bit_model: true}
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_shards_train_the_same_policy(ran, tmp_path, stage):
    pytest.importorskip("deepspeed")
    file = tmp_path / "zero.yaml"
    file.write_text(ZERO.replace("STAGE", str(stage)))
    sharded = environment(2)
    del sharded["ACCELERATE_USE_CPU"]  # the file says it, in a way that leaves room for DeepSpeed

    def launch_sharded(*arguments: str) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "align.train"]
        return forks.run([*launcher, *arguments], cwd=ROOT, env=sharded, timeout=500)

    plain = read_lines(ran(2)[0] / "metrics.jsonl")
    result = launch_sharded(*overrides(tmp_path / "zero"))  # its exit status is not asked: DeepSpeed's CPU threads now
    assert "trained 4 steps" in result.stdout, result.stderr  # and then abort when the interpreter ends
    for a, b in zip(plain, read_lines(tmp_path / "zero" / "metrics.jsonl"), strict=True):
        for key in ("loss", "entropy", "objectives/accuracy/mean", "objectives/brevity/mean"):
            assert b[key] == pytest.approx(a[key], abs=1e-4)
    shutil.rmtree(tmp_path / "zero" / "checkpoints" / "checkpoint-4")
    result = launch_sharded("--resume", str(tmp_path / "zero"))
    assert "trained 2 steps" in result.stdout, result.stderr
    again = read_lines(tmp_path / "zero" / "metrics.jsonl")
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in plain], abs=1e-4)


@pytest.mark.parametrize("loss", CHOICES["loss_type"])
def test_every_loss_of_trl(make_learner, loss):
    learner = make_learner("--steps=2", "--evaluation.every=0", f"--trl.loss_type={loss}")
    before = [p.clone() for p in learner.model.parameters()]
    learner.train()
    assert learner.state.global_step == 2
    after = list(learner.model.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("combination", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize(
    "estimator", ["grpo", "{type: grpo, scale: none}", "{type: grpo, scale: batch}", "rloo", "reinforce"]
)
def test_every_estimator_and_combination(make_learner, tmp_path, estimator, combination):
    learner = make_learner("--steps=1", "--evaluation.every=0", f"--estimator={estimator}", f"--combination={combination}")
    learner.train()
    advantages = [row["advantage"] for row in pq.read_table(tmp_path / "run" / "samples").to_pylist()]
    assert len(advantages) == 16
    assert any(advantages)
    assert abs(sum(advantages)) < 1e-4


def test_lora_trains_the_adapter_alone_and_can_be_evaluated(make_learner, launch, tmp_path):
    learner = make_learner("--policy.lora.r=4", "--trl.beta=0.1", name="lora")
    before = {n: p.clone() for n, p in learner.model.named_parameters()}
    learner.train()
    for name, parameter in learner.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            assert (parameter != before[name]).any()
        elif not parameter.requires_grad:
            assert (parameter == before[name]).all()
    checkpoint = tmp_path / "lora" / "checkpoints" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    result = launch("align.cli", "eval", str(checkpoint), "--config", QUICKSTART, "--prompts.evaluation.args.count=8")
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout


def test_kl_to_the_reference_is_logged_and_zero_at_first(make_learner, tmp_path):
    make_learner("--trl.beta=0.1", "--trl.learning_rate=1e-2").train()
    kl = [row["kl"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert abs(kl[0]) < 1e-6
    assert kl[-1] > 1e-5


def test_several_updates_and_iterations_per_batch(make_learner, tmp_path):
    make_learner(
        "--learner.updates_per_batch=2", "--learner.iterations_per_batch=2", "--learner.micro_batch_size=4", "--steps=8"
    ).train()
    samples = pq.read_table(tmp_path / "run" / "samples").to_pylist()
    assert {row["step"] for row in samples} == {1, 5}  # a batch is drawn every 2 * 2 steps
    assert len(samples) == 32
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 8


def test_tracking_goes_through_trl(make_learner, tmp_path):
    pytest.importorskip("tensorboard")
    make_learner("--steps=1", "--evaluation.every=0", "--trl.report_to=tensorboard").train()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


# --- what goes wrong on the way -----------------------------------------------------------------------------------------

FRAGILE = """
calls = 0
def fragile(text):
    global calls
    calls += 1
    if calls > 16 * 3 + 16 * 2:  # after three batches of 16, and two evaluations of 16
        raise ConnectionError("the judge is gone")
    return 0.5
"""


def test_a_reward_that_fails_later_stops_the_run_and_loses_nothing(launch, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FRAGILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = "--objectives.accuracy.reward=my_rewards:fragile"
    folder = tmp_path / "run"
    result = run_in(tmp_path, *overrides(folder, reward, "--checkpoint.every=100", "--steps=6"))
    assert result.returncode == 2
    assert (
        "objective 'accuracy' has no value for 16 of 16 samples; the first: ConnectionError: the judge is gone"
        in result.stderr
    )
    assert "Nothing is lost: mend it, then " in result.stderr
    assert f"paretune train --resume {folder}" in result.stderr
    assert (folder / "checkpoints" / "checkpoint-3" / "paretune.json").exists()
    tokens = read_lines(folder / "metrics.jsonl")[-1]["num_tokens"]
    (tmp_path / "my_rewards.py").write_text(FRAGILE.replace("raise", "pass; #"))
    assert run_in(tmp_path, "--resume", str(folder)).returncode == 0
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[3]["num_tokens"] < tokens * 1.6  # the batch that could not be scored was not counted
    (tmp_path / "my_rewards.py").write_text("def fragile(text): return None\n")
    changed = run_in(tmp_path, "--resume", str(folder), "--steps=7", "--objectives.accuracy.missing=neutral")
    assert changed.returncode == 0, changed.stderr
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert (last["step"], last["objectives/accuracy/missing"]) == (7, 1.0)
    assert json.loads((folder / "config.json").read_text())["objectives"]["accuracy"]["missing"] == "neutral"


def test_a_tolerated_failure_is_counted_not_zeroed(tmp_path):
    (tmp_path / "my_rewards.py").write_text("def picky(text):\n    return 1.0 if len(text) % 2 else None\n")
    settings = ("--objectives.accuracy.reward=my_rewards:picky", "--objectives.accuracy.missing=drop_sample")
    assert run_in(tmp_path, *overrides(tmp_path / "run", *settings)).returncode == 0
    row = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert 0 < row["objectives/accuracy/missing"] < 1
    assert row["objectives/accuracy/mean"] == 1.0
    samples = pq.read_table(tmp_path / "run" / "samples").to_pylist()
    missing = [s for s in samples if s["value/accuracy"] is None]
    assert missing
    assert all(s["error/accuracy"] == "no value" and s["advantage"] == 0 for s in missing)


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Train from another working directory, as a user with rewards of their own does."""
    return forks.run(command("align.cli", "train", *arguments), cwd=folder, env=environment(1), timeout=240)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--policy.model=./absent", "'./absent' is not a folder with a config.json"),
        ("--rollout.prompts_per_batch=6", "rollout.prompts_per_batch"),
        ("--prompts.train={type: file, path: absent.jsonl}", "prompts.train: no file 'absent.jsonl'"),
        ("--prompts.train.args.count=0", "prompts.train"),
        ("--rollout.max_tokens=100000", "the model's context holds"),
        ("--objectives.accuracy.reward=no.module:x", "objectives.accuracy: reward 'no.module:x' cannot be imported"),
        ("--trl.optim=newton", "newton"),
        ("--policy.model={adapter}", "holds LoRA weights only"),
    ],
)
def test_mistakes_are_said_before_the_model_loads(launch, tmp_path, override, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    override = override.replace("{adapter}", str(tmp_path / "adapter"))
    more = ["--learner.micro_batch_size=16"] if "prompts_per_batch" in override else []
    result = launch("align.train", *overrides(tmp_path / "run", override, *more))
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
