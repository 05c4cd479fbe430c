"""Weights that tilt a pool of samples to declared moments, with the least divergence from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from align.selftrain.weights import WeightsError

_STEPS = 200  # of Newton's method; a few tens where a moment is at the end of its range, else about five
_LAST_STEPS = 2  # after the tolerance is met: the gap is squared by each, or divided by e at the end of a range
_FURTHEST = 4.0  # that a step may move a coefficient, in units of 1 / range of its feature
_SLACK = 1e-7  # of a range: what the linear programs that look for ranges are accurate to


class TiltError(WeightsError):
    """No weights give the moments that were asked for."""


@dataclass(frozen=True)
class Tilt:
    """A tilted pool of N samples with F features.

    Args:
        coefficients_F: lambda, per unit of each feature; `exp(coefficients . features)` tilts new samples alike.
        weights_N: Of the samples, with mean one, the weights that the pool had included.
        ess: Effective sample size (sum w)^2 / (N sum w^2) as a share of N, in (0, 1].
        moments_F: Means of the features under the weights: those asked for, to the tolerance.
        divergence: KL(tilted || given) in nats, estimated on the pool: lambda . moments - log Z.
        log_normaliser: log Z, Z the mean of exp(lambda . features) over the given distribution; the mean of log Z over the
            groups, where there are several.
    """

    coefficients_F: np.ndarray
    weights_N: np.ndarray
    ess: float
    moments_F: np.ndarray
    divergence: float
    log_normaliser: float


def fit_tilt(
    features_NF: np.ndarray,
    moments_F: np.ndarray,
    log_weights_N: np.ndarray | None = None,
    tolerance: float = 1e-6,
    groups_N: np.ndarray | None = None,
    names: Sequence[object] = (),
) -> Tilt:
    """The distribution with given moments that is nearest to that of the samples (distributional control, 2012.11635).

    p(x) = a(x) exp(lambda . phi(x)) / Z minimises KL(p || a) subject to E_p[phi] = moments. On samples x_i with weights u_i
    (of a over what drew them) p is w_i = u_i exp(lambda . phi(x_i)) / sum_j u_j exp(lambda . phi(x_j)), self-normalised
    importance sampling, and lambda maximises the concave dual lambda . moments - log Z(lambda), whose gradient is
    moments - sum_i w_i phi(x_i), by Newton's method with a line search, all in logarithms.

    The paper descends the squared gap, and its code climbs the dual by fixed steps up to a gap of 0.01. A moment at the
    very end of its range (a feature that must always hold) wants an infinite lambda: there the tolerance ends the climb,
    at about ln(1 / tolerance). What p is on texts that the pool has not, the estimates cannot know: they are for many
    samples, features that are not rare, and an `ess` that is not small.

    With groups (the samples of one prompt each) every group keeps its share: p_c(x) = a(x | c) exp(lambda . phi(x)) / Z_c,
    one lambda for all, E_c E_{p_c}[phi] = moments, and the dual is lambda . moments - mean_c log Z_c. From G samples of a
    group log Z_c is too low by about Var(w) / (2 G Z_c^2), and lambda comes out too large: groups want to be large.

    Args:
        features_NF: phi of each sample.
        moments_F: Wanted means of the features, in their units.
        log_weights_N: log u_i up to a constant, -infinity for samples that do not count; absent, the samples are a's own.
        tolerance: Largest gap between a wanted and a reached moment, as a share of the range of the feature.
        groups_N: Group of each sample; absent, all are one. A group without a sample that counts is left out.
        names: Of the features, for messages.

    Raises:
        TiltError: A feature is the same in all samples (it never fires), a moment is outside the range that weights can
            reach, alone or together with the others, or the climb did not come to its end.
        ValueError: Shapes that do not fit, no samples, or numbers that are not finite.
    """
    features_NF, moments_F, log_weights_N = _checked(features_NF, moments_F, log_weights_N, tolerance)
    given_NF, logs_N = features_NF[alive_N := np.isfinite(log_weights_N)], log_weights_N[alive_N]
    groups_M = np.unique(_numbered(groups_N, len(features_NF))[alive_N], return_inverse=True)[1]
    names = [f"feature {name}" for name in names or range(len(moments_F))]
    low_F, range_F = _ranges(given_NF, moments_F, groups_M, names)
    unit_NF, targets_F = (given_NF - low_F) / range_F, (moments_F - low_F) / range_F
    logs_N = logs_N - _log_sums(logs_N, groups_M)[groups_M]
    scaled_F = _climb(unit_NF, targets_F, logs_N, groups_M, tolerance)
    log_unit, weights_M = _tilted(unit_NF, logs_N, groups_M, scaled_F)
    reached_F = weights_M @ unit_NF
    if (np.abs(targets_F - reached_F) > tolerance).any():
        raise TiltError(_why(unit_NF, targets_F, low_F, range_F, reached_F, names, groups_M.max() > 0))
    coefficients_F = scaled_F / range_F
    weights_N = np.zeros(len(features_NF))
    weights_N[alive_N] = weights_M * len(features_NF)
    return Tilt(
        coefficients_F=coefficients_F,
        weights_N=weights_N,
        ess=float(min(1.0, 1.0 / (len(features_NF) * (weights_M**2).sum()))),
        moments_F=low_F + range_F * reached_F,
        divergence=max(0.0, float(scaled_F @ reached_F - log_unit)),
        log_normaliser=float(log_unit + coefficients_F @ low_F),
    )


def _climb(
    unit_NF: np.ndarray, targets_F: np.ndarray, logs_N: np.ndarray, groups_N: np.ndarray, tolerance: float
) -> np.ndarray:
    """lambda that maximises the dual, of features scaled to [0, 1]; the last one found, where it has no maximum."""
    scaled_F = np.zeros_like(targets_F)
    log_normaliser, weights_N = _tilted(unit_NF, logs_N, groups_N, scaled_F)
    met = 0
    for _ in range(_STEPS):
        mean_F = weights_N @ unit_NF
        gap_F = targets_F - mean_F
        met += np.abs(gap_F).max() <= tolerance
        if met > _LAST_STEPS or not gap_F.any():
            break
        centred_NF = unit_NF - _group_means(unit_NF, weights_N, groups_N)[groups_N]
        curvature_FF = (centred_NF * weights_N[:, None]).T @ centred_NF
        step_F = np.linalg.lstsq(curvature_FF, gap_F, rcond=1e-12)[0]  # the shortest, when features determine one another
        if not (np.isfinite(step_F).all() and step_F @ gap_F > 0):
            step_F = gap_F
        step_F = step_F * min(1.0, _FURTHEST / np.abs(step_F).max())
        dual = scaled_F @ targets_F - log_normaliser
        for length in 0.5 ** np.arange(40):
            log_next, weights_next = _tilted(unit_NF, logs_N, groups_N, scaled_F + length * step_F)
            gain = (scaled_F + length * step_F) @ targets_F - log_next - dual
            if gain >= 1e-4 * length * (step_F @ gap_F) - 1e-14:
                break
        else:
            break
        scaled_F, log_normaliser, weights_N = scaled_F + length * step_F, log_next, weights_next
    return scaled_F


def _tilted(unit_NF: np.ndarray, logs_N: np.ndarray, groups_N: np.ndarray, scaled_F: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of log Z over the groups, and the weights: the sum of each group's is its share, one over their number."""
    tilted_N = logs_N + unit_NF @ scaled_F
    log_normaliser_P = _log_sums(tilted_N, groups_N)
    return float(log_normaliser_P.mean()), np.exp(tilted_N - log_normaliser_P[groups_N]) / len(log_normaliser_P)


def _log_sums(logs_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """log sum exp of every group (P,)."""
    largest_P = np.full(groups_N.max() + 1, -np.inf)
    np.maximum.at(largest_P, groups_N, logs_N)
    return largest_P + np.log(np.bincount(groups_N, np.exp(logs_N - largest_P[groups_N])))


def _group_means(unit_NF: np.ndarray, weights_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Weighted means of the features in every group (P, F)."""
    sums_PF = np.zeros((groups_N.max() + 1, unit_NF.shape[1]))
    np.add.at(sums_PF, groups_N, weights_N[:, None] * unit_NF)
    return sums_PF * len(sums_PF)


def _numbered(groups_N: np.ndarray | None, count: int) -> np.ndarray:
    groups_N = np.zeros(count, dtype=int) if groups_N is None else np.asarray(groups_N)
    if groups_N.shape != (count,):
        raise ValueError(f"groups of shape {groups_N.shape} for {count} samples")
    return groups_N


def _ranges(
    given_NF: np.ndarray, moments_F: np.ndarray, groups_N: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Least value and range of each feature. Raises TiltError when a feature or a moment alone makes it impossible."""
    least_PF, most_PF = (np.full((groups_N.max() + 1, len(moments_F)), sign * np.inf) for sign in (1, -1))
    np.minimum.at(least_PF, groups_N, given_NF)
    np.maximum.at(most_PF, groups_N, given_NF)
    low_F, high_F = least_PF.min(axis=0), most_PF.max(axis=0)
    for f, moment in enumerate(moments_F):
        if low_F[f] == high_F[f] == 0:
            raise TiltError(
                f"{names[f]} never fires: it is 0 in all {len(given_NF)} samples, and no weights make it {moment:g}; "
                "draw more samples, or add some that have it"
            )
        if low_F[f] == high_F[f]:
            raise TiltError(f"{names[f]} is {low_F[f]:g} in all {len(given_NF)} samples: no weights move it; leave it out")
        low, high = least_PF[:, f].mean(), most_PF[:, f].mean()  # each group keeps its share
        if not low <= moment <= high:
            raise TiltError(
                f"moment {moment:g} of {names[f]} is out of reach: over {len(given_NF)} samples it lies in "
                f"[{low:g}, {high:g}]"
            )
    return low_F, high_F - low_F


def _why(
    unit_NF: np.ndarray,
    targets_F: np.ndarray,
    low_F: np.ndarray,
    range_F: np.ndarray,
    reached_F: np.ndarray,
    names: Sequence[str],
    grouped: bool,
) -> str:
    """Which moment cannot be had together with those before it, and what it could be."""
    rows_NF = np.unique(unit_NF, axis=0)
    for f in range(1, len(targets_F) if not grouped else 0):
        equal = np.vstack([np.ones(len(rows_NF)), rows_NF[:, :f].T])
        ends = [linprog(sign * rows_NF[:, f], A_eq=equal, b_eq=[1.0, *targets_F[:f]], bounds=(0, None)) for sign in (1, -1)]
        if not all(end.success for end in ends):
            break
        least, most = ends[0].fun, -ends[1].fun
        if not least - _SLACK <= targets_F[f] <= most + _SLACK:
            least, most, wanted = (float(low_F[f] + range_F[f] * unit) for unit in (least, most, targets_F[f]))
            others = ", ".join(f"{low_F[o] + range_F[o] * targets_F[o]:g} of {names[o]}" for o in range(f))
            return (
                f"moment {wanted:g} of {names[f]} is out of reach together with {others}: over {len(unit_NF)} samples it "
                f"then lies in [{least:.4g}, {most:.4g}]"
            )
    gaps = ", ".join(f"{low + width * unit:.6g}" for low, width, unit in zip(low_F, range_F, reached_F, strict=True))
    return f"the tilt came no nearer than moments {gaps}: they are at the edge of what these samples can give; ask for less"


def _checked(
    features_NF: np.ndarray, moments_F: np.ndarray, log_weights_N: np.ndarray | None, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of float64 of shapes that fit. Raises ValueError."""
    features_NF, moments_F = np.asarray(features_NF, dtype=float), np.asarray(moments_F, dtype=float)
    if features_NF.ndim != 2 or 0 in features_NF.shape or moments_F.shape != features_NF.shape[1:]:
        raise ValueError(
            f"features of shape {features_NF.shape} and moments of shape {moments_F.shape}: want (N, F) and (F,), with at "
            "least one sample and one feature"
        )
    log_weights_N = np.zeros(len(features_NF)) if log_weights_N is None else np.asarray(log_weights_N, dtype=float)
    if log_weights_N.shape != features_NF.shape[:1]:
        raise ValueError(f"log weights of shape {log_weights_N.shape} for {len(features_NF)} samples")
    if np.isnan(log_weights_N).any() or np.isposinf(log_weights_N).any() or np.isneginf(log_weights_N).all():
        raise ValueError("log weights must be numbers or -infinity, and not -infinity for all samples")
    if not np.isfinite(features_NF[np.isfinite(log_weights_N)]).all() or not np.isfinite(moments_F).all():
        raise ValueError("features and moments must be finite numbers: leave out samples that have none")
    if not 0 < tolerance < 1:
        raise ValueError(f"the tolerance of a tilt is {tolerance}, and must be between 0 and 1")
    return features_NF, moments_F, log_weights_N
