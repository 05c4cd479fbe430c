"""The report of a run: report.html and front.png, made of nothing but the files of its folder. Imports no torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from plotly.offline import get_plotlyjs

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.config import Config
from align.files import replace_text
from align.load import load_config
from align.report_figures import Row, draw_front, figures_of, front_axes
from align.report_hacking import Watched, hacking_figures, hacking_table, held_out_falls, replay
from align.report_rewards import RewardFacts, pauses, reward_facts, seconds, spread
from align.report_samples import FOLDER, MAX_ROWS, Listed, list_chunks, write_chunks
from align.web import island, templates
from rewards.types import Objective


@dataclass(frozen=True)
class RunData:
    """What a run folder holds, as far as the report needs it."""

    folder: Path
    config: Config
    objectives: Sequence[Objective]
    metrics: Sequence[Row]
    timings: Sequence[Row]
    archive: Archive
    watched: Watched
    rewards: Sequence[RewardFacts]

    @property
    def name(self) -> str:
        """The folder's own name, the title of the page."""
        return self.folder.resolve().name

    @property
    def steps_done(self) -> int:
        """Optimiser steps that left metrics."""
        return self.metrics[-1]["step"] if self.metrics else 0


def write_report(folder: Path) -> Path:
    """Write report.html, the samples beside it, and front.png into a run folder, and return the path of the first.

    The run may be finished, interrupted or still going on.

    Raises:
        ValueError: The folder is not a run folder, or one of its files cannot be read.
    """
    run = _read_run(Path(folder))
    page = Path(folder) / "report.html"
    replace_text(page, _render(run, write_chunks(run.folder)))
    draw_front(Path(folder) / "front.png", run.archive, run.objectives)
    return page


def render_report(folder: Path, version: str = "") -> str:
    """The page of a run as text; one with a version asks the server whether there is a newer one, and for its samples.

    Raises:
        ValueError: See `write_report`.
    """
    return _render(_read_run(folder), list_chunks(folder), version)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        ValueError: The folder is not a run folder.
    """
    file = folder / "config.json"
    advice = "give the folder that the key `output` of a run named, for example runs/quickstart"
    if not file.is_file():
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder} is not a run folder: {what}; {advice}")
    try:
        return load_config(str(file))
    except ValueError as error:
        raise ValueError(f"{folder} is not a run folder; {advice}. {error}") from error


def _read_run(folder: Path) -> RunData:
    config = read_config(folder)
    objectives = objectives_of(config)
    samples = sorted(folder.glob("samples/shard-*.rank*.parquet"))
    metrics, timings = read_lines(folder / "metrics.jsonl"), read_lines(folder / "timings.jsonl")
    return RunData(
        folder=folder,
        config=config,
        objectives=objectives,
        metrics=metrics,
        timings=timings,
        archive=Archive(folder / "archive.jsonl", objectives, config.evaluation.reference),
        watched=replay(samples, objectives),
        rewards=reward_facts(config, metrics, timings, samples),
    )


def read_lines(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; none without the file, and a last line that is still being written does not count."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; remove the line") from error
    return rows


# --- the page ---------------------------------------------------------------------------------------------------------


def _render(run: RunData, chunks: Mapping[str, Listed], version: str = "") -> str:
    counts = {kind: sum(rows for _, rows, _, _ in listed) for kind, listed in chunks.items()}
    environment = templates()
    environment.filters |= {"count": lambda n: f"{n:,}", "percent": percent, "seconds": seconds, "spread": spread}
    figures = figures_of(run.objectives, run.metrics, run.archive)
    figures |= hacking_figures(run.watched, run.metrics, run.objectives)
    axes = front_axes(run.archive, run.objectives) if run.archive.points else {}
    names = [objective.name for objective in run.objectives]
    return environment.get_template("report.html").render(
        run=run,
        version=version,
        counts=counts,
        samples_folder=FOLDER,
        facts=_facts(run, counts["training"]),
        table=_table(run),
        hypervolume=_hypervolume_sentence(run),
        missing=_missing_of_training(run),
        pauses=pauses(run.timings),
        watch_table=hacking_table(run.watched, run.objectives),
        falls=held_out_falls(run.archive, [o for o in run.objectives if o.name in run.watched.golds]),
        charts={key: figure["title"] for key, figure in figures.items()},
        islands={
            "figures-data": island(figures),
            "front-data": island(axes),
            "samples-data": island({"folder": FOLDER, "most": MAX_ROWS, "objectives": names, "chunks": chunks}),
        },
        plotly=get_plotlyjs(),
    )


def _facts(run: RunData, samples: int) -> list[tuple[str, str]]:
    """The numbers at the head of the page."""
    facts = [("steps", f"{run.steps_done:,} of {run.config.steps:,}"), ("training samples", f"{samples:,}")]
    archive = run.archive
    if archive.usable():
        starts_untrained = archive.usable()[0].step == 0
        first, final = archive.hypervolume(1), archive.hypervolume()
        if starts_untrained:
            facts.append(("hypervolume at the start", f"{first:.3g}"))
        facts.append(("hypervolume of the archive", f"{final:.3g}"))
        if starts_untrained and first > 0:
            facts.append(("ratio", f"{final / first:.3g} ×"))
    seconds = [row["step_time"] for row in run.timings if row.get("step_time") is not None]
    return [*facts, ("median time per step", f"{median(seconds):.2g} s")] if seconds else facts


def _table(run: RunData) -> list[dict[str, Any]]:
    """A row for every evaluated policy, as text."""
    on_front = {point.step for point in run.archive.front()}
    return [
        {
            "step": point.step,
            "values": [mean_and_error(point, objective) for objective in run.objectives],
            "missing": ", ".join(f"{name} {percent(share)}" for name, share in point.missing.items() if share > 0),
            "on_front": point.step in on_front,
            "checkpoint": point.checkpoint if (run.folder / point.checkpoint).is_dir() else "",  # others are deleted in time
        }
        for point in run.archive.points
    ]


def mean_and_error(point: ParetoPoint, objective: Objective) -> str:
    """As many decimals as the span of the bounds asks for."""
    value, error = point.values[objective.name], point.standard_errors[objective.name]
    if not math.isfinite(value):
        return "missing"
    span = objective.bounds[1] - objective.bounds[0]
    decimals = max(0, 3 - math.floor(math.log10(span)))
    return f"{value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if math.isfinite(error) else "")


def _hypervolume_sentence(run: RunData) -> str:
    reference = run.config.evaluation.reference
    corner = ", ".join(f"{o.name} {reference.get(o.name, o.bounds[0 if o.maximize else 1]):g}" for o in run.objectives)
    return f"share of the possible volume that the policies dominate, from the reference point on ({corner})"


def _missing_of_training(run: RunData) -> float | None:
    """Largest share of missing values of any step and objective; None before the first step."""
    keys = [f"objectives/{objective.name}/missing" for objective in run.objectives]
    return max((row[key] for row in run.metrics for key in keys if row.get(key) is not None), default=None)


def percent(share: float) -> str:
    """A share above 0 is never shown as 0 %."""
    return "below 0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"
