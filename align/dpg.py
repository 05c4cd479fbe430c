"""Distributional policy gradient: log-densities of samples -> advantages and divergences, as pure functions.

P prompts, G samples each; a (the reference policy), q (what drew the samples) and pi (the policy under training) are given
as log-probabilities of whole samples, nats. A sample that is left out is NaN: it touches no statistic, its advantage is 0.
"""

from collections.abc import Mapping

import numpy as np


def log_target(
    log_reference_PG: np.ndarray, features_PGF: np.ndarray, coefficients_F: np.ndarray, holds_PG: np.ndarray
) -> np.ndarray:
    """log P(x) of the target: P = a b exp(lambda . phi), b = 1 where all that must always hold does (2012.11635).

    Among distributions with moments E[phi] on which b always holds, p = P / Z is the nearest to a. Where b does not hold
    log P is -infinity. The paper gives such a feature a finite lambda when there are moments besides; here it stays b.
    """
    return np.where(holds_PG, log_reference_PG + features_PGF @ coefficients_F, -np.inf)


def log_means(logs_PG: np.ndarray) -> np.ndarray:
    """log mean exp over each row (P,), of what is present; -infinity for a row of which nothing counts."""
    present_PG = ~np.isnan(logs_PG)
    largest_P1 = np.max(np.where(present_PG, logs_PG, -np.inf), axis=1, keepdims=True)
    shift_P1 = np.where(np.isfinite(largest_P1), largest_P1, 0.0)
    totals_P = np.where(present_PG, np.exp(logs_PG - shift_P1), 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        return shift_P1[:, 0] + np.log(totals_P) - np.log(np.maximum(present_PG.sum(axis=1), 1))


def normalised(log_weights_PG: np.ndarray, log_normaliser_P: np.ndarray) -> np.ndarray:
    """log of w = P / (Z q), from log P / q and log Z; NaN also in groups whose Z is 0, of which nothing is known.

    With Z_c of each prompt, the mean of its own group, w is self-normalised: it has mean one, a bias of O(1/G) that
    vanishes as q nears p (all weights are then equal), and no prompt has the less say the smaller its Z_c is (CDPG,
    2112.00791, which adds 1e-4 to Z_c instead of leaving such groups out).
    """
    known_P = np.isfinite(log_normaliser_P)
    log_normaliser_P = np.where(known_P, log_normaliser_P, 0.0)
    return np.where(known_P[:, None], log_weights_PG - log_normaliser_P[:, None], np.nan)


def dpg_advantages(log_w_PG: np.ndarray, log_r_PG: np.ndarray, baseline: bool, cap: float) -> np.ndarray:
    """A = min(w, cap) - r, with w = P / (Z q) and r = pi / q; without the baseline, min(w, cap) (2012.11635, 2206.00761).

    E_q[w grad log pi] is minus the gradient of KL(p || pi), and E_q[r grad log pi] = 0: the baseline changes the variance
    alone. The papers' weights are P / q, whose scale, and so that of the step, is Z. The cap is biased, towards q.
    """
    advantages = np.minimum(np.exp(log_w_PG), cap) - (np.exp(log_r_PG) if baseline else 0.0)
    return np.where(np.isnan(advantages), 0.0, advantages)


def divergences(log_w_PG: np.ndarray, log_r_PG: np.ndarray, log_tilt_PG: np.ndarray) -> Mapping[str, float]:
    """KL(p || pi), KL(p || q), KL(pi || a) in nats, TV(p, pi), and the effective share of the samples.

    With w = P / (Z q) and r = pi / q, means over samples of q: KL(p || pi) = E[w log(w / r) - w + r],
    KL(p || q) = E[w log w - w + 1], TV(p, pi) = E|w - r| / 2, KL(pi || a) = E[r log(pi / a)], ess = E[w]^2 / E[w^2]. As
    E[w] = E[r] = 1 the first two are the papers' -log Z + E[w log(P / pi)]; here no sample's part is negative, and they are
    steadier. With a normaliser per prompt they are too low, by O(1/G).

    Args:
        log_w_PG: log w.
        log_r_PG: log r.
        log_tilt_PG: log(pi / a).
    """
    present = ~np.isnan(log_w_PG) & ~np.isnan(log_r_PG)
    if not present.any():
        return dict.fromkeys(("kl_target_policy", "kl_target_proposal", "tv", "kl_policy_reference", "ess"), np.nan)
    log_w, log_r, log_tilt = log_w_PG[present], log_r_PG[present], log_tilt_PG[present]
    w, r = np.exp(log_w), np.exp(log_r)
    log_w = np.where(w > 0, log_w, 0.0)  # 0 log 0 = 0
    squares = (w**2).mean()
    return {
        "kl_target_policy": float((w * (log_w - log_r) - w + r).mean()),
        "kl_target_proposal": float((w * log_w - w + 1).mean()),
        "tv": float(0.5 * np.abs(w - r).mean()),
        "kl_policy_reference": float((r * log_tilt).mean()),
        "ess": float(w.mean() ** 2 / squares) if squares else 0.0,
    }


def policy_moments(features_PGF: np.ndarray, log_r_PG: np.ndarray) -> np.ndarray:
    """E_pi[phi] (F,) from samples of q: sum r phi / sum r, r = pi / q."""
    present = ~np.isnan(log_r_PG) & ~np.isnan(features_PGF).any(axis=2)
    if not present.any():
        return np.full(features_PGF.shape[2], np.nan)
    r = np.exp(log_r_PG[present])
    return r @ features_PGF[present] / r.sum()


def jackknifed_moments(weights_N: np.ndarray, features_NF: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
    """Mean over groups (F,) of sum w phi / sum w, its bias of O(1/G) taken out by leaving out one sample after another.

    m_J = n m - (n - 1) mean_i m_(-i), n the samples of a group, m_(-i) its moment without sample i (Quenouille 1956). A
    group of one sample counts as it is.
    """
    moments = []
    for group in np.unique(groups_N):
        w, phi = weights_N[groups_N == group], features_NF[groups_N == group]
        total, products = w.sum(), w[:, None] * phi
        moment, count = products.sum(axis=0) / total, len(w)
        if count > 1:
            without = (products.sum(axis=0) - products) / (total - w)[:, None]
            moment = count * moment - (count - 1) * without.mean(axis=0)
        moments.append(moment)
    return np.mean(moments, axis=0)
