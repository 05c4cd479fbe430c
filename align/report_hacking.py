"""The section of the report on reward hacking: the watch over a run, from its sample files, and what is drawn of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.archive import Archive, ParetoPoint
from align.hacking import HALF, HackingWatch, correlation_of
from align.report_figures import COLOURS, MUTED, Chart, Row, curves
from rewards.types import Objective, RewardMatrix

CHANCE = 0.01  # of taking noise for a held-out fall


@dataclass(frozen=True)
class Watched:
    """What the watch says of a run, batch by batch.

    Args:
        rows: What it logged, each with its `step`.
        alarms: Step and sentence of each alarm.
        golds: Names of the objectives that were never trained on.
    """

    rows: Sequence[Row]
    alarms: Sequence[tuple[int, str]]
    golds: Sequence[str]


def replay(files: Sequence[Path], objectives: Sequence[Objective]) -> Watched:
    """Show the samples of a run to the watch, batch by batch: the alarms are those that were raised while it trained.

    Args:
        files: `samples/shard-*.rank*.parquet`, of all processes.
        objectives: Of the run.
    """
    watch, rows, alarms = HackingWatch(), [], []
    for table in _shards(files, [o.name for o in objectives]):
        steps = table["step"].to_numpy()
        raw_NK, weights_NK = (
            np.stack([table[f"{kind}/{o.name}"].to_numpy().astype(float) for o in objectives], axis=1)  # null becomes NaN
            for kind in ("value", "weight")
        )
        for step in np.unique(steps).tolist():
            batch = steps == step
            matrix = RewardMatrix(objectives, raw_NK[batch], {})
            metrics, remarks = watch.update(step, matrix, table["tokens"].to_numpy()[batch], weights_NK[batch][0])
            rows.append({"step": step, **metrics})
            alarms += [(step, remark) for remark in remarks]
    trained = watch.memory.trained
    return Watched(rows, alarms, [o.name for o in objectives if o.name not in trained])


def _shards(files: Sequence[Path], names: Sequence[str]) -> Iterator[pa.Table]:
    """The numbers of each shard, in order of steps; within a step the processes in order, as they were when it trained."""
    columns = ["step", "tokens", *(f"value/{name}" for name in names), *(f"weight/{name}" for name in names)]
    for _, shard in groupby(sorted(files, key=place), key=lambda file: place(file)[0]):
        yield pa.concat_tables([pq.read_table(file, columns=columns) for file in shard])


def place(file: Path) -> tuple[int, int]:
    """Numbers of the shard and of the process: shard-000003.rank1.parquet -> (3, 1); step-000040.parquet -> (40, 0)."""
    shard, rank, *_ = [*file.name.removesuffix(".parquet").split("."), "rank0"]
    return int(shard.rpartition("-")[2]), int(rank.removeprefix("rank"))


# --- held-out prompts -------------------------------------------------------------------------------------------------


def held_out_falls(archive: Archive, golds: Sequence[Objective]) -> list[str]:
    """A sentence for each gold that the last policy has significantly less of, on held-out prompts, than an earlier one.

    z = (best - last) / sqrt(se_best^2 + se_last^2) against the quantile of 1 - `CHANCE` / (M - 1), as the best of M - 1
    earlier policies was picked. That both saw the same prompts makes the test more careful.
    """
    sentences = []
    for gold in golds:
        points = [p for p in archive.points if math.isfinite(p.values[gold.name] + p.standard_errors[gold.name])]
        if len(points) < 2:
            continue
        *earlier, last = points
        best = max(earlier, key=lambda p: p.values[gold.name] * (1 if gold.maximize else -1))
        fall = (best.values[gold.name] - last.values[gold.name]) * (1 if gold.maximize else -1)
        error = math.hypot(best.standard_errors[gold.name], last.standard_errors[gold.name])
        if fall > error * NormalDist().inv_cdf(1 - CHANCE / len(earlier)):
            sentences.append(
                f"{gold.name} on held-out prompts was {_with_error(best, gold)} at step {best.step} and is "
                f"{_with_error(last, gold)} at step {last.step}: the policy of step {best.step} may be the better one"
            )
    return sentences


def _with_error(point: ParetoPoint, objective: Objective) -> str:
    return f"{point.values[objective.name]:.3g} ± {point.standard_errors[objective.name]:.2g}"


# --- over-optimisation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverOptimization:
    """R(d) = start + d (alpha - beta ln d), gold reward over the distance d = sqrt(KL) (2210.10760, reinforcement learning).

    The paper sets the reward of the first policy to 0; here it is fitted too. Its KL is that of whole completions; another
    unit of d gives a curve of the same form.
    """

    start: float
    alpha: float
    beta: float

    def __call__(self, d: np.ndarray) -> np.ndarray:
        """The gold reward at some distances; its limit at 0."""
        return self.start + d * (self.alpha - self.beta * np.log(np.maximum(d, 1e-12)))

    @property
    def peak(self) -> float:
        """Where the gold is best: R'(d) = alpha - beta - beta ln d = 0; infinite where the curve only rises (beta <= 0)."""
        return math.exp(min(self.alpha / self.beta - 1, 700.0)) if self.beta > 0 else math.inf


def fit_over_optimization(distance_T: np.ndarray, gold_T: np.ndarray) -> OverOptimization | None:
    """Least squares over T batches; None where fewer than three distances differ.

    Args:
        distance_T: sqrt(KL) from the reference policy, 0 or more.
        gold_T: Mean gold reward, larger is better.
    """
    curvature_T = -distance_T * np.log(np.maximum(distance_T, 1e-12))
    design = np.stack([np.ones_like(distance_T), distance_T, curvature_T], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(design, gold_T)
    return OverOptimization(*solution.tolist()) if rank == 3 else None


# --- what is shown ----------------------------------------------------------------------------------------------------


def hacking_table(watched: Watched, objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    """A row for every objective, as text: means over the first and the last batches."""
    kinds = {"best": "objectives/{}/at_best", "worst": "objectives/{}/at_worst", "length": "objectives/{}/with_length"}
    rows = []
    for objective in objectives:
        cells = {kind: _first_and_last(watched.rows, [key.format(objective.name)]) for kind, key in kinds.items()}
        with_golds = [
            _first_and_last(watched.rows, [f"correlation/{objective.name}/{gold}", f"correlation/{gold}/{objective.name}"])
            for gold in watched.golds
        ]
        role = "not trained on" if objective.name in watched.golds else "trained"
        rows.append({"name": objective.name, "role": role, "golds": with_golds, **cells})
    return rows


def _first_and_last(rows: Sequence[Row], keys: Sequence[str]) -> str:
    found = [row[key] for row in rows for key in keys if key in row]
    if not found:
        return "–"
    count = min(HALF, max(1, len(found) // 2))
    return f"{sum(found[:count]) / count:.2f} → {sum(found[-count:]) / count:.2f}"


def hacking_figures(watched: Watched, metrics: Sequence[Row], objectives: Sequence[Objective]) -> dict[str, Chart]:
    """Figures of the section, by key."""
    names = [o.name for o in objectives]
    proxies = [name for name in names if name not in watched.golds]
    charts = []
    for gold in watched.golds:
        pairs = {proxy: f"correlation/{proxy}/{gold}" for proxy in proxies}
        rows = [{"step": row["step"], **_pairs(row, pairs, gold)} for row in watched.rows]
        charts.append(_chart(f"correlation with {gold}, which is not trained on", rows, pairs))
    charts.append(_chart("correlation with the length", watched.rows, {n: f"objectives/{n}/with_length" for n in names}))
    charts.append(_chart("share of samples at the best value", watched.rows, {n: f"objectives/{n}/at_best" for n in names}))
    charts += [_over_optimization_figure(o, metrics) for o in objectives if o.name in watched.golds]
    return {f"hacking:{i}": chart for i, chart in enumerate(chart for chart in charts if chart)}


def _pairs(row: Row, pairs: Mapping[str, str], gold: str) -> dict[str, float]:
    found = {key: correlation_of(row, proxy, gold) for proxy, key in pairs.items()}
    return {key: value for key, value in found.items() if value is not None}


def _chart(title: str, rows: Sequence[Row], series: Mapping[str, str]) -> Chart | None:
    """Lines over steps of what there is."""
    there = {label: key for label, key in series.items() if any(key in row for row in rows)}
    return curves(title, rows, there) if there else None


def _over_optimization_figure(gold: Objective, metrics: Sequence[Row]) -> Chart | None:
    """Gold over the distance from the reference policy, where that is logged, with the fitted curve."""
    keys = ("kl", "completions/mean_length", f"objectives/{gold.name}/mean")
    found = [[row[key] for key in keys] for row in metrics if all(row.get(key) is not None for key in keys)]
    if len(found) < HALF:
        return None
    kl_T, length_T, raw_T = np.array(found).T
    distance_T = np.sqrt(np.maximum(kl_T * length_T, 0.0))
    curve = fit_over_optimization(distance_T, raw_T if gold.maximize else -raw_T)
    dots = {"type": "scatter", "mode": "markers", "name": "training batch", "x": distance_T.tolist(), "y": raw_T.tolist()}
    dots |= {"marker": {"color": MUTED, "size": 5}, "hovertemplate": "%{x:.3g}: %{y:.4g}"}
    data, title = [dots], f"{gold.name}, not trained on, over the distance from the reference"
    if curve is not None:
        xs = np.linspace(0, distance_T.max(), 60)
        ys = curve(xs) if gold.maximize else -curve(xs)
        fitted = f"fit, best at {curve.peak:.3g}" if curve.peak < distance_T.max() else "fit"
        data.append({"type": "scatter", "mode": "lines", "name": fitted, "x": xs.tolist(), "y": ys.tolist()})
        data[-1]["line"] = {"color": COLOURS[0], "width": 1.8}
    return {"title": title, "data": data, "layout": {"showlegend": True, "xaxis": {"title": {"text": "√KL"}}}}
