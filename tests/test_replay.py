"""Replays of logged observations: by hand, from several processes, from runs that were cut off, and refusals.

That a replay of a run's own scheme gives its own weights, bit for bit, is in tests/test_scheme_runs.py, for every scheme.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.cli import main
from align.load import load_config
from align.replay import CANNOT_TELL, read_logged, replay
from align.runlog import JsonLines, SampleWriter
from rewards.types import RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.conftest import QUICKSTART

BASE = (
    "--objectives={accuracy: {reward: arithmetic_accuracy}, brevity: {reward: arithmetic_clarity, missing: neutral}}",
    "--weighting={type: fixed, weights: {accuracy: 1, brevity: 1}}",
    "--rollout.prompts_per_batch=2",
    "--rollout.samples_per_prompt=2",
    "--combination=sum_then_normalize",
    "--steps=4",
)  # fmt: skip
ONE = [[1.0, 0.2], [0.0, 0.4], [1.0, 0.6], [0.0, 0.8]]  # (N, K) of a batch
TWO = [[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [0.0, 0.5]]


def group(size: int) -> SampleGroup:
    sample = Sample((1,), (-0.5,), FinishReason.STOP, 0, "#1")
    return SampleGroup(Prompt("p", "1=?", (1,), {}), (sample,) * size)


def make_run(folder: Path, batches, *more: str, steps_per_batch: int = 1, ranks=(0,)) -> Path:
    """A run folder with these raw values; its log says that the weights were .5 and .5 all the time."""
    config = load_config(QUICKSTART, [*BASE, f"--output={folder}", *more])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    objectives = objectives_of(config)
    share = 4 // len(ranks)
    for place, rank in enumerate(ranks):
        writer = SampleWriter(folder / "samples", rank, [o.name for o in objectives])
        for number, values in enumerate(batches):
            rows = np.array(values, dtype=float)[place * share : (place + 1) * share]
            matrix = RewardMatrix(objectives, rows, {})
            writer.write(1 + number * steps_per_batch, [group(share)], matrix, [0.5, 0.5], np.zeros(share))
        writer.flush()
    log = JsonLines(folder / "metrics.jsonl")
    for step in range(1, 1 + len(batches) * steps_per_batch):
        weighted = {"weights/accuracy": 0.5, "weights/brevity": 0.5, "step_scale": 1.0}
        log.append({"step": step, "loss": 0.0, **(weighted if (step - 1) % steps_per_batch == 0 else {})})
    return folder


def replayed(folder: Path, *overrides: str):
    own = str(folder / "config.json")
    return replay(read_logged(folder, load_config(own)), load_config(own, overrides))


def test_by_hand(tmp_path):
    """Saturation, gamma 1: w is in proportion to 1 - mean."""
    found = replayed(make_run(tmp_path / "run", [ONE, TWO]), "--weighting.type=saturation")
    # batch 1: means .5 and .5; batch 2: means .75 and .5, so .25 : .5
    assert found.replayed["weights/accuracy"] == pytest.approx([1 / 2, 1 / 3])
    assert found.replayed["weights/brevity"] == pytest.approx([1 / 2, 2 / 3])
    assert found.replayed["weighting/saturation/accuracy"] == pytest.approx([0.5, 0.75])
    assert found.real["weights/accuracy"] == [0.5, 0.5]
    assert found.largest_difference() == (pytest.approx(1 / 6), "weights/accuracy", 2)
    assert not found.own


def test_a_missing_value_is_not_0(tmp_path):
    values = [[1.0, np.nan], [0.0, np.nan], [1.0, 0.5], [1.0, np.nan]]
    found = replayed(make_run(tmp_path / "run", [values]), "--weighting.type=saturation")
    assert found.replayed["weighting/saturation/brevity"] == [0.5]
    # 1 - .75 : 1 - .5
    assert found.replayed["weights/accuracy"] == pytest.approx([1 / 3])


def test_a_log_with_a_value_missing_that_may_not_be_missing_now(tmp_path):
    """A resumed run may have another policy for missing values than the one that it began with."""
    values = [[np.nan, 0.0], [0.0, 0.25], [1.0, 0.25], [1.0, 0.25]]  # accuracy is not to be missing: the sample is left out
    found = replayed(make_run(tmp_path / "run", [values]), "--weighting.type=saturation")
    assert found.replayed["weighting/saturation/brevity"] == [0.25]
    assert found.replayed["weighting/saturation/accuracy"] == pytest.approx([2 / 3])


def test_held_out_vectors_are_seen_when_the_run_saw_them(tmp_path):
    run = make_run(tmp_path / "run", [ONE, ONE, ONE])
    objectives = objectives_of(load_config(str(run / "config.json")))
    archive = Archive(run / "archive.jsonl", objectives, {}, writes=True)
    for step, accuracy in ((0, 0.5), (2, 0.8)):
        table = {"accuracy": accuracy, "brevity": 0.5}
        archive.append(ParetoPoint(step, table, dict.fromkeys(table, 0.01), dict.fromkeys(table, 0.0), 4, 4 * step, ""))
    found = replayed(run, "--weighting.type=hypervolume_gradient")
    # w is in proportion to 1 / v: equal at (.5, .5); at (.8, .5), from the third batch on, 1.25 : 2
    assert found.replayed["weights/accuracy"] == pytest.approx([0.5, 0.5, 1.25 / 3.25])


def test_a_batch_of_several_steps_is_one_move(tmp_path):
    run = make_run(tmp_path / "run", [TWO, ONE], "--learner.updates_per_batch=2", steps_per_batch=2)
    found = replayed(run, "--weighting={type: schedule, weights: {accuracy: 1, brevity: 0}, "
                     "milestones: [{step: 4, weights: {accuracy: 0, brevity: 1}}]}")  # fmt: skip
    assert found.steps == [1, 3]
    assert found.replayed["weights/accuracy"] == [1.0, 0.5]  # of steps 0 and 2: those taken before
    assert not found.notes


def test_the_parts_of_processes_come_in_the_order_of_ranks(tmp_path):
    """Ten comes after two; groups are put together again as they were gathered."""
    folder = make_run(tmp_path / "run", [ONE], ranks=(2, 10))
    ((_, raw_NK),) = read_logged(folder, load_config(str(folder / "config.json"))).batches
    assert raw_NK.tolist() == ONE


def test_what_cannot_be_read_is_said_with_its_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", [ONE, TWO, ONE])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2], '{"step": 9, "loss": 0.1}', '{"st']))
    assert main(["replay", str(run), "--weighting.type=saturation"]) == 0
    printed = capsys.readouterr().out
    assert "metrics.jsonl, line 2 is not a line of metrics: skipped" in printed
    assert "metrics.jsonl, line 5 is not a line of metrics: skipped" in printed
    assert "metrics.jsonl lacks the real weights of 1 batches, the first at step 2" in printed
    assert "samples/ ends at step 3 and metrics.jsonl at step 9: the run was cut off" in printed
    assert "– → 0.3333" in printed


def test_a_replay_ends_before_a_batch_that_is_not_there(tmp_path):
    run = make_run(tmp_path / "whole", [ONE, TWO, ONE], ranks=(0, 1))
    config = load_config(str(run / "config.json"))
    (run / "samples" / "shard-000000.rank1.parquet").unlink()
    with pytest.raises(ValueError, match="no whole batch of samples"):
        read_logged(run, config)
    gap = make_run(tmp_path / "gap", [ONE, TWO], steps_per_batch=2)
    logged = read_logged(gap, load_config(str(gap / "config.json")))
    assert [step for step, _ in logged.batches] == [1]
    assert logged.notes == ["samples/ lacks the batch of step 2: the replay ends before it"]


def test_files_and_what_they_cannot_tell(tmp_path, capsys):
    run = make_run(tmp_path / "run", [ONE, TWO])
    files = [f"--json={tmp_path / 'r.json'}", f"--png={tmp_path / 'r.png'}"]
    assert main(["replay", str(run), "--weighting.type=hypervolume_gradient", "--weighting.vector=batches", *files]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "r.json").read_text())
    assert CANNOT_TELL in printed
    assert figures["cannot_tell"] == CANNOT_TELL
    assert figures["steps"] == [1, 2]
    assert set(figures["real"]) == {"weights/accuracy", "weights/brevity", "step_scale"}
    assert figures["replayed_weighting"]["type"] == "hypervolume_gradient"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_that_the_scheme_does_not_give_is_noticed(tmp_path, capsys):
    run = make_run(tmp_path / "run", [ONE], "--weighting={type: fixed, weights: {accuracy: 3, brevity: 1}}")
    assert main(["replay", str(run)]) == 0
    assert "largest difference: 0.25" in (printed := capsys.readouterr().out)
    assert "the run's own scheme should give none" in printed


def test_closeness_to_the_reference_is_a_weight_too(tmp_path):
    scheme = "--weighting={type: lagrangian, constraints: {accuracy: {at_least: 0.9}}, optimize: kl}"
    found = replayed(make_run(tmp_path / "run", [ONE]), scheme, "--combination=estimate_then_sum")
    total = [found.replayed[key][0] for key in ("weights/accuracy", "weights/kl")]
    assert sum(total) == pytest.approx(1)
    assert found.real["weights/kl"] == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weighting.type=gradient"], "of the objectives' gradients, and metrics.jsonl of the run has none"),
        (["--weighting.type=hypervolume"], "looks at held-out vectors, and archive.jsonl of the run has none"),
        (["--steps=3"], "--steps=3: a replay changes weighting and combination alone"),
        (["--weighting.type=none"], "weighting.type: 'none' does not exist"),
        (["--weighting.weights={accuracy: 1}"], "weighting.weights gives no weight for 'brevity'"),
        (["--json=absent/x.json"], "absent/x.json: there is no folder absent"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, capsys, arguments, message):
    assert main(["replay", str(make_run(tmp_path / "run", [ONE])), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_has_no_weights_is_refused(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run folder: it has no config.json" in capsys.readouterr().err
    target = "--estimator={type: dpg, moments: {accuracy: 0.9}}"
    assert main(["replay", str(make_run(tmp_path / "dpg", [ONE], target))]) == 2
    assert "uses no weights, so there is nothing to replay" in capsys.readouterr().err
    picture = make_run(tmp_path / "run", [ONE])
    assert main(["replay", str(picture), f"--png={tmp_path / 'x.gif7'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (picture / "samples" / "shard-000000.rank0.parquet").write_bytes(b"cut off")
    assert main(["replay", str(picture)]) == 2
    assert "shard-000000.rank0.parquet cannot be read" in capsys.readouterr().err
