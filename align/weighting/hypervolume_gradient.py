"""Weights that follow the partial derivatives of the hypervolume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.archive import reference_vector
from align.config.weighting import HypervolumeGradientWeighting
from align.pareto import hypervolume_gradient, to_the_front
from align.weighting.adaptive import Adaptive
from align.weighting.base import Observation, finite_vectors
from rewards.types import Objective


@dataclass(frozen=True)
class HypervolumeGradient(Adaptive):
    """w_k proportional to prior_k dHV/dv_k at the policy's current vector v (2509.11452 proposes the signal, not this rule).

    Counted from the reference point r alone, dHV/dv_k = prod_{l != k} (v_l - r_l), so w_k is proportional to
    prior_k / (v_k - r_k): the objective that lies nearest to its reference weighs most. `against: archive` counts only
    volume that no earlier policy dominates. Where all derivatives are 0, because v is dominated or not above r, the
    weights follow the shortest move out of the dominated region (uncrowded hypervolume improvement, Touré et al. 2019).
    """

    config: HypervolumeGradientWeighting

    def remember(self, objectives: Sequence[Objective]) -> Mapping[str, Any]:
        """The reference point, where it is not the initial policy."""
        reference = self.config.reference
        return {"reference_vector": [] if reference == "initial" else reference_vector(reference, objectives).tolist()}

    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """The prior times the derivatives, or times the move to the front."""
        points_MK = finite_vectors(observation, range(len(prior_K)))
        reference = memory["reference_vector"] or (points_MK[0].tolist() if len(points_MK) else [])
        known = {"reference_vector": reference}
        if self.config.vector == "batches":
            vector_K = self._moved_average(memory, observation.rewards_PGK)
        else:
            vector_K = points_MK[-1] if len(points_MK) else np.full(len(prior_K), np.nan)
        known["vector"] = vector_K
        if not reference or not np.isfinite(vector_K).all():
            return np.full(len(prior_K), np.nan), known
        reference_K = np.array(reference)
        others_MK = points_MK if self.config.against == "archive" else points_MK[:0]  # v itself among them changes nothing
        derivative_K = hypervolume_gradient(vector_K, others_MK, reference_K)
        direction_K = derivative_K if derivative_K.any() else to_the_front(vector_K, others_MK, reference_K)
        return prior_K * direction_K, {**known, "direction": direction_K}

    def _moved_average(self, memory: Mapping[str, Any], rewards_PGK: np.ndarray) -> np.ndarray:
        """Moving average (K,) of batch means; each objective starts at its first, and keeps its own while unseen."""
        mean_K = np.ma.filled(np.ma.masked_invalid(rewards_PGK).mean(axis=(0, 1)), np.nan)
        before_K = np.array([memory.get("vector", {}).get(name, np.nan) for name, share in memory["prior"] if share > 0])
        average_K = self.config.average * before_K + (1 - self.config.average) * mean_K
        return np.where(np.isnan(before_K), mean_K, np.where(np.isnan(mean_K), before_K, average_K))
