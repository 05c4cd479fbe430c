"""The figures of the report: plain dictionaries in plotly's figure schema for the page, and the picture front.png."""

import math
from collections.abc import Sequence
from itertools import combinations, cycle, permutations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from align.archive import Archive, ParetoPoint
from align.pareto import nondominated
from align.report_curves import (
    COLOURS,
    CURVES,
    MUTED,
    Chart,
    Row,
    cosine_figures,
    curves,
    domain_figures,
    is_worth_drawing,
    line,
    missing_figures,
    scheme_figures,
    series_of,
)
from rewards.types import Objective

SCALE = ("#5b6ee1", "#c4569a", "#f0883e")  # from the first step to the last
OTHER, ON_FRONT, INITIAL = "other policies", "on the Pareto front", "initial policy"  # kinds of points
MAX_LABELS = 12  # points on the front that are labelled with their step


def figures_of(objectives: Sequence[Objective], metrics: Sequence[Row], archive: Archive) -> dict[str, Chart]:
    """Every figure there is data for; the part of a key before the colon names the section of the page."""
    names = [objective.name for objective in objectives]
    sections: dict[str, list[Chart]] = {}
    if archive.points:
        sections["front"] = [_front_figure(archive, objectives) if len(names) > 1 else _value_figure(archive, objectives[0])]
    if metrics:
        colours = cycle(COLOURS)
        sections["objectives"] = [_objective_figure(o, next(colours), metrics, archive.points) for o in objectives]
        sections["missing"] = missing_figures(metrics, names)
        weighted = [name for name in (*names, "kl") if any(f"weights/{name}" in row for row in metrics)]
        sections["weights"] = [curves("weights", metrics, {name: f"weights/{name}" for name in weighted})]
        for figures in (scheme_figures, cosine_figures, domain_figures):
            sections["weights"] += figures(metrics, names)
        sections["curves"] = [curves(CURVES[key], metrics, {"": key}) for key in CURVES if is_worth_drawing(metrics, key)]
    return {f"{section}:{i}": chart for section, charts in sections.items() for i, chart in enumerate(charts)}


# --- the objectives ---------------------------------------------------------------------------------------------------


def _objective_figure(objective: Objective, colour: str, metrics: Sequence[Row], points: Sequence[ParetoPoint]) -> Chart:
    """Mean of every training batch, and the held-out means with their standard errors."""
    steps, means = series_of(metrics, f"objectives/{objective.name}/mean")
    held_out = [p for p in points if math.isfinite(p.values[objective.name])]
    markers = {
        "type": "scatter",
        "mode": "markers",
        "name": "held out",
        "x": [p.step for p in held_out],
        "y": [p.values[objective.name] for p in held_out],
        "error_y": error_bars([finite(p.standard_errors[objective.name]) for p in held_out]),
        "marker": {"color": colour, "size": 7},
        "line": {"color": colour},
        "hovertemplate": "step %{x}: %{y:.4g}",
    }
    training = {**line(steps, means, "training batch", colour), "opacity": 0.6}
    layout = {"showlegend": bool(held_out), "xaxis": {"title": {"text": "step"}}}
    return {"title": axis_title(objective), "data": [training, markers] if held_out else [training], "layout": layout}


def _value_figure(archive: Archive, objective: Objective) -> Chart:
    """The one objective of every evaluated policy over steps."""
    chart = _objective_figure(objective, COLOURS[0], (), archive.points)
    layout = {**chart["layout"], "showlegend": False, "yaxis": {"title": {"text": chart["title"]}}}
    lines = [{**held_out, "mode": "lines+markers"} for held_out in chart["data"][1:]]
    return {"title": "evaluated policies", "data": lines, "layout": layout}


def axis_title(objective: Objective) -> str:
    """Name and direction."""
    return f"{objective.name} ({'larger' if objective.maximize else 'smaller'} is better)"


def error_bars(errors: Sequence[float | None]) -> dict[str, Any]:
    """Plotly's bars of one standard error; none where it is not known."""
    return {"type": "data", "array": list(errors), "color": MUTED, "thickness": 1, "width": 0}


def finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None


# --- the front --------------------------------------------------------------------------------------------------------


def ranked_axes(archive: Archive, objectives: Sequence[Objective]) -> list[int]:
    """The two objectives that conflict most over the usable points (least covariance), then the others by their spread."""
    return ranked_objectives(archive.vectors_MK(), objectives)


def ranked_objectives(vectors_MK: np.ndarray, objectives: Sequence[Objective]) -> list[int]:
    """See `ranked_axes`, of scaled vectors."""
    every = range(len(objectives))
    if len(objectives) < 3 or len(vectors_MK) < 2:
        return list(every)
    covariance_KK = np.cov(vectors_MK.T)
    pair = min(combinations(every, 2), key=lambda pair: covariance_KK[pair])
    spread_K = np.ptp(vectors_MK, axis=0)
    return [*pair, *sorted(set(every) - set(pair), key=lambda k: -spread_K[k])]


def staircase(points: Sequence[ParetoPoint], x: Objective, y: Objective) -> tuple[list[float], list[float]]:
    """Corners, in raw units, of the border of what the points dominate in two objectives."""
    vectors_M2 = np.array([point.vector_K((x, y)) for point in points])
    if not len(vectors_M2):
        return [], []
    on_front = nondominated(vectors_M2)
    front = [points[i] for i in np.argsort(vectors_M2[:, 0]) if on_front[i]]
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
                {key: [finite(getattr(p, key)[o.name]) for p in points] for key in ("values", "standard_errors")}
                for points in kinds.values()
            ]
            for o in objectives
        },
        "stairs": stairs,
    }


def _shown(archive: Archive, objectives: Sequence[Objective]) -> list[Objective]:
    return [objectives[k] for k in ranked_axes(archive, objectives)[:2]]


def _kinds(archive: Archive) -> dict[str, list[ParetoPoint]]:
    """The points by how they are drawn; no kind is empty, and each point is of one."""
    on_front = {point.step for point in archive.front()}
    trained = [point for point in archive.points if point.step > 0]
    kinds = {
        OTHER: [p for p in trained if p.step not in on_front],
        ON_FRONT: [p for p in trained if p.step in on_front],
        INITIAL: [p for p in archive.points if p.step == 0],
    }
    return {kind: points for kind, points in kinds.items() if points}


def _front_figure(archive: Archive, objectives: Sequence[Objective]) -> Chart:
    """Trace 0 is the staircase, the others are the kinds of points, in the two objectives that conflict most."""
    axes = front_axes(archive, objectives)
    x, y = axes["shown"]
    corners = axes["stairs"][x][y]
    stairs = {
        "type": "scatter",
        "mode": "lines",
        "name": "front" if len(objectives) == 2 else "front in these two",
        "x": corners[0],
        "y": corners[1],
        "line": {"color": MUTED, "width": 1.5, "dash": "dot"},
        "hoverinfo": "skip",
    }
    data = [stairs, *(_cloud(kind, points, objectives, archive) for kind, points in _kinds(archive).items())]
    for trace, x_numbers, y_numbers in zip(data[1:], axes["traces"][x], axes["traces"][y], strict=True):
        trace |= {"x": x_numbers["values"], "error_x": error_bars(x_numbers["standard_errors"])}
        trace |= {"y": y_numbers["values"], "error_y": error_bars(y_numbers["standard_errors"])}
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
        "showscale": kind == next(iter(_kinds(archive))),
        "colorbar": {"title": {"text": "step"}, "thickness": 10, "outlinewidth": 0},
    }
    return {
        "type": "scatter",
        "mode": "markers+text" if labels else "markers",
        "name": kind,
        "marker": {**colours, **look[kind]},
        "text": labels,
        "textposition": "top right",
        "cliponaxis": False,
        "hovertext": [_hover(p, objectives) for p in points],
        "hoverinfo": "text",
    }


def _hover(point: ParetoPoint, objectives: Sequence[Objective]) -> str:
    lines = [f"<b>step {point.step}</b>"]
    for objective in objectives:
        value, error = point.values[objective.name], point.standard_errors[objective.name]
        bar = f" ± {error:.2g}" if math.isfinite(error) else ""
        lines.append(f"{objective.name}: {value:.4g}{bar}" if math.isfinite(value) else f"{objective.name}: missing")
    return "<br>".join(lines)


# --- front.png --------------------------------------------------------------------------------------------------------

LOOKS = {
    OTHER: {"s": 40, "alpha": 0.6},
    ON_FRONT: {"s": 75, "edgecolors": "#1d2126", "linewidths": 1.4},
    INITIAL: {"s": 75, "marker": "D", "edgecolors": "white"},
}


def draw_front(path: Path, archive: Archive, objectives: Sequence[Objective]) -> None:
    """A picture of the front in the two objectives that conflict most; others are text and colour."""
    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    if not archive.usable():
        axes.axis("off")
        why = "no evaluated policy has a value for every objective" if archive.points else "no policy has been evaluated"
        axes.text(0.5, 0.5, why, ha="center", color=MUTED, fontsize=13)
    else:
        plain_axes(axes)
        (_draw_plane if len(objectives) > 1 else _draw_values)(axes, archive, objectives)
    figure.savefig(path)


def plain_axes(axes: Axes) -> None:
    """A grid, and no more lines than are needed."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, color=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_size(13)


def _draw_values(axes: Axes, archive: Archive, objectives: Sequence[Objective]) -> None:
    objective, points = objectives[0], archive.usable()
    values = [point.values[objective.name] for point in points]
    errors = [point.standard_errors[objective.name] for point in points]
    axes.errorbar([point.step for point in points], values, yerr=errors, color=COLOURS[0], marker="o", ecolor=MUTED)
    axes.set(xlabel="step", ylabel=axis_title(objective))


def _draw_plane(axes: Axes, archive: Archive, objectives: Sequence[Objective]) -> None:
    """A third objective is the colour, or the step where there are only two."""
    x, y = _shown(archive, objectives)
    third, *others = [objectives[k] for k in ranked_axes(archive, objectives)[2:]] or [None]

    def shade(point: ParetoPoint) -> float:
        return point.values[third.name] if third else point.step

    usable = archive.usable()
    shades = [shade(point) for point in usable]
    scale = {"vmin": min(shades), "vmax": max(shades), "cmap": LinearSegmentedColormap.from_list("steps", SCALE)}
    axes.plot(*staircase(usable, x, y), color=MUTED, linewidth=1.4, linestyle=":", zorder=1)
    for kind, points in _kinds(archive).items():
        points = [point for point in points if point in usable]
        xs, ys = ([point.values[o.name] for point in points] for o in (x, y))
        bars = [[point.standard_errors[o.name] for point in points] for o in (x, y)]
        axes.errorbar(xs, ys, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=MUTED, elinewidth=1.2, zorder=2)
        drawn = axes.scatter(xs, ys, c=[shade(p) for p in points], label=kind, zorder=3, **LOOKS[kind], **scale)
        if kind == ON_FRONT and len(points) <= MAX_LABELS:
            for point, *place in zip(points, xs, ys, strict=True):
                axes.annotate(f"step {point.step}", place, (6, 6), textcoords="offset points", fontsize=10.5)
    bar = axes.figure.colorbar(drawn, ax=axes, aspect=30, pad=0.02)
    bar.set_label(axis_title(third) if third else "step", fontsize=12)
    bar.outline.set_visible(False)
    axes.set(xlabel=axis_title(x), ylabel=axis_title(y))
    axes.margins(0.09)
    axes.legend(loc="best", fontsize=11, framealpha=0.8, edgecolor="none")
    if others:
        axes.figure.supxlabel("not shown: " + "; ".join(_span(usable, o) for o in others), fontsize=10, color="#5c6670")


def _span(points: Sequence[ParetoPoint], objective: Objective) -> str:
    values = [point.values[objective.name] for point in points]
    return f"{objective.name} {min(values):.3g} to {max(values):.3g}"
