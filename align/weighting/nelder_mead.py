"""Nelder-Mead (1965) as pure ask and tell: the state is plain JSON, so a search can wait for days between two points.

Minimises a function of x in [0, 1]^n. With the points sorted f(x_0) <= ... <= f(x_n) and c the mean of all but the worst:
reflection r = c + (c - x_n), expansion c + 2 (c - x_n), contraction outside c + (c - x_n) / 2 or inside c - (c - x_n) / 2,
shrinking x_j <- x_0 + (x_j - x_0) / 2. Points outside the box are moved to its edge. The same steps as
scipy.optimize.minimize(method="Nelder-Mead"), whose loop cannot be saved in its middle.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Search = Mapping[str, Any]  # points and values of the simplex, what is being tried, and the point asked about


def first(start_D: np.ndarray, spread: float) -> Search:
    """A search whose first simplex is the start and, for each coordinate, the start with it moved by `spread`.

    Coordinates move up, or down where there is no room above.
    """
    moved = np.where(start_D + spread <= 1, start_D + spread, start_D - spread)
    points = [start_D, *(np.where(np.arange(len(start_D)) == d, moved, start_D) for d in range(len(start_D)))]
    return {"points": [_inside(point) for point in points], "values": [], "phase": "fill", "tried": []}


def ask(search: Search) -> np.ndarray:
    """The point whose value is wanted next."""
    if search["phase"] == "fill":
        return np.array(search["points"][len(search["values"])])
    return np.array(_move(search["points"], FACTORS[search["phase"]]))


def tell(search: Search, value: float) -> Search:
    """The search that knows the value at the point asked for."""
    points, values, point = search["points"], [*search["values"], value], ask(search).tolist()
    if search["phase"] == "fill":
        return _sorted(points, values) if len(values) == len(points) else {**search, "values": values}
    values = search["values"]
    reflected, reflected_value = search["tried"] or (point, value)
    match search["phase"]:
        case "reflect" if value < values[0]:
            return {**search, "phase": "expand", "tried": [point, value]}
        case "reflect" if value < values[-2]:
            return _replace_worst(search, point, value)
        case "reflect":
            side = "outside" if value < values[-1] else "inside"
            return {**search, "phase": side, "tried": [point, value]}
        case "expand" if value < reflected_value:
            return _replace_worst(search, point, value)
        case "expand":
            return _replace_worst(search, reflected, reflected_value)
        case "outside" if value <= reflected_value:
            return _replace_worst(search, point, value)
        case "inside" if value < values[-1]:
            return _replace_worst(search, point, value)
    best = np.array(points[0])
    shrunk = [points[0], *(_inside(best + (np.array(p) - best) / 2) for p in points[1:])]
    return {"points": shrunk, "values": values[:1], "phase": "fill", "tried": []}


def best(search: Search) -> np.ndarray:
    """The best point whose value is known."""
    return np.array(search["points"][int(np.argmin(search["values"]))])


def deviation(search: Search) -> float:
    """Standard deviation of the values of the simplex; infinite while one is wanting."""
    return float(np.std(search["values"])) if search["phase"] == "reflect" else float("inf")


FACTORS = {"reflect": 1.0, "expand": 2.0, "outside": 0.5, "inside": -0.5}  # of c - x_n


def _move(points: list[list[float]], factor: float) -> list[float]:
    """c + factor (c - x_n)."""
    centre = np.mean(points[:-1], axis=0)
    return _inside((1 + factor) * centre - factor * np.array(points[-1]))


def _replace_worst(search: Search, point: list[float], value: float) -> Search:
    return _sorted([*search["points"][:-1], point], [*search["values"][:-1], value])


def _sorted(points: list[list[float]], values: list[float]) -> Search:
    order = np.argsort(values, kind="stable")
    return {"points": [points[i] for i in order], "values": [values[i] for i in order], "phase": "reflect", "tried": []}


def _inside(point: np.ndarray) -> list[float]:
    return np.clip(point, 0.0, 1.0).tolist()
