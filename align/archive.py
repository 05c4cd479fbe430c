"""The Pareto archive of a run: every evaluation, append-only, with standard errors."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.files import replace_text
from align.pareto import hypervolume, nondominated
from rewards.types import Objective


@dataclass(frozen=True)
class ParetoPoint:
    """One evaluated policy.

    Args:
        step: Optimiser steps it had seen.
        values: Held-out mean of every objective, in raw units, by name.
        standard_errors: Of those means, over prompts.
        missing: Share of values that could not be had.
        prompts: Number of held-out prompts.
        samples: Training samples drawn so far.
        checkpoint: Folder of its weights, relative to the run folder; "" where none was saved.
        domains: Held-out means of each domain of a mixture, in raw units.
    """

    step: int
    values: Mapping[str, float]
    standard_errors: Mapping[str, float]
    missing: Mapping[str, float]
    prompts: int
    samples: int
    checkpoint: str
    domains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def vector_K(self, objectives: Sequence[Objective]) -> np.ndarray:
        """Values scaled to [0, 1], larger is better, in the order of the objectives."""
        return scaled_vector(self.values, objectives)


def scaled_vector(values: Mapping[str, float], objectives: Sequence[Objective]) -> np.ndarray:
    """Raw values by name -> vector (K,) in [0, 1], larger is better."""
    return np.array([float(o.scale(np.float64(values[o.name]))) for o in objectives])


def reference_vector(reference: Mapping[str, float], objectives: Sequence[Objective]) -> np.ndarray:
    """Reference point in raw units -> scaled vector (K,); the worst bound of an objective not named."""
    return np.array([float(o.scale(np.float64(reference[o.name]))) if o.name in reference else 0.0 for o in objectives])


def hypervolume_share(vectors_MK: np.ndarray, reference_K: np.ndarray) -> float:
    """Share of the possible volume above the reference that the vectors dominate."""
    return hypervolume(vectors_MK, reference_K) / float(np.prod(1 - reference_K))


class Archive:
    """The points of one run, in a file of one JSON object a line.

    Args:
        path: The file; created with the first point.
        objectives: Axes of the front.
        reference: Reference point of the hypervolume in raw units, by name; the worst bound of an objective not named.
        writes: Whether this process writes the file (all processes of a run hold the same points).
    """

    def __init__(self, path: Path, objectives: Sequence[Objective], reference: Mapping[str, float], writes: bool = False):
        self._path = path
        self._writes = writes
        self._objectives = objectives
        self._reference_K = reference_vector(reference, objectives)
        self.points = read_points(path) if path.exists() else []

    def append(self, point: ParetoPoint) -> None:
        """Add a point, in memory and at the end of the file."""
        self.points.append(point)
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(point))

    def truncate(self, step: int) -> None:
        """Forget points evaluated after `step`: the run goes back to it."""
        self.points = [point for point in self.points if point.step <= step]
        if self._writes:
            replace_text(self._path, "".join(map(_line, self.points)))

    def every_vector_MK(self) -> np.ndarray:
        """Scaled vectors of all points, oldest first; NaN where an objective has no value."""
        return np.array([p.vector_K(self._objectives) for p in self.points])

    def vectors_MK(self) -> np.ndarray:
        """Scaled vectors of the usable points (those with a value for every objective)."""
        return np.array([p.vector_K(self._objectives) for p in self.usable()])

    def usable(self) -> list[ParetoPoint]:
        """Points with a value for every objective."""
        return [p for p in self.points if np.isfinite(p.vector_K(self._objectives)).all()]

    def front(self) -> list[ParetoPoint]:
        """Points that no other one dominates."""
        usable = self.usable()
        return [p for p, on_front in zip(usable, nondominated(self.vectors_MK()), strict=True) if on_front] if usable else []

    def hypervolume(self, last: int | None = None) -> float:
        """Share of the possible volume that the points (the first `last` of them) dominate above the reference."""
        vectors_MK = self.vectors_MK()[:last]
        return hypervolume_share(vectors_MK, self._reference_K) if len(vectors_MK) else 0.0


def _line(point: ParetoPoint) -> str:
    """JSON has no NaN: a mean that nobody could measure is null."""
    data = asdict(point)
    for key in ("values", "standard_errors"):
        data[key] = {name: _null(x) for name, x in data[key].items()}
    domains = {domain: {name: _null(x) for name, x in table.items()} for domain, table in data.pop("domains").items()}
    return json.dumps(data | ({"domains": domains} if domains else {}), allow_nan=False) + "\n"


def _null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _nan(number: float | None) -> float:
    return math.nan if number is None else number


def read_points(path: Path) -> list[ParetoPoint]:
    """Points of an archive file; a last line that a crash cut off is passed over.

    Raises:
        ValueError: With the line number of a line that is no point.
    """
    points = []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            data: dict[str, Any] = json.loads(line)
            for key in ("values", "standard_errors"):
                data[key] = {name: _nan(number) for name, number in data[key].items()}
            for table in data.get("domains", {}).values():
                table.update({name: _nan(number) for name, number in table.items()})
            points.append(ParetoPoint(**data))
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is not an archive point: {error}") from error
    return points
