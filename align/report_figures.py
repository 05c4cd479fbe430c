"""The figures of the report: plain dictionaries in plotly's figure schema for the page, and the picture front.png."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from align.archive import Archive, ParetoPoint
from align.config import Config
from align.pareto import nondominated
from rewards.types import Objective

Row = Mapping[str, Any]  # a line of metrics.jsonl
Chart = dict[str, Any]  # "title", and plotly's "data" and "layout"

COLOURS = ("#3b82c4", "#d9772b", "#2f9e6e", "#9467c8", "#d1495b", "#1b9aaa", "#b38f1d", "#7f8894")  # on white and on black
SCALE = ("#5b6ee1", "#c4569a", "#f0883e")  # from the first step to the last
MUTED = "#8a939c"
OTHER, ON_FRONT, INITIAL = "other policies", "on the Pareto front", "initial policy"  # kinds of points
MAX_LABELS = 12  # points on the front that are labelled with their step
CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "kl": "KL divergence from the reference policy",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "groups/effective": "share of groups with a spread in rewards",
    "learning_rate": "learning rate",
    "policy_age": "age of the sampling policy (steps)",
}
ONLY_IF_IT_CHANGES = ("learning_rate", "policy_age")


def figures_of(
    config: Config, objectives: Sequence[Objective], metrics: Sequence[Row], archive: Archive
) -> dict[str, Chart]:
    """Every figure there is data for; the part of a key before the colon names the section of the page."""
    figures = {}
    if archive.points:
        figures["front:0"] = (
            _front_figure(archive, objectives) if len(objectives) > 1 else _value_figure(archive, objectives[0])
        )
    for k, objective in enumerate(objectives if metrics else ()):
        figures[f"objectives:{k}"] = _objective_figure(objective, COLOURS[k % len(COLOURS)], metrics, archive.points)
    names = [objective.name for objective in objectives]
    if any(_ever_above(metrics, f"objectives/{name}/missing") for name in names):
        series = {name: f"objectives/{name}/missing" for name in names}
        figures["missing:0"] = _curves("share of missing values", metrics, series)
    if metrics:
        figures["weights:0"] = _curves("weights", metrics, {name: f"weights/{name}" for name in names})
        figures |= {f"weights:{i + 1}": chart for i, chart in enumerate(_scheme_figures(metrics, names))}
    keys = [key for key in CURVES if _changes(metrics, key) or (key not in ONLY_IF_IT_CHANGES and _series(metrics, key)[0])]
    return figures | {f"curves:{i}": _curves(CURVES[key], metrics, {"": key}) for i, key in enumerate(keys)}


# --- over steps -------------------------------------------------------------------------------------------------------


def _series(metrics: Iterable[Row], key: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of a metric, of the rows that have it; a value that could not be had is None, a gap in the line."""
    rows = [row for row in metrics if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _changes(metrics: Iterable[Row], key: str) -> bool:
    return len(set(_series(metrics, key)[1])) > 1


def _ever_above(metrics: Iterable[Row], key: str, limit: float = 0.0) -> bool:
    return any(value is not None and value > limit for value in _series(metrics, key)[1])


def _curves(title: str, metrics: Sequence[Row], series: Mapping[str, str]) -> Chart:
    """Lines over steps, by label; one without a label stands alone."""
    data = []
    for i, (label, key) in enumerate(series.items()):
        steps, values = _series(metrics, key)
        data.append(_line(steps, values, label, COLOURS[i % len(COLOURS)] if label else MUTED))
    return {"title": title, "data": data, "layout": {"showlegend": len(data) > 1, "xaxis": {"title": {"text": "step"}}}}


def _line(steps: Sequence[int], values: Sequence[float | None], label: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines" if len(steps) > 1 else "markers",
        "x": list(steps),
        "y": list(values),
        "name": label,
        "line": {"color": colour, "width": 1.8},
        "marker": {"color": colour},
        "hovertemplate": "step %{x}: %{y:.4g}" + ("<extra></extra>" if not label else ""),
    }


def _scheme_figures(metrics: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """step_scale where it is not constant 1, and the scheme's own numbers: one line, or one per objective."""
    figures = []
    if any(value != 1 for value in _series(metrics, "step_scale")[1]):
        figures.append(_curves("step scale (multiplies the advantages)", metrics, {"": "step_scale"}))
    keys = dict.fromkeys(key for row in metrics for key in row if key.startswith("weighting/"))
    for quantity in dict.fromkeys(key.split("/")[1] for key in keys):
        per_objective = {name: f"weighting/{quantity}/{name}" for name in names if f"weighting/{quantity}/{name}" in keys}
        figures.append(_curves(f"{quantity} (of the scheme)", metrics, per_objective or {"": f"weighting/{quantity}"}))
    return figures


def _objective_figure(objective: Objective, colour: str, metrics: Sequence[Row], points: Sequence[ParetoPoint]) -> Chart:
    """Mean of every training batch, and the held-out means with their standard errors."""
    steps, means = _series(metrics, f"objectives/{objective.name}/mean")
    held_out = [p for p in points if math.isfinite(p.values[objective.name])]
    markers = {
        "type": "scatter",
        "mode": "markers",
        "name": "held out",
        "x": [p.step for p in held_out],
        "y": [p.values[objective.name] for p in held_out],
        "error_y": _error_bars([_finite(p.standard_errors[objective.name]) for p in held_out]),
        "marker": {"color": colour, "size": 8, "symbol": "circle", "line": {"width": 1.5}},
        "hovertemplate": "step %{x}: %{y:.4g}",
    }
    training = {**_line(steps, means, "training batch", colour), "opacity": 0.65}
    layout = {"showlegend": bool(held_out), "xaxis": {"title": {"text": "step"}}}
    return {"title": axis_title(objective), "data": [training, markers] if held_out else [training], "layout": layout}


def _value_figure(archive: Archive, objective: Objective) -> Chart:
    """The one objective of every evaluated policy over steps."""
    chart = _objective_figure(objective, COLOURS[0], (), archive.points)
    return {**chart, "data": chart["data"][1:], "layout": {**chart["layout"], "showlegend": False}}


def axis_title(objective: Objective) -> str:
    """Name and direction."""
    return f"{objective.name} ({'larger' if objective.maximize else 'smaller'} is better)"


def _error_bars(errors: Sequence[float | None]) -> dict[str, Any]:
    return {"type": "data", "array": list(errors), "color": MUTED, "thickness": 1, "width": 0}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


# --- the front --------------------------------------------------------------------------------------------------------


def widest_axes(archive: Archive, objectives: Sequence[Objective]) -> list[int]:
    """The objectives from the largest spread over the usable points, as a share of the bounds, to the smallest."""
    if not archive.usable():
        return list(range(len(objectives)))
    return np.argsort(-np.ptp(archive.vectors_MK(), axis=0), kind="stable").tolist()


def staircase(points: Sequence[ParetoPoint], x: Objective, y: Objective) -> tuple[list[float], list[float]]:
    """Corners, in raw units, of the border of what the points dominate in two objectives."""
    vectors_M2 = np.array([point.vector_K((x, y)) for point in points])
    if not len(vectors_M2):
        return [], []
    front = [points[i] for i in np.argsort(vectors_M2[:, 0]) if nondominated(vectors_M2)[i]]
    xs, ys = [front[0].values[x.name]], [front[0].values[y.name]]
    for point in front[1:]:
        xs += [xs[-1], point.values[x.name]]
        ys += [point.values[y.name]] * 2
    return xs, ys


def front_axes(archive: Archive, objectives: Sequence[Objective]) -> dict[str, Any]:
    """What the page needs to draw the front in any two objectives.

    Returns:
        `names` and `titles` of the objectives, `shown` the names of the two to begin with, `traces` per objective the
        values and errors of each kind of point, `stairs` per pair of objectives the corners.
    """
    kinds = _kinds(archive)
    stairs: dict[str, Any] = {objective.name: {} for objective in objectives}
    for a, b in permutations(objectives, 2):
        stairs[a.name][b.name] = staircase(archive.usable(), a, b)
    return {
        "names": [o.name for o in objectives],
        "titles": {o.name: axis_title(o) for o in objectives},
        "shown": [o.name for o in _shown(archive, objectives)],
        "traces": {
            o.name: [
                {key: [_finite(getattr(p, key)[o.name]) for p in points] for key in ("values", "standard_errors")}
                for points in kinds.values()
            ]
            for o in objectives
        },
        "stairs": stairs,
    }


def _shown(archive: Archive, objectives: Sequence[Objective]) -> list[Objective]:
    return [objectives[k] for k in sorted(widest_axes(archive, objectives)[:2])]


def _kinds(archive: Archive) -> dict[str, list[ParetoPoint]]:
    """Points by how they are drawn; each is of one kind."""
    on_front = {point.step for point in archive.front()}
    trained = [point for point in archive.points if point.step > 0]
    return {
        OTHER: [p for p in trained if p.step not in on_front],
        ON_FRONT: [p for p in trained if p.step in on_front],
        INITIAL: [p for p in archive.points if p.step == 0],
    }


def _front_figure(archive: Archive, objectives: Sequence[Objective]) -> Chart:
    """Trace 0 is the staircase, the others are the kinds of points, in the two objectives with the largest spread."""
    axes = front_axes(archive, objectives)
    x, y = axes["shown"]
    corners = axes["stairs"][x][y]
    name = "front" if len(objectives) == 2 else "front in these two"
    line = {"color": MUTED, "width": 1.5, "dash": "dot"}
    stairs = {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": corners[0],
        "y": corners[1],
        "line": line,
        "hoverinfo": "skip",
    }
    data = [stairs, *(_cloud(kind, points, objectives, archive) for kind, points in _kinds(archive).items())]
    for trace, x_numbers, y_numbers in zip(data[1:], axes["traces"][x], axes["traces"][y], strict=True):
        trace |= {"x": x_numbers["values"], "error_x": _error_bars(x_numbers["standard_errors"])}
        trace |= {"y": y_numbers["values"], "error_y": _error_bars(y_numbers["standard_errors"])}
    layout = {"xaxis": {"title": {"text": axes["titles"][x]}}, "yaxis": {"title": {"text": axes["titles"][y]}}}
    return {"title": "evaluated policies", "data": data, "layout": layout}


def _cloud(kind: str, points: Sequence[ParetoPoint], objectives: Sequence[Objective], archive: Archive) -> dict[str, Any]:
    """Trace of one kind of points, without coordinates: the step is their colour."""
    look = {
        OTHER: {"size": 8, "opacity": 0.6},
        ON_FRONT: {"size": 11, "line": {"width": 1.5}},
        INITIAL: {"size": 12, "symbol": "diamond"},
    }
    labels = [str(p.step) for p in points] if kind == ON_FRONT and len(points) <= MAX_LABELS else []
    colours = {
        "color": [p.step for p in points],
        "colorscale": [[i / (len(SCALE) - 1), colour] for i, colour in enumerate(SCALE)],
        "cmin": 0,
        "cmax": max(1, archive.points[-1].step),
        "showscale": kind == OTHER,
        "colorbar": {"title": {"text": "step"}, "thickness": 10, "outlinewidth": 0},
    }
    return {
        "type": "scatter",
        "mode": "markers+text" if labels else "markers",
        "name": kind,
        "marker": {**colours, **look[kind]},
        "text": labels,
        "textposition": "top right",
        "hovertext": [_hover(p, objectives) for p in points],
        "hoverinfo": "text",
    }


def _hover(point: ParetoPoint, objectives: Sequence[Objective]) -> str:
    lines = [f"<b>step {point.step}</b>"]
    for objective in objectives:
        value, error = point.values[objective.name], point.standard_errors[objective.name]
        number = f"{value:.4g} ± {error:.2g}" if math.isfinite(value) else "missing"
        lines.append(f"{objective.name}: {number}")
    return "<br>".join(lines)


# --- front.png --------------------------------------------------------------------------------------------------------


def draw_front(path: Path, archive: Archive, objectives: Sequence[Objective]) -> None:
    """A picture of the front in the two objectives with the largest spread; others are text and colour."""
    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    if not archive.usable():
        axes.axis("off")
        axes.text(0.5, 0.5, "no evaluated policy has a value for every objective", ha="center", color=MUTED, fontsize=13)
    else:
        _style(axes)
        (_draw_plane if len(objectives) > 1 else _draw_values)(axes, archive, objectives)
    figure.savefig(path)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)


def _draw_values(axes: Axes, archive: Archive, objectives: Sequence[Objective]) -> None:
    name, points = objectives[0].name, archive.usable()
    values, errors = (
        [table[name] for table in tables] for tables in zip(*((p.values, p.standard_errors) for p in points), strict=True)
    )
    axes.errorbar([p.step for p in points], values, yerr=errors, color=COLOURS[0], marker="o", capsize=0, ecolor=MUTED)
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel(axis_title(objectives[0]), fontsize=13)


def _draw_plane(axes: Axes, archive: Archive, objectives: Sequence[Objective]) -> None:
    order = widest_axes(archive, objectives)
    x, y = _shown(archive, objectives)
    colour = objectives[order[2]] if len(order) > 2 else None
    usable = archive.usable()
    shades = [point.values[colour.name] if colour else point.step for point in usable]
    limits = {"vmin": min(shades), "vmax": max(shades), "cmap": LinearSegmentedColormap.from_list("steps", SCALE)}
    axes.plot(*staircase(usable, x, y), color=MUTED, linewidth=1.4, linestyle=":", zorder=1)
    looks = (
        {"s": 50, "alpha": 0.6},
        {"s": 110, "edgecolors": "#1d2126", "linewidths": 1.6},
        {"s": 110, "marker": "D", "edgecolors": "#1d2126"},
    )
    for (kind, points), look in zip(_kinds(archive).items(), looks, strict=True):
        points = [p for p in points if p in usable]
        if not points:
            continue
        xs, ys = ([p.values[o.name] for p in points] for o in (x, y))
        errors = [[p.standard_errors[o.name] for p in points] for o in (x, y)]
        axes.errorbar(xs, ys, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=MUTED, elinewidth=1, zorder=2)
        shade = [point.values[colour.name] if colour else point.step for point in points]
        drawn = axes.scatter(xs, ys, c=shade, label=kind, zorder=3, **look, **limits)
        if kind == ON_FRONT and len(points) <= MAX_LABELS:
            for point, px, py in zip(points, xs, ys, strict=True):
                axes.annotate(f"step {point.step}", (px, py), (7, 7), textcoords="offset points", fontsize=10)
    bar = axes.figure.colorbar(drawn, ax=axes, aspect=30, pad=0.02)
    bar.set_label(axis_title(colour) if colour else "step", fontsize=12)
    bar.outline.set_visible(False)
    axes.set_xlabel(axis_title(x), fontsize=13)
    axes.set_ylabel(axis_title(y), fontsize=13)
    axes.legend(loc="best", fontsize=11, frameon=False)
