"""The table of the rewards in the report: how long they took, what was missing and why, how their values were spread."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from align.config import Config

QUANTILES = (0.05, 0.5, 0.95)
REASONS = 3  # most frequent ones that are named
LONGEST = 160  # characters of a reason

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RewardFacts:
    """What is known of one reward after a run.

    Args:
        name: Of the objective.
        reward: What scored it.
        weight: In the last batch; NaN without one.
        seconds: Median over batches.
        call: Seconds of a call: the median, and the median of the batches' 95th percentiles; NaN where not logged.
        missing: Share of all training samples without a value.
        reasons: The most frequent ones, with how many samples had them.
        early: Quantiles (5, 50, 95 %) of the raw values over the first fifth of the steps.
        late: The same over the last fifth.
    """

    name: str
    reward: str
    weight: float
    seconds: float
    call: tuple[float, float]
    missing: float
    reasons: Sequence[tuple[str, int]]
    early: Sequence[float]
    late: Sequence[float]


def reward_facts(config: Config, metrics: Sequence[Row], timings: Sequence[Row], files: Sequence[Path]) -> list[RewardFacts]:
    """Facts of every objective, from the rows of the logs and the sample files of a run."""
    facts = []
    for name, objective in config.objectives.items():
        steps, values, errors = _column(files, name)
        first, last = (float(steps.min()), float(steps.max())) if len(steps) else (0.0, 0.0)
        fifth = (last - first) / 5
        facts.append(
            RewardFacts(
                name=name,
                reward=objective.reward,
                weight=float(metrics[-1].get(f"weights/{name}", math.nan)) if metrics else math.nan,
                seconds=_median(timings, f"time/reward/{name}"),
                call=(_median(timings, f"time/call/{name}/median"), _median(timings, f"time/call/{name}/p95")),
                missing=float(np.isnan(values).mean()) if len(values) else 0.0,
                reasons=[(reason[:LONGEST], count) for reason, count in errors.most_common(REASONS)],
                early=_quantiles(values[steps <= first + fifth]),
                late=_quantiles(values[steps >= last - fifth]),
            )
        )
    return facts


def pauses(timings: Sequence[Row]) -> str:
    """Sentence about the waits for rewards that failed, from the rows of the log; empty where there were none."""
    count, seconds = (math.fsum(row.get(key) or 0.0 for row in timings) for key in ("time/pauses", "time/paused"))
    times = "once" if count == 1 else f"{count:.0f} times"
    return f"The run paused {times} for rewards that failed, for {seconds:,.0f} s in all." if count else ""


def _column(files: Sequence[Path], name: str) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Steps, raw values (NaN where missing) and counts of reasons of all training samples."""
    steps, values, errors = [], [], Counter[str]()
    for file in files:
        table = pq.read_table(file, columns=["step", f"value/{name}", f"error/{name}"])
        steps.append(table["step"].to_numpy())
        values.append(table[f"value/{name}"].to_numpy().astype(float))  # null becomes NaN
        counted = table[f"error/{name}"].drop_null().value_counts().to_pylist()
        errors.update({row["values"]: row["counts"] for row in counted})
    if not files:
        return np.array([]), np.array([]), errors
    return np.concatenate(steps), np.concatenate(values), errors


def _median(rows: Sequence[Row], key: str) -> float:
    found = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return median(found) if found else math.nan


def _quantiles(values: np.ndarray) -> list[float]:
    present = values[np.isfinite(values)]
    return np.quantile(present, QUANTILES).tolist() if len(present) else []


def seconds(value: float) -> str:
    """A time to read; a dash for one that is not known."""
    if not math.isfinite(value):
        return "–"
    return f"{value * 1000:.2g} ms" if value < 1 else f"{value:.3g} s"


def spread(quantiles: Sequence[float]) -> str:
    """The median, and in brackets the 5 and 95 % quantiles; a dash without values."""
    if not quantiles:
        return "–"
    low, middle, high = quantiles
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"
