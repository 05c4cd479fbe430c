"""Weights from simple statistics of the batch: how much an objective varies (SAW), how much room it has (SA-MRPO)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config.weighting import SaturationWeighting, VariationWeighting
from align.weighting.adaptive import Adaptive
from align.weighting.base import Observation


@dataclass(frozen=True)
class Variation(Adaptive):
    """w_k in proportion to prior_k CV_k, CV_k = std_k / (mean_k + epsilon) over the batch (SAW, 2606.07705).

    Rewards are taken from their smallest possible value on; here the declared bounds say what that is, and scale them.
    Departure: the paper's weights for sum-then-normalise sum to one and those for normalise-then-sum to K; ours sum to
    one under both, which is the same after its normalisation.
    """

    config: VariationWeighting

    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """The prior times the coefficients of variation."""
        rewards = np.ma.masked_invalid(observation.rewards_PGK)
        std_K, mean_K = rewards.std(axis=(0, 1), ddof=1), rewards.mean(axis=(0, 1))
        variation_K = np.ma.filled(std_K / (mean_K + self.config.epsilon), np.nan)
        return prior_K * variation_K, {"variation": variation_K}


@dataclass(frozen=True)
class Saturation(Adaptive):
    """w_k in proportion to prior_k (1 - s_k)^gamma, s_k = the batch mean scaled to its bounds (SA-MRPO, 2026).

    The paper puts these weights on standardised rewards and whitens the sum (`combination: normalize_then_sum`); gamma = 0
    is then GDPO. Departure: the weights are brought to sum one, which the whitening takes out again.
    """

    config: SaturationWeighting

    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """The prior times the room that is left."""
        saturation_K = np.ma.filled(np.ma.masked_invalid(observation.rewards_PGK).mean(axis=(0, 1)), np.nan)
        return prior_K * (1 - saturation_K) ** self.config.gamma, {"saturation": saturation_K}
