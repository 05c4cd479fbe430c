"""Search, within one run, of the thresholds at which a gold objective is best (2310.04373, Algorithm 3)."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from align.config.lagrangian import SearchConfig
from align.weighting import nelder_mead


class Constraint(Protocol):
    """What the search sees of a constraint; values scaled to [0, 1], larger is better."""

    column: int
    kind: str
    sign: int
    threshold: float


def follow(
    options: SearchConfig,
    search: Mapping[str, Any] | None,
    constraints: Sequence[Constraint],
    held_out_MK: np.ndarray,
    step: int,
    gold: int,
) -> tuple[Mapping[str, Any], list[float]]:
    """Nelder-Mead over thresholds, maximising the gold objective: a point is judged by the first evaluation at which all
    constrained means are within the tolerance, or at which its steps are used up.

    The first simplex is the start, and the start with one threshold each moved by `spread`. Departures from the paper: that
    simplex is not drawn at random; the means and the gold objective are held-out ones, of validation prompts; thresholds
    stay within the bounds by the tolerance; nothing is cached, as the same thresholds lead elsewhere from another policy;
    whether the values are close is asked after every move, not only after shrinking.

    Args:
        options: Of the search.
        search: As remembered; None before the first step.
        constraints: With the thresholds in force.
        held_out_MK: Held-out vectors so far, at least one at the first step.
        step: Optimiser steps taken so far.
        gold: Column of the gold objective.

    Returns:
        What to remember, and the thresholds to train towards.
    """
    if search is None:
        simplex = nelder_mead.first(np.array([c.threshold for c in constraints]), options.spread)
        search = {"simplex": simplex, "since": step, "seen": 0, "points": 0, "ended": False}
    thresholds = [c.threshold for c in constraints]
    if search["ended"] or len(held_out_MK) <= search["seen"]:
        return search, thresholds
    vector_K = held_out_MK[-1]
    search = {**search, "seen": len(held_out_MK)}
    if not _reached(constraints, vector_K, options.tolerance) and step - search["since"] < options.steps:
        return search, thresholds
    simplex = nelder_mead.tell(search["simplex"], -float(vector_K[gold]))
    ended = nelder_mead.deviation(simplex) < options.stop
    point = nelder_mead.best(simplex) if ended else nelder_mead.ask(simplex)
    thresholds = np.clip(point, options.tolerance, 1 - options.tolerance).tolist()
    return {**search, "simplex": simplex, "since": step, "points": search["points"] + 1, "ended": ended}, thresholds


def _reached(constraints: Sequence[Constraint], vector_K: np.ndarray, tolerance: float) -> bool:
    """Whether no constraint is missed by more than the tolerance."""
    gaps = [c.sign * (c.threshold - vector_K[c.column]) for c in constraints]
    return all((abs(g) if c.kind == "equal" else g) <= tolerance for c, g in zip(constraints, gaps, strict=True))
