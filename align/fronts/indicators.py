"""Indicators of sets of points, for many resamples at once.

Everywhere: points (..., M, K) in [0, 1], larger is better; a leading axis is one resample after another.
"""

from dataclasses import dataclass

import moocore
import numpy as np
from scipy.stats import qmc

from align.pareto import nondominated

FEW = 7  # points whose hypervolume is summed over all subsets
WEIGHT_VECTORS = 1024  # of the expected utility; a power of 2, as Sobol sequences want it


def hypervolumes(points_BMK: np.ndarray, reference_K: np.ndarray) -> np.ndarray:
    """Share of the volume between the reference point and 1 that the M points dominate (B,); M may be 0.

    HV = vol(union over m of [r, v_m]) / prod_k (1 - r_k) (Zitzler & Thiele 1998). With K = 2 the staircase is summed for
    all B at once, and with few points the volumes that subsets of them share; else moocore computes one after another.
    """
    if not points_BMK.shape[1]:
        return np.zeros(len(points_BMK))
    whole = float(np.prod(1 - reference_K))
    above_BMK = np.maximum(points_BMK - reference_K, 0.0)
    if len(reference_K) == 2:
        return _staircases(above_BMK) / whole
    if above_BMK.shape[1] <= FEW:
        return _inclusion_exclusion(above_BMK) / whole
    volume = moocore.Hypervolume(np.zeros(len(reference_K)), maximise=True)
    return np.array([volume(above_MK) for above_MK in above_BMK]) / whole


def _staircases(above_BM2: np.ndarray) -> np.ndarray:
    """Areas (B,) between 0 and M points each."""
    order_BM = np.argsort(-above_BM2[..., 0], axis=1, kind="stable")
    x_BM, y_BM = (np.take_along_axis(above_BM2[..., k], order_BM, axis=1) for k in (0, 1))
    higher_BM = np.diff(np.maximum.accumulate(y_BM, axis=1), axis=1, prepend=0.0)
    return (x_BM * higher_BM).sum(axis=1)


def _inclusion_exclusion(above_BMK: np.ndarray) -> np.ndarray:
    """Volumes (B,) between 0 and M points each: sum over subsets S of (-1)^(|S| + 1) prod_k min over m in S of v_mk."""
    corners_BSK, signs_S = above_BMK[:, :1], np.ones(1)
    for m in range(1, above_BMK.shape[1]):
        point_B1K = above_BMK[:, m : m + 1]
        corners_BSK = np.concatenate([corners_BSK, np.minimum(corners_BSK, point_B1K), point_B1K], axis=1)
        signs_S = np.concatenate([signs_S, -signs_S, [1.0]])
    return corners_BSK.prod(axis=2) @ signs_S


@dataclass(frozen=True)
class Linear:
    """An indicator that is linear in the vectors, because all that is chosen in it was chosen by others.

    Args:
        points_MK: Coefficients of the points.
        targets_ZK: Coefficients of the reference front.
    """

    points_MK: np.ndarray
    targets_ZK: np.ndarray

    def of(self, points_BMK: np.ndarray, targets_BZK: np.ndarray) -> np.ndarray:
        """The indicator (B,) of points, measured from a reference front."""
        return np.tensordot(points_BMK, self.points_MK, 2) + np.tensordot(targets_BZK, self.targets_ZK, 2)


def igd_plus(points_MK: np.ndarray, targets_ZK: np.ndarray) -> Linear:
    """Modified inverted generational distance: how far, on average, a reference front lies beyond the points.

    IGD+ = mean over targets z of min over points v of |max(z - v, 0)| (Ishibuchi et al. 2015). The vectors given here choose
    the point v(z) next to each target, and the direction e = max(z - v(z), 0) / |max(z - v(z), 0)| of the gap. The
    indicator is the mean of e . (z - v(z)): with the same vectors once more it is IGD+, and with those of other prompts it
    has no bias, while IGD+ itself would count noise as distance.
    """
    gaps_ZMK = np.maximum(targets_ZK[:, None] - points_MK, 0.0)
    lengths_ZM = np.sqrt((gaps_ZMK**2).sum(axis=-1))
    every_Z = np.arange(len(targets_ZK))
    nearest_Z = lengths_ZM.argmin(axis=1)
    lengths_Z1 = lengths_ZM[every_Z, nearest_Z][:, None]
    directions_ZK = gaps_ZMK[every_Z, nearest_Z] / np.where(lengths_Z1 > 0, lengths_Z1, 1.0) / len(targets_ZK)
    away_MK = np.zeros(points_MK.shape)
    np.add.at(away_MK, nearest_Z, -directions_ZK)
    return Linear(away_MK, directions_ZK)


def additive_epsilon(points_MK: np.ndarray, targets_ZK: np.ndarray) -> Linear:
    """Additive epsilon: the smallest number that, added to every axis of the points, makes them cover a reference front.

    eps = max over targets z of min over points v of max_k (z_k - v_k) (Zitzler et al. 2003). The vectors given here choose
    z, v and k; the indicator is z_k - v_k. With the same vectors once more it is eps, with those of other prompts it has no
    bias, while the maximum over noisy targets would be too large.
    """
    gaps_ZMK = targets_ZK[:, None] - points_MK
    gaps_ZM = gaps_ZMK.max(axis=-1)
    nearest_Z = gaps_ZM.argmin(axis=1)
    z = int(gaps_ZM[np.arange(len(gaps_ZM)), nearest_Z].argmax())
    m = int(nearest_Z[z])
    k = int(gaps_ZMK[z, m].argmax())
    points, targets = np.zeros(points_MK.shape), np.zeros(targets_ZK.shape)
    points[m, k], targets[z, k] = -1.0, 1.0
    return Linear(points, targets)


def weight_vectors(objectives: int) -> np.ndarray:
    """W weight vectors (W, K), uniform on the simplex: exponential variates of a Sobol sequence, divided by their sum."""
    uniform_WK = qmc.Sobol(objectives, scramble=True, rng=np.random.default_rng(0)).random(WEIGHT_VECTORS)
    exponential_WK = -np.log(np.maximum(uniform_WK, 1e-12))
    return exponential_WK / exponential_WK.sum(axis=1, keepdims=True)


def expected_utility(points_MK: np.ndarray, weights_WK: np.ndarray) -> Linear:
    """Expected utility of a user whose weights are drawn uniformly from the simplex.

    U = E_w[max_m w . v_m] (Zintgraf et al. 2015), w the W weight vectors. The vectors given here choose the point m(w) that
    each weight vector takes; the indicator is E_w[w . v_m(w)]: what somebody gets who knows his weights and picks by these.
    With the same vectors once more it is U, with those of other prompts it has no bias.
    """
    chosen_W = np.argmax(weights_WK @ points_MK.T, axis=1)
    shares_MK = np.zeros(points_MK.shape)
    np.add.at(shares_MK, chosen_W, weights_WK)
    return Linear(shares_MK / len(weights_WK), np.zeros((0, points_MK.shape[1])))


def sets_that_cover(points_BMK: np.ndarray, sets_M: np.ndarray) -> np.ndarray:
    """Whether (B, S, S) set s covers set t: every point of t is weakly dominated by a point of s.

    Set s is better than t where it covers t and t does not cover s (Zitzler et al. 2003).

    Args:
        points_BMK: The points of all sets.
        sets_M: The set of each point, 0 to S - 1; every set has a point.
    """
    order_M = np.argsort(sets_M, kind="stable")
    starts_S = np.searchsorted(sets_M[order_M], np.arange(sets_M.max() + 1))
    covers_BSS = np.empty((len(points_BMK), len(starts_S), len(starts_S)), dtype=bool)
    for b, points_MK in enumerate(points_BMK[:, order_M]):
        weakly_MM = np.ones((len(points_MK), len(points_MK)), dtype=bool)
        for axis_M in points_MK.T:
            weakly_MM &= axis_M[:, None] >= axis_M
        some_SM = np.logical_or.reduceat(weakly_MM, starts_S, axis=0)
        covers_BSS[b] = np.logical_and.reduceat(some_SM, starts_S, axis=1)
    return covers_BSS


def attainment(fronts: list[np.ndarray]) -> list[tuple[np.ndarray, float]]:
    """Empirical attainment of R fronts, one per training seed: vectors z (K,) and the share of the fronts that attain each.

    alpha(z) = share of fronts with a point v >= z in all K axes (Grunert da Fonseca et al. 2001). With 2 or 3 objectives
    the vectors are the corners of its level sets, from moocore; with more, the fronts' own points.
    """
    fronts = [front_MK for front_MK in fronts if len(front_MK)]
    if not fronts:
        return []
    points_MK = np.concatenate(fronts)
    if points_MK.shape[1] in (2, 3):
        sets_M = np.repeat(np.arange(len(fronts)), [len(front_MK) for front_MK in fronts])
        surfaces = moocore.eaf(-points_MK, sets_M)  # it minimises
        return [(-row[:-1], float(row[-1]) / 100) for row in surfaces]
    share_M = np.mean([(front_NK[:, None] >= points_MK).all(axis=-1).any(axis=0) for front_NK in fronts], axis=0)
    return [(point_K, float(share)) for point_K, share in zip(points_MK, share_M, strict=True)]


def nondominated_rows(points_MK: np.ndarray) -> np.ndarray:
    """Indices of the points that no other dominates; M may be 0."""
    return np.flatnonzero(nondominated(points_MK)) if len(points_MK) else np.arange(0)
