"""front.html: the policies of a front in any two objectives, what each of them is, and what the methods are worth."""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from align.archive import ParetoPoint
from align.files import replace_text
from align.fronts.compute import PARTS, XS
from align.fronts.files import INDICATOR_NAMES
from align.report_figures import COLOURS, axis_title, ranked_objectives, staircase
from align.web import island, templates
from rewards.types import Missing, Objective

Point = Mapping[str, Any]  # of front.json

COSTS = {"samples": "training samples", "tokens": "training tokens", "seconds": "seconds of training", "step": "step"}
SYMBOLS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "cross", "x", "star")  # plotly's names
SIGNS = "●■◆▼▲✚✖★"  # the same in text
MAX_CHARACTERS = 6_000_000  # of examples in the page
SHORTEST, LONGEST = 500, 20_000  # characters of an example that are shown, when there are many and when there are few
MAX_MATRIX = 14  # methods whose chances of dominating each other are shown


def write_page(path: Path, front: Mapping[str, Any]) -> None:
    """Write the page of what front.json says, whole or not at all."""
    replace_text(path, render(front))


def render(front: Mapping[str, Any], version: str = "") -> str:
    """The page as text; it needs no other file. One with a version asks the server whether there is a newer one."""
    objectives = [_objective(o) for o in front["objectives"]]
    looks = _looks(front["points"])
    environment = templates()
    environment.filters |= {"count": lambda n: "–" if n is None else f"{n:,.0f}", "number": _number, "interval": _interval}
    page = environment.get_template("front.html").render(
        front=front,
        version=version,
        facts=_facts(front),
        objectives=objectives,
        titles={o.name: axis_title(o) for o in objectives},
        indicators=INDICATOR_NAMES,
        costs=_costs(front["points"]),
        looks=looks,
        table=[_row(p, objectives) for p in front["points"]],
        methods=sorted(front["methods"], key=lambda m: -(m["hypervolume"]["mean"] or 0)),
        dominance=_dominance(front),
        islands={"front-data": island(_data(front, objectives, looks))},
        plotly=get_plotlyjs(),
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")  # half a pair of surrogates becomes JSON's \\ud800


def _objective(o: Mapping[str, Any]) -> Objective:
    return Objective(o["name"], o["direction"] == "maximize", tuple(o["bounds"]), Missing.FAIL)


def _looks(points: Sequence[Point]) -> dict[str, dict[str, str]]:
    """Colour and symbol of every method; the first eight differ in both, and no two of 64 are alike."""
    looks = {}
    for i, method in enumerate(dict.fromkeys(p["method"] for p in points)):
        k = (i + i // len(COLOURS)) % len(SYMBOLS)
        looks[method] = {"colour": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[k], "sign": SIGNS[k]}
    return looks


def _costs(points: Sequence[Point]) -> dict[str, str]:
    """What else than an objective can be an axis: of which any two policies differ."""
    return {key: title for key, title in COSTS.items() if len({p[key] for p in points} - {None}) > 1}


def _facts(front: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers at the head of the page."""
    points, counts = front["points"], front["prompts"]
    return [
        ("policies", f"{len(points):,}"),
        ("on the front", f"{sum(p['on_front'] for p in points):,}"),
        ("methods", f"{len(front['methods']):,}"),
        ("prompts to choose on", f"{counts['validation']:,}"),
        ("prompts to measure on", f"{counts['test']:,}"),
        ("hypervolume of the front", _number(front["selection_bias"]["hypervolume_on_validation"])),
    ]


# --- the data of the figures ------------------------------------------------------------------------------------------


def _data(front: Mapping[str, Any], objectives: Sequence[Objective], looks: Mapping[str, Any]) -> dict[str, Any]:
    """What the script of the page draws and shows."""
    points, level = front["points"], front.get("level", 0.95)
    limit = _longest(points)
    keys = ("id", "run", "path", "step", "method", "seed", *XS, "weights", *PARTS, "on_front", "on_test_front")
    usable = [p for p in points if None not in p["test"]["values"].values()]
    vectors_MK = np.array([_archived(p, "test").vector_K(objectives) for p in usable]).reshape(len(usable), -1)
    return {
        "names": [o.name for o in objectives],
        "titles": {o.name: axis_title(o) for o in objectives},
        "decimals": {o.name: _decimals(o) for o in objectives},
        "shown": [objectives[k].name for k in ranked_objectives(vectors_MK, objectives)[:2]],
        "costs": COSTS,
        "indicators": INDICATOR_NAMES,
        "level": level,
        "z": NormalDist().inv_cdf(0.5 + level / 2),
        "looks": looks,
        "points": [{key: p[key] for key in keys} | {"examples": _examples(p, limit)} for p in points],
        "maximized": {o.name: o.maximize for o in objectives},
        "planes": front.get("attainment_planes", []),
        "stairs": {part: _stairs(points, part, objectives) for part in PARTS},
        "methods": front["methods"],
    }


def _stairs(points: Sequence[Point], part: str, objectives: Sequence[Objective]) -> dict[str, Any]:
    """Per pair of objectives the border of what the policies chosen on validation dominate."""
    chosen = [_archived(p, part) for p in points if p["on_front"] and None not in p[part]["values"].values()]
    stairs: dict[str, Any] = {o.name: {} for o in objectives}
    for a, b in permutations(objectives, 2):
        stairs[a.name][b.name] = staircase(chosen, a, b)
    return stairs


def _archived(point: Point, part: str) -> ParetoPoint:
    measured = point[part]
    return ParetoPoint(
        point["step"] or 0, measured["values"], measured["standard_errors"], measured["missing"], 0, 0, point["path"]
    )


def _longest(points: Sequence[Point]) -> int:
    """Characters of an example that are shown."""
    texts = 2 * sum(len(p["examples"]) for p in points)
    return min(LONGEST, max(SHORTEST, MAX_CHARACTERS // max(texts, 1)))


def _examples(point: Point, limit: int) -> list[dict[str, Any]]:
    return [{**e, "prompt": _cut(e["prompt"], limit), "text": _cut(e["text"], limit)} for e in point["examples"]]


def _cut(text: str, limit: int) -> str:
    left = len(text) - limit
    return text if left <= 0 else f"{text[:limit]}\n[{left:,} more characters are in front.json]"


# --- tables -----------------------------------------------------------------------------------------------------------


def _row(point: Point, objectives: Sequence[Objective]) -> dict[str, Any]:
    """A policy as text, and what its columns are sorted by."""
    test = point["test"]
    values = [test["values"][o.name] for o in objectives]
    cells = [_mean_and_error(test, o) for o in objectives]
    missing = [f"{name} {100 * share:.3g} %" for name, share in test["missing"].items() if share]
    return {"point": point, "cells": list(zip(values, cells, strict=True)), "missing": ", ".join(missing)}


def _mean_and_error(measured: Mapping[str, Any], objective: Objective) -> str:
    value, error = measured["values"][objective.name], measured["standard_errors"][objective.name]
    if value is None:
        return "missing"
    decimals = _decimals(objective)
    return f"{value:.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")


def _decimals(objective: Objective) -> int:
    """As many as the span of the bounds asks for."""
    low, high = objective.bounds
    return max(0, 3 - math.floor(math.log10(high - low)))


def _dominance(front: Mapping[str, Any]) -> dict[str, Any]:
    """The matrix of chances: of the methods with the largest hypervolumes, where there are too many for a page."""
    best = sorted(front["methods"], key=lambda m: -(m["hypervolume"]["mean"] or 0))[:MAX_MATRIX]
    names = [m["method"] for m in best]
    chances = {(d["a"], d["b"]): d["probability"] for d in front["dominates"]}
    return {"names": names, "rows": [[chances.get((a, b)) for b in names] for a in names] if chances else []}


def _interval(found: Mapping[str, float | None]) -> str:
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(number: float | None) -> str:
    return "?" if number is None else f"{number:.3f}"
