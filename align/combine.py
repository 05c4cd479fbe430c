"""Combinations: where the weights meet the rewards. rewards_PGK + weights_K -> advantages_PG, as pure functions."""

import numpy as np

from align import advantages
from align.config import CombinationConfig, EstimatorConfig


def combine(
    rewards_PGK: np.ndarray, weights_K: np.ndarray, estimator: EstimatorConfig, combination: CombinationConfig
) -> np.ndarray:
    """Advantages (P, G) of a batch under a configured estimator and combination.

    Args:
        rewards_PGK: Scaled rewards; all K values of a sample that is left out are NaN.
        weights_K: Weights of the objectives.
    """
    if combination.type == "normalize_then_sum":
        return normalize_then_sum(rewards_PGK, weights_K, over_batch=estimator.type == "reinforce")
    return estimate(rewards_PGK @ weights_K, estimator)


def estimate(rewards_PG: np.ndarray, estimator: EstimatorConfig) -> np.ndarray:
    """The configured estimator applied to one reward per sample."""
    if estimator.type == "grpo":
        return advantages.grpo(rewards_PG, estimator.scale)
    if estimator.type == "rloo":
        return advantages.rloo(rewards_PG)
    return advantages.reinforce(rewards_PG, estimator.whiten)


def normalize_then_sum(rewards_PGK: np.ndarray, weights_K: np.ndarray, over_batch: bool) -> np.ndarray:
    """Standardise every objective, add them up, whiten the sum over the batch (GDPO, 2601.05242).

    z_k = (r_k - mean) / (std + EPSILON) over the group, or over the batch when `over_batch` (for estimators with a
    batch baseline, which the paper does not treat); A = whiten(sum_k w_k z_k).
    """
    standardise = (lambda r: advantages.reinforce(r, whiten=True)) if over_batch else (lambda r: advantages.grpo(r, "group"))
    total_PG = sum(weight * standardise(rewards_PGK[:, :, k]) for k, weight in enumerate(weights_K))
    left_out_PG = np.isnan(rewards_PGK).any(axis=2)
    return advantages.reinforce(np.where(left_out_PG, np.nan, total_PG), whiten=True)
