"""Sweeps: what runs a grid stands for, and running, resuming and printing them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align import sweep as sweeping
from align.checkpoint import complete_checkpoints
from align.cli import main
from align.load import load_config
from align.sweep import folder_name, last_line, split_values, steps_done
from tests import forks
from tests.conftest import QUICKSTART, ROOT, SMALL, environment, read_lines

FEW = ("--steps=3", "--evaluation.every=0", "--no-front")
WEIGHTS = "weighting.weights={accuracy: 1, brevity: 1, clarity: 0}|{accuracy: .5, brevity: .5, clarity: 0}"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("fixed,gradient", ["fixed", "gradient"]),
        ("{a: 1, b: 2}|{a: 2, b: 1}", ["{a: 1, b: 2}", "{a: 2, b: 1}"]),
        ("{a: [1, 2], b: 'x|}'}, 3 | [4,5]", ["{a: [1, 2], b: 'x|}'}", "3", "[4,5]"]),
        ("1e-4", ["1e-4"]),
    ],
)
def test_values_are_told_apart_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_names_of_folders():
    assert folder_name([]) == ""
    assert folder_name([("weighting.type", "fixed"), ("trl.learning_rate", "1e-4")]) == "fixed-learning_rate-1e-4-"
    assert folder_name([("weighting.weights", "{a: 0.5, b: -1}")]) == "a-0.5-b--1-"
    assert folder_name([("weighting", "{type: mgda, weights: {a: 0.5}}")]) == "mgda-a-0.5-"
    names = {folder_name([("prompts.system", "x" * 90 + end)]) for end in "ab"}
    assert {len(name) for name in names} == {88}
    assert len(names) == 2
    assert folder_name([("prompts.chat", "true")]) == "chat-true-"


class Fake:
    """A sweep with a launcher that does not train."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = folder / "sweep"
        self.told(fail=(), stop=())
        python = [sys.executable, str(ROOT / "tests" / "sweep_run.py"), str(folder / "control.json")]
        self.launch = f"--launch={shlex.join(['env', f'PYTHONPATH={ROOT}', *python])}"

    def told(self, fail, stop) -> None:
        (self.folder / "control.json").write_text(json.dumps({"fail": list(fail), "stop": list(stop)}))

    def run(self, *arguments: str) -> int:
        return main(["sweep", QUICKSTART, f"--output={self.output}", self.launch, *FEW, *arguments])

    def calls(self) -> list[str]:
        """Runs since the last time it was asked, and whether each was resumed."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_failures_stop_nobody_and_the_same_command_goes_on(fake: Fake, capsys):
    fake.told(fail=["saturation-seed0"], stop=["fixed-seed1"])
    grid = ("--grid=weighting.type=fixed,saturation", "--seeds", "0", "1")
    assert fake.run(*grid) == 1
    assert fake.calls() == [
        f"{name} False" for name in ("fixed-seed0", "fixed-seed1", "saturation-seed0", "saturation-seed1")
    ]
    captured = capsys.readouterr()
    assert "4 runs in" in captured.out
    log = fake.output / "saturation-seed0.log"
    assert f"failed: {fake.output / 'saturation-seed0'} ({log}: error: nothing works today)" in captured.err
    assert log.read_text().startswith("working\n")
    assert captured.err.count("failed: ") == 2  # one was not complete when it ended

    fake.told(fail=(), stop=())
    assert fake.run(*grid) == 0
    assert fake.calls() == ["fixed-seed1 True", "saturation-seed0 False"]
    assert "4 runs in" in (printed := capsys.readouterr().out)
    assert "2 of them complete already" in printed
    assert load_config(str(fake.output / "saturation-seed1" / "config.json")).weighting.type == "saturation"
    assert load_config(str(fake.output / "saturation-seed1" / "config.json")).seed == 1

    assert fake.run(*grid) == 0
    assert fake.calls() == []
    assert fake.run(*grid, "--steps=4", "--print") == 0  # longer: all of them go on
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert all("--steps=4" in line and "--resume=" in line for line in lines)


def test_printed_commands_are_those_that_are_run(fake: Fake, capsys):
    grid = ("--grid=weighting.type=fixed,saturation", f"--grid={WEIGHTS}")
    assert fake.run(*grid, "--print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert not fake.output.exists()
    subprocess.run(lines[3], shell=True, cwd=ROOT, check=False)
    made = load_config(str(fake.output / "saturation-accuracy-.5-brevity-.5-clarity-0-seed0" / "config.json"))
    assert (made.weighting.type, made.weighting.weights["brevity"]) == ("saturation", 0.5)
    assert fake.run(*grid, "--print") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == lines[:3]
    assert "1 of 4 runs are complete and not printed" in captured.err


def test_commands_without_a_launcher_are_those_of_the_readme(tmp_path: Path, capsys):
    arguments = ["sweep", QUICKSTART, f"--output={tmp_path / 'a b'}", "--print"]
    assert main(arguments) == 0
    assert shlex.split(capsys.readouterr().out)[1:] == [
        "train", f"--config={QUICKSTART}", "--seed=0", f"--output={tmp_path / 'a b' / 'seed0'}"
    ]  # fmt: skip
    assert main([*arguments, "--processes=2"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[1:7] == ["launch", "--cpu", "--num_processes", "2", "-m", "align.train"]
    rounds = ["sweep", str(ROOT / "configs" / "rounds.yaml"), f"--output={tmp_path / 'r'}", "--print"]
    assert main(rounds) == 0
    assert shlex.split(capsys.readouterr().out)[1] == "rounds"


def test_a_run_made_with_another_configuration_is_refused(fake: Fake, capsys):
    assert fake.run() == 0
    assert fake.run("--rollout.max_tokens=30") == 2
    message = f"{fake.output / 'seed0'} is a run with another configuration (differs in rollout.max_tokens)"
    assert message in capsys.readouterr().err
    (fake.output / "seed0" / "config.json").unlink()
    assert fake.run() == 2
    assert f"{fake.output / 'seed0'} exists and is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid=weighting.type"], "--grid weighting.type: write key=value,value"),
        (["--grid=weighting.type=fixed,none"], "weighting.type: 'none' does not exist"),
        (["--grid=nothing=1,2"], "unknown key 'nothing'"),
        (["--grid=seed=1,2"], "--grid seed=1,2: give --seeds in its place"),
        (["--grid=output=a,b"], "--grid output=a,b: give --output in its place"),
        (["--grid=weighting.weights={a: 1,{b: 2}"], "cannot tell the values '{a: 1,{b: 2}' apart"),
        (["--grid=weighting.type=fixed,,gradient"], "cannot tell the values 'fixed,,gradient' apart"),
        (["--seeds", "1", "1"], "two runs of the sweep would have the folder"),
        (["--processes=0"], "--processes 0: give 1 or more"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(tmp_path: Path, capsys, arguments, message):
    assert main(["sweep", QUICKSTART, f"--output={tmp_path / 'out'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_how_far_a_run_is(tmp_path: Path):
    assert steps_done(tmp_path) == 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert steps_done(tmp_path) == 2
    metrics.write_text('{"ste')
    assert steps_done(tmp_path) == 0
    (tmp_path / "log").write_text("trained\n 50%|##\r100%|####\n\n")
    assert last_line(tmp_path / "log") == "100%|####"


def watch_fronts(monkeypatch, status: int) -> list[list[str]]:
    """Commands of fronts that would have been drawn, each ending with a status."""
    fronts = []

    def run(command, **_):
        fronts.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(sweeping, "run", run)
    return fronts


def test_a_front_that_cannot_be_drawn_is_said(fake: Fake, monkeypatch, capsys):
    fronts = watch_fronts(monkeypatch, status=2)
    fake.told(fail=["seed1"], stop=())
    arguments = ["sweep", QUICKSTART, f"--output={fake.output}", fake.launch, "--steps=3", "--evaluation.every=0"]
    assert main([*arguments, "--seeds", "0"]) == 1
    assert f"could not be drawn: paretune front {fake.output / 'seed0'}" in capsys.readouterr().err
    assert len(fronts) == 1
    assert main([*arguments, "--seeds", "1"]) == 1
    assert "the front has no complete run to show" in capsys.readouterr().err
    assert len(fronts) == 1


def of_forks(monkeypatch, processes: int) -> None:
    """Runs of sweeps are processes of their own all the same."""
    monkeypatch.setattr(sweeping, "Popen", lambda command, **options: forks.Fork(
        command, cwd=ROOT, env=environment(processes), **options))  # fmt: skip


def test_ctrl_c_stops_the_run_too_and_the_same_command_goes_on(tmp_path: Path, monkeypatch):
    """For real: a signal to all processes of a sweep, as a terminal sends it."""
    small = [text for text in SMALL if not text.startswith("--steps")]
    sweep = ["sweep", QUICKSTART, f"--output={tmp_path}", f"--launch={sys.executable}", "--no-front", *small]
    process = forks.Fork(
        [sys.executable, "-m", "tests.sweep_forked", *sweep, "--steps=500", "--seeds", "0", "1"], cwd=ROOT,
        env=environment(1), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "seed0"
    while not steps_done(run) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "stopped; the same command goes on" in output
    stopped_at = complete_checkpoints(run / "checkpoints")[-1][0]
    assert steps_done(run) == stopped_at
    assert 1 <= stopped_at < 500
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)
    assert not (tmp_path / "seed1").exists()
    of_forks(monkeypatch, processes=1)
    assert main([*sweep, f"--steps={stopped_at + 2}"]) == 0
    log = (tmp_path / "seed0.log").read_text()
    assert f"stopped after step {stopped_at}; go on with: " in log
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == list(range(1, stopped_at + 3))


def test_a_sweep_of_runs_with_two_processes(tmp_path: Path, monkeypatch):
    of_forks(monkeypatch, processes=2)
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"  # what accelerate's comes to
    small = [text for text in SMALL if not text.startswith("--steps")]
    sweep = ["sweep", QUICKSTART, f"--output={tmp_path}", f"--launch={launch}", "--no-front", *small]
    assert main([*sweep, "--steps=2"]) == 0
    assert json.loads((tmp_path / "seed0" / "environment.json").read_text())["processes"] == 2
    assert steps_done(tmp_path / "seed0") == 2


def test_launchers_are_those_of_this_environment_or_refused(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = ["sweep", QUICKSTART, f"--output={tmp_path / 'out'}", "--print"]
    assert main([*sweep, "--launch=accelerate launch --cpu --num_processes 2"]) == 0
    program, *words = shlex.split(capsys.readouterr().out)
    assert Path(program).resolve() == Path(sys.executable).with_name("accelerate").resolve()
    assert words[:6] == ["launch", "--cpu", "--num_processes", "2", "-m", "align.train"]
    assert main([*sweep, "--launch=acelerate launch"]) == 2
    assert "--launch acelerate launch: there is no program 'acelerate'" in capsys.readouterr().err


def test_a_sweep_trains_and_ends_in_a_front(tmp_path: Path, monkeypatch):
    """For real: two runs, complete."""
    of_forks(monkeypatch, processes=1)
    fronts = watch_fronts(monkeypatch, status=0)
    small = [text for text in SMALL if not text.startswith(("--weighting", "--steps"))]
    arguments = ["sweep", QUICKSTART, f"--output={tmp_path}", f"--launch={sys.executable}", "--steps=2", *small]
    assert main([*arguments, "--grid=weighting.type=schedule,variation", "--seeds", "3"]) == 0
    runs = [tmp_path / "schedule-seed3", tmp_path / "variation-seed3"]
    assert all(steps_done(run) == 2 for run in runs)
    assert "trained 2 steps" in (tmp_path / "variation-seed3.log").read_text()
    assert fronts == [[sys.executable, "-m", "align.cli", "front", *map(str, runs), f"--output={tmp_path / 'front'}"]]
