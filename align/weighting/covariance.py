"""Covariance targets (CTWA)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config.weighting import CovarianceWeighting
from align.weighting.adaptive import Adaptive
from align.weighting.base import Observation, Signal
from rewards.types import Objective


@dataclass(frozen=True)
class Covariance(Adaptive):
    """Weight grows while an objective's covariance with the advantage stays below its target (2602.06869).

    To first order in the step, E[r_k] changes in proportion to c_k = mean over prompts of Cov_group(r_k, A). With c kept
    as a moving average, and an objective whose mean has passed its cap left alone,

        w_k <- w_k exp(rate * max(target_k - c_k, 0)) / Z

    Departures: A is the advantage that the weights still in force give the batch (the paper also has the importance
    ratio and the clipping mask, both 1 on the first update of a batch); Z keeps the weights on the simplex (the paper's
    only grow, which in a normalised advantage changes nothing but in a raw one grows the step); rewards are scaled to
    [0, 1] by their bounds.
    """

    config: CovarianceWeighting

    def remember(self, objectives: Sequence[Objective]) -> Mapping[str, Any]:
        """Target and cap of every objective."""
        names = [objective.name for objective in objectives]
        tables = {"target": self.config.target, "cap": self.config.cap}
        return {key: [[n, float(t[n] if isinstance(t, dict) else t)] for n in names] for key, t in tables.items()}

    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """The weights times their growth."""
        target_K, cap_K = (np.array([number for _, number in memory[key]]) for key in ("target", "cap"))
        rewards = np.ma.masked_invalid(observation.rewards_PGK)
        now_K = covariances(rewards, observation.signals[Signal.ADVANTAGES])
        before_K = np.array([memory.get("covariance", {}).get(name, np.nan) for name, _ in memory["target"]])
        average_K = np.where(np.isnan(before_K), now_K, self.config.average * before_K + (1 - self.config.average) * now_K)
        average_K = np.where(np.isnan(now_K), before_K, average_K)
        short_K = np.where(
            np.ma.filled(rewards.mean(axis=(0, 1)), np.nan) < cap_K, np.maximum(np.array(target_K) - average_K, 0), 0
        )
        growth_K = np.exp(self.config.rate * short_K)
        return np.where(np.isnan(now_K), np.nan, weights_K * growth_K), {"covariance": average_K}


def covariances(rewards_PGK: np.ma.MaskedArray, advantages_PG: np.ndarray) -> np.ndarray:
    """Mean over groups of the covariance (n - 1) between each reward and the advantage (K,); NaN where none is measured.

    Masked samples count nowhere; groups with fewer than two samples of an objective are left out of its mean.
    """
    advantages = np.ma.masked_array(np.broadcast_to(advantages_PG[:, :, None], rewards_PGK.shape), rewards_PGK.mask)
    count_PK = rewards_PGK.count(axis=1)
    centred = (rewards_PGK - rewards_PGK.mean(axis=1, keepdims=True)) * (advantages - advantages.mean(axis=1, keepdims=True))
    covariance_PK = np.ma.masked_where(count_PK < 2, centred.sum(axis=1) / np.maximum(count_PK - 1, 1))
    return np.ma.filled(covariance_PK.mean(axis=0), np.nan)
