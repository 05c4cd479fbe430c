"""front.png: the policies in two objectives, and the hypervolume of the methods over what was spent."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.archive import ParetoPoint
from align.fronts.compute import XS
from align.report_figures import COLOURS, MUTED, axis_title, plain_axes, ranked_objectives, staircase
from rewards.types import Objective

MARKERS = "osD^vPX*"
MAX_METHODS = 14  # in the legend


def draw(path: Path, front: Mapping[str, Any], objectives: Sequence[Objective]) -> None:
    """Draw what front.json says, measured on test."""
    curves = {m["method"]: m["curve"] for m in front["methods"] if m["curve"]}
    curves = curves if any(len(curve) > 1 for curve in curves.values()) else {}
    figure = Figure(figsize=(12.5 if curves else 8, 5), dpi=140, layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False, width_ratios=[3, 2] if curves else [1])[0]
    names = list(dict.fromkeys(point["method"] for point in front["points"]))
    looks = dict(zip(names, zip(cycle(COLOURS), (m for m in cycle(MARKERS) for _ in COLOURS), strict=False), strict=False))
    points = [p for p in front["points"] if None not in p["test"]["values"].values()]
    _draw_points(axes[0], points, objectives, looks)
    if curves:
        _draw_curves(axes[1], curves, looks)
    figure.savefig(path)


def _draw_points(
    axes: Axes, points: Sequence[Mapping[str, Any]], objectives: Sequence[Objective], looks: Mapping[str, tuple[str, str]]
) -> None:
    """Every policy with its standard errors, and the border of what those on the front dominate in the two axes."""
    plain_axes(axes)
    archived = {p["id"]: _archived(p) for p in points}
    vectors_MK = np.array([a.vector_K(objectives) for a in archived.values()])
    first, *others = [objectives[k] for k in ranked_objectives(vectors_MK, objectives)]
    x, y = first, [*others, first][0]
    chosen = [archived[p["id"]] for p in points if p["on_front"]]
    if len(objectives) > 1:
        axes.plot(*staircase(chosen, x, y), color=MUTED, linewidth=1.4, linestyle=":", zorder=1)
    for method, (colour, marker) in looks.items():
        some = [p for p in points if p["method"] == method]
        xs, ys = ([p["test"]["values"][o.name] for p in some] for o in (x, y))
        bars = [[p["test"]["standard_errors"][o.name] or 0.0 for p in some] for o in (x, y)]
        axes.errorbar(xs, ys, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=MUTED, elinewidth=1, zorder=2)
        edges = ["#1d2126" if p["on_front"] else "none" for p in some]
        axes.scatter(xs, ys, s=55, c=colour, marker=marker, edgecolors=edges, linewidths=1.4, label=_short(method), zorder=3)
    axes.set(xlabel=axis_title(x), ylabel=axis_title(y), title="on the test prompts; outlined: chosen on validation")
    axes.title.set_size(11)
    axes.margins(0.09)
    if len(looks) <= MAX_METHODS:
        axes.legend(loc="best", fontsize=9, framealpha=0.8, edgecolor="none")


def _short(method: str) -> str:
    """As much of a name as the legend has room for: methods differ at its beginning or at its end."""
    return method if len(method) <= 50 else f"{method[:24]}…{method[-25:]}"


def _archived(point: Mapping[str, Any]) -> ParetoPoint:
    test = point["test"]
    return ParetoPoint(point["step"] or 0, test["values"], test["standard_errors"], test["missing"], 0, 0, point["path"])


def _draw_curves(
    axes: Axes, curves: Mapping[str, Sequence[Mapping[str, Any]]], looks: Mapping[str, tuple[str, str]]
) -> None:
    """Against the first x that all curves have."""
    plain_axes(axes)
    x = next((x for x in XS if all(row[x] is not None for curve in curves.values() for row in curve)), "step")
    for method, curve in curves.items():
        colour, marker = looks[method]
        xs, volumes = ([np.nan if row[key] is None else row[key] for row in curve] for key in (x, "hypervolume"))
        axes.plot(xs, volumes, color=colour, marker=marker, markersize=4, linewidth=1.6, label=method)
        low, high = ([np.nan if row[key] is None else row[key] for row in curve] for key in ("low", "high"))
        axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="training samples" if x == "samples" else x, ylabel="hypervolume")
