"""The page that compares runs: what they logged over their steps, one line a run. Nothing is evaluated; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.config import Config
from align.files import replace_text
from align.report import mean_and_error, percent, read_config, read_lines
from align.report_curves import COLOURS, Chart, Row, line, series_of
from align.report_figures import axis_title, error_bars, finite
from align.web import island, templates
from rewards.types import Objective

BORDERS = {"solid": "solid", "dash": "dashed", "dot": "dotted"}  # plotly's name of a dash, and that of CSS


@dataclass(frozen=True)
class Compared:
    """What of a run is compared, and how its lines look."""

    name: str
    config: Config
    objectives: Mapping[str, Objective]
    metrics: Sequence[Row]
    archive: Archive
    colour: str
    dash: str

    @property
    def border(self) -> str:
        """Its line in CSS."""
        return f"{BORDERS[self.dash]} {self.colour}"


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of several runs, and return its path.

    Raises:
        ValueError: A folder is not a run folder, one of its files cannot be read, or an objective is not the same in all.
    """
    runs = _read(folders)
    names = list(dict.fromkeys(name for run in runs for name in run.objectives))
    figures = _figures(runs, names)
    environment = templates()
    environment.filters["percent"] = percent
    page = environment.get_template("compare.html").render(
        runs=runs,
        names=names,
        table=[_row(run, names) for run in runs],
        charts={key: figure["title"] for key, figure in figures.items()},
        islands={"figures-data": island(figures), "front-data": island({})},
        plotly=get_plotlyjs(),
    )
    replace_text(path, page)
    return path


def _read(folders: Sequence[Path]) -> list[Compared]:
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    runs: list[Compared] = []
    for i, (folder, name) in enumerate(zip(folders, names, strict=True)):
        config = read_config(folder)
        objectives = objectives_of(config)
        archive = Archive(folder / "archive.jsonl", objectives, config.evaluation.reference)
        look = COLOURS[i % len(COLOURS)], list(BORDERS)[(i + i // len(COLOURS)) % len(BORDERS)]
        metrics = read_lines(folder / "metrics.jsonl")
        runs.append(Compared(name, config, {o.name: o for o in objectives}, metrics, archive, *look))
        for other in runs[:-1]:
            _check_alike(other, runs[-1])
    return runs


def _check_alike(one: Compared, two: Compared) -> None:
    """An objective that both have is measured alike."""
    for name in one.objectives.keys() & two.objectives.keys():
        first, second = one.config.objectives[name], two.config.objectives[name]
        for key in ("reward", "args", "direction"):
            found = [getattr(section, key) for section in (first, second)]
            if found[0] != found[1]:
                raise ValueError(
                    f"objectives.{name}.{key} is {found[0]} in {one.name} and {found[1]} in {two.name}: their values cannot "
                    "be drawn over each other. Compare runs that measure alike, or evaluate their policies on one "
                    "configuration with paretune front --config"
                )


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(runs: Sequence[Compared], names: Sequence[str]) -> dict[str, Chart]:
    """Those that have lines, by section and number."""
    missing = "share of {} that is missing"
    sections = {
        "held_out": [_held_out(runs, name) for name in names] + [_hypervolume(runs)],
        "training": [_over_steps(runs, f"{name}, training batch", f"objectives/{name}/mean") for name in names],
        "weights": [_over_steps(runs, f"weight of {name}", f"weights/{name}") for name in (*names, "kl")],
        "missing": [_over_steps(runs, missing.format(name), f"objectives/{name}/missing", any) for name in names],
    }
    drawn = {section: [chart for chart in charts if chart["data"]] for section, charts in sections.items()}
    return {f"{section}:{i}": chart for section, charts in drawn.items() for i, chart in enumerate(charts)}


def _chart(title: str, lines: Sequence[dict[str, Any]], from_zero: bool) -> Chart:
    layout = {"showlegend": False, "xaxis": {"title": {"text": "step"}}}
    layout |= {"yaxis": {"rangemode": "tozero" if from_zero else "normal"}}
    return {"title": title, "data": list(lines), "layout": layout}


def _line(run: Compared, steps: Sequence[int], values: Sequence[float | None]) -> dict[str, Any]:
    drawn = line(steps, values, escape(run.name, quote=False), run.colour)  # plotly reads tags in names
    drawn["line"]["dash"] = run.dash
    return drawn


def _over_steps(runs: Sequence[Compared], title: str, key: str, wanted: Callable[[Sequence], bool] = len) -> Chart:
    """One line a run that logged it; none at all unless one of them has `wanted` values."""
    found = [(run, *series_of(run.metrics, key)) for run in runs]
    drawn = [_line(*one) for one in found if one[1]] if any(wanted(values) for _, _, values in found) else []
    return _chart(title, drawn, not key.endswith("mean"))


def _held_out(runs: Sequence[Compared], name: str) -> Chart:
    """Held-out means with their standard errors."""
    lines, objectives = [], [run.objectives[name] for run in runs if name in run.objectives]
    for run in (run for run in runs if name in run.objectives and run.archive.points):
        points = run.archive.points
        drawn = _line(run, [p.step for p in points], [finite(p.values[name]) for p in points])
        bars = error_bars([finite(p.standard_errors[name]) for p in points])
        lines.append(drawn | {"mode": "lines+markers", "error_y": bars})
    return _chart(axis_title(objectives[0]), lines, False)


def _hypervolume(runs: Sequence[Compared]) -> Chart:
    """Of what a run had reached by each evaluation; only where all runs share objectives and reference point."""
    shared = all((r.objectives, _reference(r)) == (runs[0].objectives, _reference(runs[0])) for r in runs)
    lines = []
    for run in runs if shared else ():
        usable = run.archive.usable()
        if usable:
            lines.append(_line(run, [p.step for p in usable], [run.archive.hypervolume(i + 1) for i in range(len(usable))]))
            lines[-1]["mode"] = "lines+markers"
    return _chart("hypervolume of what was reached by then", lines, True)


def _reference(run: Compared) -> Mapping[str, float]:
    return run.config.evaluation.reference


# --- the table --------------------------------------------------------------------------------------------------------


def _row(run: Compared, names: Sequence[str]) -> dict[str, Any]:
    """What a run came to, as text."""
    points, last = run.archive.points, run.metrics[-1] if run.metrics else {}
    weights = [last.get(f"weights/{name}") for name in names]
    missing = [row[key] for row in run.metrics for name in names if (key := f"objectives/{name}/missing") in row]
    return {
        "run": run,
        "steps": f"{last.get('step', 0):,} of {run.config.steps:,}",
        "evaluated": f"{points[-1].step:,}" if points else "–",
        "values": [_value(points, run.objectives.get(name)) for name in names],
        "weights": ["–" if weight is None else f"{weight:.3g}" for weight in weights],
        "missing": max((share for share in missing if share is not None), default=0.0),
        "hypervolume": f"{run.archive.hypervolume():.3g}" if run.archive.usable() else "–",
    }


def _value(points: Sequence[ParetoPoint], objective: Objective | None) -> str:
    return mean_and_error(points[-1], objective) if points and objective else "–"
