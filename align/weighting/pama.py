"""PAMA: the min-norm problem reduced to one number per objective."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config.weighting import PamaWeighting
from align.weighting.adaptive import Adaptive
from align.weighting.base import Observation


@dataclass(frozen=True)
class Pama(Adaptive):
    """All weight to the objective with the weakest positive advantage (2508.07768).

    The paper replaces min_w |sum_k w_k g_k|^2 over the simplex by a bound in which objective k enters as one scalar a_k:
    the minimum is the projection of 0 onto [min a, max a], and with only positive advantages kept (its "Noon PPO")
    a_k >= 0, so that it is reached by the smallest a_k. Here a_k = mean over the batch of max(r_k - group mean, 0);
    objectives that tie share the weight.

    Departures: an objective whose samples are all alike in the batch keeps its weight (to the paper its 0 is the smallest
    scalar, and such a batch would train nothing); the policy loss keeps its negative advantages; `smoothing` spreads the
    weight over time, which the paper has no need of, since it mixes values and not rewards. Costs O(K), no gradients.
    """

    config: PamaWeighting

    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """One for the smallest scalar, 0 for the others; an objective that nobody measured keeps its weight."""
        rewards = np.ma.masked_invalid(observation.rewards_PGK)
        positive = np.ma.maximum(rewards - rewards.mean(axis=1, keepdims=True), 0.0)
        scalar_K = np.ma.filled(positive.mean(axis=(0, 1)), np.nan)
        scalar_K[scalar_K == 0] = np.nan
        smallest_K = np.where(np.isnan(scalar_K), np.nan, scalar_K <= np.nanmin(scalar_K, initial=np.inf) + 1e-12)
        return smallest_K.astype(float), {"positive_advantage": scalar_K}
