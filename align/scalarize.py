"""Scalarisations: one reward per sample out of K, before any baseline. rewards_PGK + weights_K -> rewards_PG.

Rewards are scaled to [0, 1], larger is better; weights are 0 or more and at least one is above 0. A sample that is left
out is NaN before and after.
"""

import moocore
import numpy as np


def chebyshev(rewards_PGK: np.ndarray, weights_K: np.ndarray, augmentation: float) -> np.ndarray:
    """Augmented weighted Chebyshev scalarisation: the sample counts by its worst objective (Steuer & Choo 1983).

    r = min_k w_k (r_k - 1) + augmentation * sum_k w_k (r_k - 1): minus the weighted distance to the ideal point, the best
    bound of every objective. The sum tells apart samples that are equal in the worst objective.
    The paper scalarises outcomes of a decision with a sum that carries no weights; here it is applied to each sample (so
    the policy maximises the mean of minima, not the minimum of means), and weights in the sum let a weight of 0 drop out.
    """
    losses_PGK = weights_K * (rewards_PGK - 1.0)
    return losses_PGK.min(axis=2) + augmentation * losses_PGK.sum(axis=2)


def product(rewards_PGK: np.ndarray, weights_K: np.ndarray, margin: float) -> np.ndarray:
    """Product over objectives of what a sample has above the batch's worst (HVO, 2510.19325).

    r = prod_k (r_k - (min_k - margin)) ** (n w_k / sum_l w_l), min_k over the batch and n the number of objectives with a
    weight: the volume of the box between the sample and a point just below the worst of the batch.
    The paper multiplies each factor by its weight, which changes nothing but a common factor; here weights are exponents,
    and equal ones give the paper's product.
    """
    active = weights_K > 0
    rewards = np.ma.masked_invalid(rewards_PGK[:, :, active])
    exponents = weights_K[active] * (active.sum() / weights_K[active].sum())
    edges_PGK = rewards - rewards.min(axis=(0, 1)) + margin
    return (edges_PGK**exponents).prod(axis=2).filled(np.nan)


def pareto_rank(rewards_PGK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """Minus the rank of a sample in the non-dominated sorting of its group (after the abstract of ParetoPO, 2606.16111).

    0 for samples that none of their group dominates, -1 for those that only these dominate, and so on; equal samples have
    equal ranks. Only objectives with a weight count, each as much as any other.
    Ranks as rewards, the estimator after them, and ranking from the first step on are our own choices: the paper starts
    with hypervolume-guided weights.
    """
    ranks_PG = np.full(rewards_PGK.shape[:2], np.nan)
    for group, ranks in zip(rewards_PGK[:, :, weights_K > 0], ranks_PG, strict=True):
        present = ~np.isnan(group).any(axis=1)
        ranks[present] = -moocore.pareto_rank(group[present], maximise=True)
    return ranks_PG
