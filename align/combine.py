"""Combinations: where the weights meet the rewards. rewards_PGK + weights_K -> advantages_PG, as pure functions.

Four scalarise first, by a sum or by what `align/scalarize.py` has, and apply the estimator to one reward per sample. Of
the others `estimate_then_sum` applies the estimator to every objective; the rest standardise every objective themselves,
over the group, or over the batch where the estimator has a batch baseline (`over_batch`, which no paper treats).
"""

import numpy as np

from align import advantages, scalarize
from align.config import CombinationConfig, EstimatorConfig


def combine(
    rewards_PGK: np.ndarray, weights_K: np.ndarray, estimator: EstimatorConfig, combination: CombinationConfig
) -> np.ndarray:
    """Advantages (P, G) of a batch under a configured estimator and combination.

    Args:
        rewards_PGK: Scaled rewards; all K values of a sample that is left out are NaN.
        weights_K: Weights of the objectives. Negative ones, and a column with a range of its own, are for
            `sum_then_normalize`, `estimate_then_sum`, `mo_grpo` and `normalize_then_sum`.
    """
    over_batch = estimator.type == "reinforce"
    match combination.type:
        case "sum_then_normalize":
            return estimate(rewards_PGK @ weights_K, estimator)
        case "chebyshev":
            return estimate(scalarize.chebyshev(rewards_PGK, weights_K, combination.augmentation), estimator)
        case "product":
            return estimate(scalarize.product(rewards_PGK, weights_K, combination.margin), estimator)
        case "pareto_rank":
            return estimate(scalarize.pareto_rank(rewards_PGK, weights_K), estimator)
        case "estimate_then_sum":
            return estimate_then_sum(rewards_PGK, weights_K, estimator)
        case "mo_grpo":
            return mo_grpo(rewards_PGK, weights_K, over_batch)
        case "normalize_then_sum":
            return normalize_then_sum(rewards_PGK, weights_K, over_batch)
        case "dvao":
            return dvao(rewards_PGK, weights_K, over_batch)
        case "soft_min":
            return soft_min(rewards_PGK, weights_K, combination.kappa, over_batch)
    raise AssertionError(combination)


def estimate(rewards_PG: np.ndarray, estimator: EstimatorConfig) -> np.ndarray:
    """The configured estimator applied to one reward per sample."""
    if estimator.type == "grpo":
        return advantages.grpo(rewards_PG, estimator.scale)
    if estimator.type == "rloo":
        return advantages.rloo(rewards_PG)
    return advantages.reinforce(rewards_PG, estimator.whiten)


def estimate_then_sum(rewards_PGK: np.ndarray, weights_K: np.ndarray, estimator: EstimatorConfig) -> np.ndarray:
    """The estimator applied to every objective alone, then the weighted sum: A = sum_k w_k E(r_k).

    Linear in the weights, so the gradient of the policy is the weighted sum of the objectives' gradients: what weights
    out of gradients and Lagrangian multipliers assume, and what Constrained GRPO (2602.05863) advises. E is any of ours;
    the paper has grpo.
    """
    return sum(weight * estimate(rewards_PGK[:, :, k], estimator) for k, weight in enumerate(weights_K))


def mo_grpo(rewards_PGK: np.ndarray, weights_K: np.ndarray, over_batch: bool) -> np.ndarray:
    """Standardise every objective, add them up (MO-GRPO, 2509.22047).

    A = sum_k w_k z_k with z_k = (r_k - mean) / (std + EPSILON): under equal weights each objective has the same say,
    whatever its spread. The paper has no weights. Unlike `normalize_then_sum` it does not whiten the sum, so objectives
    that cancel each other leave small advantages.
    """
    return sum(weight * _standardise(rewards_PGK[:, :, k], over_batch) for k, weight in enumerate(weights_K))


def normalize_then_sum(rewards_PGK: np.ndarray, weights_K: np.ndarray, over_batch: bool) -> np.ndarray:
    """Standardise every objective, add them up, whiten the sum over the batch (GDPO, 2601.05242).

    A = whiten(sum_k w_k z_k) with z_k = (r_k - mean) / (std + EPSILON).
    """
    return _whiten(mo_grpo(rewards_PGK, weights_K, over_batch), rewards_PGK)


def dvao(rewards_PGK: np.ndarray, weights_K: np.ndarray, over_batch: bool) -> np.ndarray:
    """Standardised objectives, weighted by their own spread too (DVAO, 2605.25604).

    A = sum_k w_k s_k z_k / sum_l w_l s_l, s_k the standard deviation and z_k = (r_k - mean_k) / s_k. As s_k z_k is the
    centred reward, this is the centred sum over the sum of spreads; that is never less than the spread of the sum, so no
    advantage exceeds that of `sum_then_normalize`. As elsewhere EPSILON is added to the denominator.
    """
    axis = (0, 1) if over_batch else 1
    rewards = np.ma.masked_invalid(rewards_PGK)
    total = np.ma.masked_invalid(rewards_PGK @ weights_K)
    spread = rewards.std(axis=axis, ddof=1, keepdims=True).filled(0.0) @ weights_K
    return ((total - total.mean(axis=None if over_batch else 1, keepdims=True)) / (spread + advantages.EPSILON)).filled(0.0)


def soft_min(rewards_PGK: np.ndarray, weights_K: np.ndarray, kappa: float, over_batch: bool) -> np.ndarray:
    """Standardise every objective, take their soft minimum, whiten it over the batch (RVPO, 2605.05750).

    A = whiten(-(1 / kappa) log sum_k w_k exp(-kappa z_k)), weights divided by their sum. kappa -> 0 gives the mean, which
    is `normalize_then_sum`; kappa -> infinity the worst objective, whatever the weights above 0.
    The paper has equal weights.
    """
    active = np.flatnonzero(weights_K > 0)
    shares = weights_K[active] / weights_K[active].sum()
    z_PGK = np.stack([_standardise(rewards_PGK[:, :, k], over_batch) for k in active], axis=2)
    return _whiten(-np.logaddexp.reduce(np.log(shares) - kappa * z_PGK, axis=2) / kappa, rewards_PGK)


def _standardise(rewards_PG: np.ndarray, over_batch: bool) -> np.ndarray:
    return advantages.reinforce(rewards_PG, whiten=True) if over_batch else advantages.grpo(rewards_PG, "group")


def _whiten(total_PG: np.ndarray, rewards_PGK: np.ndarray) -> np.ndarray:
    left_out_PG = np.isnan(rewards_PGK).any(axis=2)
    return advantages.reinforce(np.where(left_out_PG, np.nan, total_PG), whiten=True)


def objective_advantages(rewards_PGK: np.ndarray, estimator: EstimatorConfig, combination: CombinationConfig) -> np.ndarray:
    """Advantages (P, G, K) that each objective would give if it were the only one; 0 for samples that are left out.

    They are what a combination that adds objectives up adds up: standardised ones where it standardises by itself.
    """
    over_batch = estimator.type == "reinforce"
    alone = (lambda r: _standardise(r, over_batch)) if combination.standardises else (lambda r: estimate(r, estimator))
    return np.stack([alone(rewards_PGK[:, :, k]) for k in range(rewards_PGK.shape[2])], axis=2)
