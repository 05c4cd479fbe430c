"""Killed with SIGKILL at any step and resumed, a run ends as if nothing had happened: bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from align.checkpoint import complete_checkpoints
from align.load import load_config
from align.runfolder import Run, resume_command
from tests import forks
from tests.conftest import QUICKSTART, ROOT, command, environment, overrides, read_lines

RUN = ("--steps=8", "--checkpoint.every=3", "--evaluation.every=3", "--checkpoint.keep=1")
MID_BATCH = (
    *RUN, "--learner.updates_per_batch=2", "--learner.iterations_per_batch=2", "--learner.micro_batch_size=4",
    "--selftrain={filter: {at_least: {accuracy: 1}}, weights: [entropy, {type: feasible, threshold: .3}, {type: loss}], "
    "prompts: [entropy, shuffled], pool: {per_prompt: 1, size: 9}, term: {samples: 4}}",
)  # fmt: skip
LAST = "{step: 6, weights: {accuracy: 0, brevity: 1, clarity: 0}}"
KL = (*RUN, "--trl.beta=0.05", "--weighting.type=schedule", f"--weighting.milestones=[{LAST}]")

CUT_DOWN = (*MID_BATCH, "--selftrain.pool.size=2")  # so small that its file is cut down on the way
DPG = (
    *RUN, '--objectives={one_step: {reward: regex_match, args: {pattern: "[^;]*;[^;]*"}}}',
    "--weighting={type: fixed, weights: {one_step: 1}}", "--estimator={type: dpg, moments: {one_step: 0.5}, "
    "normaliser: batch, proposal: adaptive, every: 2, fit: {prompts: 16, samples_per_prompt: 16}}",
)  # fmt: skip


def starter(processes: int) -> type[subprocess.Popen]:
    """Several processes are started by the launchers that users have, and one without importing."""
    return forks.Fork if processes == 1 else subprocess.Popen


def start(folder: Path, *more: str, processes: int = 1) -> subprocess.Popen:
    return starter(processes)(
        command("align.train", *overrides(folder, *more), processes=processes),
        cwd=ROOT, env=environment(processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill_at(process: subprocess.Popen, folder: Path, step: int) -> None:
    """SIGKILL the whole session once `step` steps are done (or a checkpoint is being written)."""
    deadline = time.monotonic() + 200
    while steps_done(folder) < step:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def resume(folder: Path, processes: int) -> subprocess.CompletedProcess:
    if processes == 1:
        return forks.run(command("align.train", "--resume", str(folder)), cwd=ROOT, env=environment(1), timeout=240)
    return subprocess.run(
        command("align.train", "--resume", str(folder), processes=processes),
        cwd=ROOT, env=environment(processes), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def assert_equal(a: Path, b: Path) -> None:
    """Parameters, optimiser, weights, metrics, samples, held-out samples and archive, byte for byte."""
    files = sorted(p.relative_to(a) for p in [*a.glob("samples/*"), *a.glob("evaluation/*")])
    assert files
    last = complete_checkpoints(a / "checkpoints")[-1][1].relative_to(a)
    state = [last / name for name in ("model.safetensors", "scheduler.pt", "trainer_state.json", "paretune.json")]
    pool = [Path("pool.jsonl")] if (a / "pool.jsonl").exists() else []
    for file in [*files, *pool, Path("metrics.jsonl"), Path("archive.jsonl"), *state]:
        assert (a / file).read_bytes() == (b / file).read_bytes(), f"{file} differs"
    ours, theirs = (torch.load(folder / last / "optimizer.pt", weights_only=True)["state"] for folder in (a, b))
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])
    assert sorted(p.name for p in (a / "samples").iterdir()) == sorted(p.name for p in (b / "samples").iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Uninterrupted runs, one for each way of running, made once."""
    made = {}

    def run(more: tuple[str, ...], processes: int) -> Path:
        if (more, processes) not in made:
            folder = tmp_path_factory.mktemp("straight") / "run"
            assert start(folder, *more, processes=processes).wait(timeout=240) == 0
            made[more, processes] = folder
        return made[more, processes]

    return run


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_killed_at_a_step(tmp_path, straight, step):
    folder = tmp_path / "run"
    kill_at(start(folder, *RUN), folder, step)
    result = resume(folder, processes=1)
    assert result.returncode == 0, result.stderr
    assert_equal(straight(RUN, 1), folder)


@pytest.mark.parametrize(
    "more", [MID_BATCH, KL], ids=["in the middle of a batch, self-training", "with a reference and a schedule"]
)
def test_killed_in_other_settings(tmp_path, straight, more):
    folder = tmp_path / "run"
    kill_at(start(folder, *more), folder, 5)
    assert resume(folder, processes=1).returncode == 0
    assert_equal(straight(more, 1), folder)


@pytest.mark.parametrize("step", [2, 5])
def test_killed_in_two_processes(tmp_path, straight, step):
    folder = tmp_path / "run"
    kill_at(start(folder, *RUN, processes=2), folder, step)
    result = resume(folder, processes=2)
    assert result.returncode == 0, result.stderr
    assert_equal(straight(RUN, 2), folder)


@pytest.mark.parametrize("more", [CUT_DOWN, DPG], ids=["in the middle of a batch, self-training", "dpg"])
def test_two_processes_go_on_from_an_older_checkpoint(launch, tmp_path, more):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    result = launch("align.train", *overrides(straight, *more, "--checkpoint.keep=2"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    shutil.copytree(straight, folder)
    (folder / "checkpoints" / "checkpoint-8" / "paretune.json").unlink()
    result = launch("align.train", "--resume", str(folder), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "checkpoint-6" in result.stdout
    assert_equal(straight, folder)
    if more == CUT_DOWN:
        head, *rows = read_lines(folder / "pool.jsonl")
        assert head["since"] == 3
        assert sum(row["step"] <= 3 for row in rows) == 2  # the pool as it was then


@pytest.mark.parametrize("older", [True, False], ids=["for an older one", "for the start"])
def test_a_checkpoint_cut_off_by_the_kill_is_passed_over(tmp_path, straight, older):
    folder = tmp_path / "run"
    kept = (*RUN, "--checkpoint.keep=9")
    shutil.copytree(straight(kept, 1), folder)
    last = folder / "checkpoints" / "checkpoint-8"
    (last / "paretune.json").unlink()
    (last / "model.safetensors").write_bytes(b"cut off")
    if not older:
        shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
        shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    result = resume(folder, processes=1)
    assert result.returncode == 0, result.stderr
    assert ("checkpoint-6" if older else "from the start") in result.stdout
    assert_equal(straight(kept, 1), folder)


@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGINT)], ids=["ctrl-c", "term", "two"]
)
def test_who_is_stopped_saves_says_how_to_go_on_and_loses_nothing(tmp_path, straight, processes, number):
    folder = tmp_path / "it's a run"  # what is said can be pasted all the same
    process = starter(processes)(
        command("align.train", *overrides(folder, *RUN), processes=processes), cwd=ROOT, env=environment(processes),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    while steps_done(folder) < 4:
        time.sleep(0.005)
    os.killpg(process.pid, number)  # as a terminal does
    output = process.communicate(timeout=120)[0]
    if processes == 1:
        assert process.returncode == 128 + number, output
    else:
        assert process.returncode != 0, output  # the launchers end by the signal, and call nothing a failure of ours
        assert "ChildFailedError" not in output
    stopped_at = complete_checkpoints(folder / "checkpoints")[-1][0]
    assert 4 <= stopped_at < 8
    told = re.search(rf"stopped after step {stopped_at}; go on with: (.*)", output)[1]
    launched = (
        "accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m align.train"
    )
    assert f"{'paretune train' if processes == 1 else launched} --resume " in told
    pasted = subprocess.run(["bash", "-c", told], cwd=ROOT, env=environment(processes), capture_output=True, text=True)
    assert pasted.returncode == 0, pasted.stderr
    assert_equal(straight(RUN, processes), folder)


def test_the_command_to_go_on_with_is_that_of_this_environment(tmp_path, monkeypatch):
    run = Run(load_config(QUICKSTART), Path("a run"), False, "", False, False)
    own = Path(sys.executable).parent
    foreign = tmp_path / "paretune"
    foreign.write_text("")
    foreign.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{own}:{tmp_path}")
    assert resume_command(run) == "paretune train --resume 'a run'"
    monkeypatch.setenv("PATH", f"{tmp_path}:{own}")
    assert resume_command(run) == f"{os.path.relpath(own)}/paretune train --resume 'a run'"
    monkeypatch.setenv("WORLD_SIZE", "3")  # by a launcher that is not accelerate's
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resume_command(run) == "accelerate launch --cpu --num_processes 3 -m align.train --resume 'a run'"


def test_a_complete_run_says_so(straight):
    result = resume(straight(RUN, 1), processes=1)
    assert result.returncode == 0
    assert "is complete: 8 steps" in result.stdout


def test_what_cannot_be_resumed_is_refused(tmp_path, straight):
    folder = straight(RUN, 1)
    arguments = command("align.train", *overrides(folder, *RUN, "--seed=1"), "--resume", str(folder))
    other = forks.run(arguments, cwd=ROOT, env=environment(1), timeout=240)
    assert other.returncode == 2
    assert "was started with another configuration (differs in seed)" in other.stderr

    result = resume(folder, processes=2)
    assert result.returncode != 0
    assert "was written by 1 processes, this is 2: launch with --num_processes 1" in result.stderr

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | {"seed": 5}
    (copy / "config.json").write_text(json.dumps(config))
    result = resume(copy, processes=1)
    assert result.returncode == 2
    assert "was written by another configuration than" in result.stderr


def test_a_run_folder_is_never_overwritten(straight):
    folder = straight(RUN, 1)
    before = read_lines(folder / "metrics.jsonl")
    again = forks.run(command("align.train", *overrides(folder, *RUN)), cwd=ROOT, env=environment(1), timeout=240)
    assert again.returncode == 2
    assert f"{folder} already holds a run. Go on with it by --resume {folder}" in again.stderr
    assert read_lines(folder / "metrics.jsonl") == before


def test_an_evaluation_that_was_cut_off_is_made_up_for(launch, tmp_path):
    """Evaluations come before checkpoints, and one that fails leaves a checkpoint without: of the last step, too."""
    folder = tmp_path / "run"
    assert launch("align.train", *overrides(folder)).returncode == 0
    archive = folder / "archive.jsonl"
    whole = archive.read_text(encoding="utf-8")
    archive.write_text("".join(whole.splitlines(keepends=True)[:-1]), encoding="utf-8")
    result = launch("align.train", "--resume", str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    assert archive.read_text(encoding="utf-8") == whole
    assert "is complete" in launch("align.train", "--resume", str(folder)).stdout
