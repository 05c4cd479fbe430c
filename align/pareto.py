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


def hypervolume_gradient(point_K: np.ndarray, others_MK: np.ndarray, reference_K: np.ndarray) -> np.ndarray:
    """Partial derivatives (K,) of the hypervolume of others + point with respect to the point.

    dHV / dv_k is the (K - 1)-dimensional volume of the face that moves: the box below v without axis k, less what the
    others with p_k >= v_k dominate of it. All are 0 where the point is dominated or below the reference
    (Emmerich & Deutz 2012). Where it ties with another point or the reference in an axis, this is the derivative upwards.

    Args:
        point_K: v, the point that moves.
        others_MK: The points that stay; M may be 0.
        reference_K: Reference point.
    """
    gradient_K = np.zeros(len(point_K))
    if not (point_K >= reference_K).all() or (len(others_MK) and (others_MK > point_K).all(axis=1).any()):
        return gradient_K
    for k in range(len(point_K)):
        rest = np.arange(len(point_K)) != k
        ahead = np.minimum(others_MK[others_MK[:, k] > point_K[k]][:, rest], point_K[rest])
        gradient_K[k] = np.prod(point_K[rest] - reference_K[rest])
        if rest.any() and len(ahead):
            gradient_K[k] -= hypervolume(ahead, reference_K[rest])
    return np.maximum(gradient_K, 0.0)


def to_the_front(point_K: np.ndarray, others_MK: np.ndarray, reference_K: np.ndarray) -> np.ndarray:
    """Shortest move (K,), 0 or more in every axis, that makes a point one that the others do not dominate.

    Minus its length is the uncrowded part of the uncrowded hypervolume improvement (Touré et al. 2019): the distance to
    the border of what the others and the reference point dominate. The points of that border which are at least v are
    found by splitting: a corner u that some p exceeds in every axis is replaced by the K corners with u_k = p_k. Of
    several shortest moves the mean is taken, so that the order of axes does not matter.
    """
    corners = {tuple(np.maximum(point_K, reference_K))}
    for p in others_MK[(others_MK > reference_K).all(axis=1)]:
        inside = [u for u in corners if (p > np.array(u)).all()]
        split = {tuple(np.where(np.arange(len(p)) == k, p, u)) for u in inside for k in range(len(p))}
        kept = corners.difference(inside)
        corners = kept | {u for u in split if not any(v != u and np.less_equal(v, u).all() for v in kept | split)}
    moves = np.array(sorted(corners)) - point_K
    lengths = np.linalg.norm(moves, axis=1)
    return moves[lengths <= lengths.min() + 1e-12].mean(axis=0)


def _check(points_MK: np.ndarray) -> None:
    if points_MK.ndim != 2 or not len(points_MK):
        raise ValueError(f"points must be a table (M, K) with at least one row; got shape {points_MK.shape}")
    if not np.isfinite(points_MK).all():
        raise ValueError(f"points must be finite; row {int(np.argmin(np.isfinite(points_MK).all(axis=1)))} is not")
