"""What the report says of reward hacking, from the files of a run alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.config import Config
from align.hacking import HackingWatch
from align.report import write_report
from align.report_hacking import OverOptimization, fit_over_optimization, hacking_table, held_out_falls, replay
from align.runlog import RunFiles
from rewards.types import Objective, RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.page import Page
from tests.test_hacking import GOLD, PROXY, objective

SOURCE = {"type": "function", "function": "rollout.arithmetic:expressions"}
CONFIG = Config(
    output="runs/made-up",
    steps=60,
    policy={"model": "builtin:arithmetic"},
    prompts={"train": SOURCE, "evaluation": SOURCE},
    objectives={"proxy": {"reward": "brevity"}, "gold": {"reward": "arithmetic_accuracy", "missing": "neutral"}},
    weighting={"type": "fixed", "weights": {"proxy": 1, "gold": 0}},
)


def write_run(folder: Path, ranks: tuple[int, ...], batches: int = 45) -> tuple[list[dict], list[tuple[int, str]]]:
    """A run of several processes whose gold falls; what the watch said of it at the time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    objectives, rng, watch = objectives_of(CONFIG), np.random.default_rng(0), HackingWatch()
    files = {rank: RunFiles(folder, rank, ["proxy", "gold"]) for rank in ranks}
    rows, alarms = [], []
    for step in range(1, batches + 1):
        t = step / batches
        raw_NK = np.clip(rng.normal([0.2 + 0.6 * t, 0.8 - 0.6 * t], 0.2, (16 * len(ranks), 2)), 0, 1)
        raw_NK[3, 1] = np.nan
        lengths = rng.integers(1, 30, len(raw_NK))
        metrics, remarks = watch.update(step, RewardMatrix(objectives, raw_NK, {}), lengths, (1.0, 0.0))
        for i, rank in enumerate(ranks):
            part = slice(16 * i, 16 * i + 16)
            samples = tuple(Sample((1,) * n, (), FinishReason.STOP, step, "x") for n in lengths[part].tolist())
            matrix = RewardMatrix(objectives, raw_NK[part], {})
            group = SampleGroup(Prompt("p", "ask", (1,), {}), samples)
            files[rank].samples.write(step, [group], matrix, (1.0, 0.0), np.zeros(16))
        kl, length = 0.01 * t, float(lengths.mean())
        mean = float(np.nanmean(raw_NK[:, 1]))
        row = {"step": step, "kl": kl, "completions/mean_length": length, "objectives/gold/mean": mean, **metrics}
        files[ranks[0]].metrics.append(row)
        rows.append({"step": step, **metrics})
        alarms += [(step, remark) for remark in remarks]
    for file in files.values():
        file.samples.flush()
    return rows, alarms


@pytest.mark.parametrize("ranks", [(0,), (0, 2, 10)])
def test_alarms_are_had_again_from_the_samples_alone(tmp_path, ranks):
    rows, alarms = write_run(tmp_path / "run", ranks)
    watched = replay(list((tmp_path / "run").glob("samples/*.parquet")), objectives_of(CONFIG))
    assert watched.rows == rows  # bit for bit: the samples come in the order of the processes
    assert watched.alarms == alarms
    assert watched.golds == ["gold"]
    assert any("while gold" in text for _, text in alarms)


def test_the_report_shows_them(tmp_path):
    _, alarms = write_run(tmp_path / "run", (0,))
    page = Page(write_report(tmp_path / "run"))
    assert "Scored and never trained on, so nothing but a judge: gold." in page.text
    assert all(f"Step {step} {text}." in page.text for step, text in alarms)
    assert "No alarm was raised" not in page.text
    titles = [figure["title"] for key, figure in page.islands["figures"].items() if key.startswith("hacking")]
    assert titles[0] == "correlation with gold, which is not trained on"
    assert titles[-1] == "gold, not trained on, over the distance from the reference"


def test_the_table_by_hand():
    """Means over the first and the last of four batches: half of them, 2."""
    rows = [
        {"step": i, "correlation/proxy/gold": r, "objectives/gold/at_best": r / 2} for i, r in enumerate((1, 0.8, 0.2, 0))
    ]
    watched = type("W", (), {"rows": rows, "golds": ["gold"]})
    first, second = hacking_table(watched, (PROXY, GOLD))
    assert (first["role"], first["golds"], first["best"]) == ("trained", ["0.90 → 0.10"], "–")
    assert (second["role"], second["golds"], second["best"]) == ("not trained on", ["–"], "0.45 → 0.05")


def test_without_samples_there_is_nothing_to_say():
    watched = replay([], objectives_of(CONFIG))
    assert (watched.rows, watched.alarms) == ([], [])


def archive_of(folder: Path, objective: Objective, *points: tuple[float, float]) -> Archive:
    folder.mkdir()
    archive = Archive(folder / "archive.jsonl", [objective], {}, writes=True)
    for i, (value, error) in enumerate(points):
        archive.append(ParetoPoint(10 * i, {"gold": value}, {"gold": error}, {"gold": 0.0}, 100, 0, ""))
    return archive


def test_held_out_falls_by_hand(tmp_path):
    """.2 / hypot(.03, .04) = 4 > 2.58, the quantile of 1 - .01 / 2; .12 / .05 = 2.4 is not, though above that of .99."""
    fell = held_out_falls(archive_of(tmp_path / "a", GOLD, (0.5, 0.05), (0.6, 0.03), (0.4, 0.04)), [GOLD])
    assert fell == [
        "gold on held-out prompts was 0.6 ± 0.03 at step 10 and is 0.4 ± 0.04 at step 20: "
        "the policy of step 10 may be the better one"
    ]
    assert not held_out_falls(archive_of(tmp_path / "b", GOLD, (0.5, 0.05), (0.6, 0.03), (0.48, 0.04)), [GOLD])
    assert not held_out_falls(archive_of(tmp_path / "c", GOLD, (0.5, 0.05), (math.nan, math.nan)), [GOLD])
    less = objective("gold", maximize=False)
    assert held_out_falls(archive_of(tmp_path / "d", less, (0.4, 0.03), (0.6, 0.04)), [less])
    assert not held_out_falls(archive_of(tmp_path / "e", less, (0.6, 0.03), (0.4, 0.04)), [less])


def test_the_curve_of_over_optimization():
    """With alpha 2 and beta 1 the peak is at exp(2 / 1 - 1) = e, where R = start + e (2 - 1) = start + beta e."""
    curve, distance_T = OverOptimization(0.3, 2.0, 1.0), np.linspace(0, 5, 40)
    assert curve.peak == pytest.approx(math.e)
    assert curve(np.array([0.0, math.e])) == pytest.approx([0.3, 0.3 + math.e])
    assert curve(distance_T).max() <= curve(np.array([curve.peak]))[0]
    fitted = fit_over_optimization(distance_T, curve(distance_T))
    assert (fitted.start, fitted.alpha, fitted.beta) == pytest.approx((0.3, 2.0, 1.0))
    assert fit_over_optimization(np.zeros(9), np.arange(9.0)) is None
    assert math.isinf(OverOptimization(0.0, 1.0, 0.0).peak)
    assert math.isinf(OverOptimization(0.0, 1.0, -1.0).peak)
