"""The reward bus: runs every component over the samples and collects one checked value per cell."""

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from rewards.component import Component
from rewards.types import Objective, RewardMatrix
from rollout.types import SampleGroup


class RewardBus:
    """Scores sample groups on K objectives.

    Args:
        components: The component of every objective, by name and in the order of the columns.
        objectives: What the values mean, in the same order.
    """

    def __init__(self, components: Mapping[str, Component], objectives: Sequence[Objective]):
        assert list(components) == [objective.name for objective in objectives]
        self._components = components
        self._objectives = objectives
        self.seconds: dict[str, float] = {}  # of the latest call, by objective

    def score(self, groups: Sequence[SampleGroup]) -> RewardMatrix:
        """Score all samples of the groups; rows are in the order of the groups.

        A component that raises, returns no number, NaN, infinity, or a value outside its bounds leaves the cell
        missing and the reason recorded; nothing is replaced by 0 and nothing is clipped.
        """
        num_samples = sum(len(group.samples) for group in groups)
        raw_NK = np.full((num_samples, len(self._objectives)), np.nan)
        errors: dict[tuple[int, int], str] = {}
        for k, objective in enumerate(self._objectives):
            start = time.perf_counter()
            for n, value in enumerate(self._components[objective.name](groups) if groups else []):
                number, error = _check(value, objective.bounds)
                raw_NK[n, k] = number
                if error:
                    errors[n, k] = error
            self.seconds[objective.name] = time.perf_counter() - start
        return RewardMatrix(self._objectives, raw_NK, errors)


def _check(value: object, bounds: tuple[float, float]) -> tuple[float, str]:
    """(number, "") for a usable value, else (NaN, reason)."""
    if value is None:
        return math.nan, "no value"
    if isinstance(value, Exception):
        return math.nan, f"{type(value).__name__}: {value}".encode(errors="replace").decode()  # it goes to a file
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan, f"not a number: {value!r:.80}"
    if not math.isfinite(number):
        return math.nan, f"not finite: {number}"
    if not bounds[0] <= number <= bounds[1]:
        return math.nan, f"{number:g} is outside its bounds [{bounds[0]:g}, {bounds[1]:g}]"
    return number, ""
