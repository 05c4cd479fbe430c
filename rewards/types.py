"""Objectives, and the matrix of their values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

NO_VALUE = "no value"  # the reason of a cell whose reward said so itself
OUTSIDE = "is outside its bounds"  # part of the reason of one whose value was too large or too small


class Missing(StrEnum):
    """What a value that could not be had does to the update."""

    FAIL = "fail"  # stop the run
    DROP_SAMPLE = "drop_sample"  # leave the sample out
    DROP_GROUP = "drop_group"  # leave its whole group out
    NEUTRAL = "neutral"  # count as the mean of its group


@dataclass(frozen=True, slots=True)
class Objective:
    """One named objective.

    Args:
        name: Unique within a run.
        maximize: Whether larger raw values are better.
        bounds: Smallest and largest raw value.
        missing: Policy for values that could not be had.
    """

    name: str
    maximize: bool
    bounds: tuple[float, float]
    missing: Missing

    def scale(self, raw: np.ndarray) -> np.ndarray:
        """Raw values -> [0, 1], larger is better: (raw - low) / (high - low), or one minus that. NaN stays NaN."""
        low, high = self.bounds
        share = (raw - low) / (high - low)
        return share if self.maximize else 1.0 - share


@dataclass(frozen=True)
class RewardMatrix:
    """Values of N samples on K objectives.

    Args:
        objectives: The K objectives, in the order of the columns.
        raw_NK: Values as the rewards gave them, float64; NaN where missing.
        errors: Why a cell is missing, by (row, column); a missing cell without a reason was left out on purpose.
    """

    objectives: Sequence[Objective]
    raw_NK: np.ndarray
    errors: Mapping[tuple[int, int], str]

    @property
    def missing_NK(self) -> np.ndarray:
        """True where there is no value."""
        return np.isnan(self.raw_NK)

    @property
    def values_NK(self) -> np.ndarray:
        """Values scaled to [0, 1] by the bounds, larger is better; NaN where missing."""
        return np.stack([o.scale(self.raw_NK[:, k]) for k, o in enumerate(self.objectives)], axis=1)


def stack(matrices: Sequence[RewardMatrix]) -> RewardMatrix:
    """The rows of several matrices on the same objectives, one below the other."""
    errors, rows = {}, 0
    for matrix in matrices:
        errors |= {(n + rows, k): reason for (n, k), reason in matrix.errors.items()}
        rows += len(matrix.raw_NK)
    return RewardMatrix(matrices[0].objectives, np.concatenate([m.raw_NK for m in matrices]), errors)
