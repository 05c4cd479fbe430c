"""The files of a run: rows, shards, cutting back, checkpoints and their pruning."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from align.checkpoint import RunState, complete_checkpoints, prune, read_state, write_state
from align.runlog import STEPS_PER_SHARD, JsonLines, RunFiles, SampleWriter, sample_rows
from rewards.types import Missing, Objective, RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.conftest import read_lines

OBJECTIVES = [Objective("a", True, (0.0, 1.0), Missing.NEUTRAL), Objective("b", True, (0.0, 1.0), Missing.FAIL)]


def test_json_lines_have_no_nan(tmp_path: Path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1, "x": float("nan"), "y": float("inf"), "z": 0.1})
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1, "x": None, "y": None, "z": 0.1}]


def test_json_lines_are_cut_back_to_a_step(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    lines.truncate(3)  # nothing there yet
    for step in (1, 2, 3):
        lines.append({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "x"')  # a crash in the middle of a line
    lines.truncate(3)
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]
    lines.truncate(1)
    assert [row["step"] for row in read_lines(path)] == [1]


def batch(step: int) -> tuple:
    samples = tuple(Sample((5, 6), (), FinishReason.STOP, step - 1, text) for text in (f"x{step}", "y\x00\U0001f600"))
    raw = np.array([[0.5, 1.0], [np.nan, 0.0]])
    return [SampleGroup(Prompt("p7", "ask", (1,), {}), samples)], RewardMatrix(OBJECTIVES, raw, {(1, 0): "took too long"})


def test_sample_rows_hold_every_value_and_reason():
    rows = sample_rows(3, *batch(3), weights_K=(0.25, 0.75), advantages_N=[1.5, -1.5])
    assert rows[0] == {
        "step": 3, "prompt_id": "p7", "sample": 0, "prompt": "ask", "text": "x3", "tokens": 2, "finish_reason": "stop",
        "policy_version": 2, "advantage": 1.5, "value/a": 0.5, "value/b": 1.0, "error/a": None, "error/b": None,
        "weight/a": 0.25, "weight/b": 0.75,
    }  # fmt: skip
    assert rows[1]["value/a"] is None
    assert rows[1]["error/a"] == "took too long"
    assert "weight/a" not in sample_rows(3, *batch(3), (), ())[0]


def write_steps(folder: Path, first: int, last: int, writer: SampleWriter | None = None) -> SampleWriter:
    writer = writer or SampleWriter(folder, 0, ["a", "b"])
    for step in range(first, last + 1):
        writer.write(step, *batch(step), (0.5, 0.5), [0.1 * step, 0])
    writer.flush()
    return writer


def content(folder: Path) -> dict[str, list]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("stop", [1, STEPS_PER_SHARD - 1, STEPS_PER_SHARD, STEPS_PER_SHARD + 1, 2 * STEPS_PER_SHARD + 3])
def test_shards_do_not_depend_on_where_a_run_was_cut(tmp_path: Path, stop):
    last = 2 * STEPS_PER_SHARD + 5
    write_steps(tmp_path / "straight", 1, last)
    write_steps(tmp_path / "cut", 1, min(stop + 9, last))  # got further than its checkpoint
    resumed = SampleWriter(tmp_path / "cut", 0, ["a", "b"])
    resumed.resume(stop)
    write_steps(tmp_path / "cut", stop + 1, last, resumed)
    assert content(tmp_path / "cut") == content(tmp_path / "straight")
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_resuming_from_the_start_clears_everything(tmp_path: Path):
    write_steps(tmp_path, 1, STEPS_PER_SHARD + 2)
    SampleWriter(tmp_path, 1, ["a", "b"]).resume(-1)
    assert len(content(tmp_path)) == 2  # another process's
    SampleWriter(tmp_path, 0, ["a", "b"]).resume(-1)
    assert content(tmp_path) == {}


def test_resuming_from_the_start_clears_what_more_processes_left(tmp_path: Path):
    for rank in range(3):
        write_steps(tmp_path / "samples", 1, 2, SampleWriter(tmp_path / "samples", rank, ["a", "b"]))
    RunFiles(tmp_path, 0, ["a", "b"]).resume(-1)
    assert list((tmp_path / "samples").iterdir()) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, complete: bool = True) -> RunState:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("weights")
    state = RunState(step, 2 * step, 1, "abc", {"weights_K": [0.1, 0.9], "step_scale": 1.0, "memory": {"x": 1e-17}})
    if complete:
        write_state(checkpoint, state)
    return state


def test_states_survive_the_file(tmp_path: Path):
    state = save(tmp_path, 5)
    assert read_state(tmp_path / "checkpoint-5") == state


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path: Path):
    save(tmp_path, 9)
    save(tmp_path, 10)
    save(tmp_path, 100, complete=False)
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [9, 10]
    with pytest.raises(ValueError, match="checkpoint-100 is not a complete checkpoint"):
        read_state(tmp_path / "checkpoint-100")


def test_an_unreadable_state_is_named(tmp_path: Path):
    save(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "paretune.json").write_text(json.dumps({"step": 5}))
    with pytest.raises(ValueError, match=r"paretune.json cannot be read"):
        read_state(tmp_path / "checkpoint-5")


def test_prune_keeps_the_newest_and_the_front(tmp_path: Path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    prune(tmp_path, keep=2, also={20, 35})
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [20, 40, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-40", "checkpoint-50"]
