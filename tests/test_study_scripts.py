"""Runs of the studies: which are made, gone on with, or taken as they are, and which are refused."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from align.load import load_config
from scripts import study_dpg, study_schemes, study_selftrain
from tests.conftest import QUICKSTART


@pytest.fixture
def commands(monkeypatch) -> list[tuple[str, ...]]:
    """What would be run."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(study_schemes, "paretune", lambda *arguments: seen.append(arguments))
    return seen


def begin(command: tuple[str, ...]) -> None:
    """Leave what a run of this command leaves when it begins."""
    config = load_config(command[2], command[3:])
    folder = Path(config.output)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))


def test_a_run_is_made_gone_on_with_and_taken_as_it_is_but_not_for_another(tmp_path, commands):
    folder = tmp_path / "run"
    study_schemes.train_once(folder, QUICKSTART, ["--steps=3"])
    assert commands == [("train", "--config", QUICKSTART, "--steps=3", f"--output={folder}")]
    begin(commands.pop())
    study_schemes.train_once(folder, QUICKSTART, ["--steps=3"])
    assert commands.pop() == ("train", "--resume", str(folder))
    (folder / "report.html").write_text("complete")
    study_schemes.train_once(folder, QUICKSTART, ["--steps=3"])
    for other, key in (("--steps=4", "steps"), ("--trl.learning_rate=0.1", "steps, trl")):
        with pytest.raises(SystemExit, match=f"run holds a run with other values of {key}: give the same, or another"):
            study_schemes.train_once(folder, QUICKSTART, [other])
    assert not commands


def test_every_study_compares_what_it_is_given(tmp_path, commands):
    trusted = study_selftrain.write_trusted(tmp_path, "built-in")
    runs = [
        lambda more: study_schemes.run("mgda", 1, study_schemes.SCHEMES["mgda"], tmp_path, more),
        lambda more: study_dpg.run("dpg, no baseline", 1, tmp_path, more),
        lambda more: study_selftrain.run("+ entropy", 1, "built-in", tmp_path, trusted, more),
    ]
    for run in runs:
        with suppress(FileNotFoundError):  # nothing has been run that it could read
            run([])
        begin(commands.pop())
        with pytest.raises(SystemExit, match="holds a run with other values of evaluation: give the same"):
            run(["--evaluation.samples_per_prompt=7"])
    assert not commands
