"""Pareto numerics: a thin guarded layer over moocore. Everywhere: points (M, K), larger is better."""

import moocore
import numpy as np


def nondominated(points_MK: np.ndarray) -> np.ndarray:
    """Mask (M,) of the points that no other point dominates; of equal points all are kept."""
    _check(points_MK)
    return moocore.is_nondominated(points_MK, maximise=True, keep_weakly=True)


def hypervolume(points_MK: np.ndarray, reference_K: np.ndarray) -> float:
    """Volume that the points dominate above the reference point; a point not above it in every axis adds nothing."""
    _check(points_MK)
    above = points_MK[(points_MK > reference_K).all(axis=1)]
    return float(moocore.hypervolume(above, ref=reference_K, maximise=True)) if len(above) else 0.0


def _check(points_MK: np.ndarray) -> None:
    if points_MK.ndim != 2 or not len(points_MK):
        raise ValueError(f"points must be a table (M, K) with at least one row; got shape {points_MK.shape}")
    if not np.isfinite(points_MK).all():
        raise ValueError(f"points must be finite; row {int(np.argmin(np.isfinite(points_MK).all(axis=1)))} is not")
