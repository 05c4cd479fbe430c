"""Hypervolume-guided step scale: the weights stay the user's, the steps grow with the front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.archive import reference_vector
from align.config.weighting import HypervolumeWeighting
from align.pareto import hypervolume
from align.weighting.base import Observation, Scheme, WeightState, finite_vectors, shares
from rewards.types import Objective


@dataclass(frozen=True)
class Hypervolume(Scheme):
    """Meta-reward of dynamic reward weighting (2509.11452).

    m = 0.5 + 1.5 tanh(max(dHV, 0) / scale) in [0.5, 2), with dHV the growth of the dominated volume that the newest
    held-out vectors brought; m is 1 before the first growth can be measured, and holds until the next evaluation.

    Departures: axes are scaled to [0, 1] by the declared bounds (the paper adds raw token counts to accuracies, which
    makes m a switch); `scale` divides dHV (the paper's is 1; `adaptive` is the mean of the growths above 0 so far, the
    newest included, 1 before there is one); m multiplies the advantages after normalisation (the paper's place, the
    rewards before it, is an option, but a standard deviation takes the factor out again); a vector that is not above
    the reference point in every objective adds nothing; `mean_one` divides m by its running mean over evaluations; the
    buffer is the run's own archive, so that a resumed run sees the same one. Objectives without a share are no axes.
    """

    config: HypervolumeWeighting

    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """The user's shares, and nothing seen."""
        weights_K = shares(self.config.weights, objectives)
        reference = self.config.reference
        shared = [objective for objective, share in zip(objectives, weights_K, strict=True) if share > 0]
        fixed = [] if reference == "initial" else reference_vector(reference, shared).tolist()
        memory = {
            "shares": list(weights_K),
            "reference_vector": fixed,
            "seen": 0,
            "volume": 0.0,
            "growth": 0.0,
            "growths": 0,
            "growth_mean": 0.0,
            "scale_mean": 0.0,
        }
        return WeightState(weights_K, step_scale=1.0, memory=memory)

    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The scale that the newest held-out vectors give; the same one while there is no new vector."""
        points_MK = finite_vectors(observation, np.flatnonzero(state.memory["shares"]))
        if len(points_MK) <= state.memory["seen"]:
            return state
        memory = dict(state.memory)
        memory["reference_vector"] = memory["reference_vector"] or points_MK[0].tolist()
        reference_K = np.array(memory["reference_vector"])
        volume = hypervolume(points_MK, reference_K)
        first = memory["seen"] == 0
        memory |= {"seen": len(points_MK), "growth": 0.0 if first else max(volume - memory["volume"], 0.0), "volume": volume}
        if first:
            return replace(state, memory=memory)
        memory, factor = self._factor(memory)
        return self._placed(replace(state, memory=memory, remarks=_remarks(state, volume, points_MK)), factor)

    def _factor(self, memory: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        """The memory with its running means moved on, and the factor m."""
        memory, growth = dict(memory), memory["growth"]
        if growth > 0:
            memory["growths"] += 1
            memory["growth_mean"] += (growth - memory["growth_mean"]) / memory["growths"]
        scale = (memory["growth_mean"] or 1.0) if self.config.scale == "adaptive" else self.config.scale
        factor = 0.5 + 1.5 * math.tanh(growth / scale)
        evaluations = memory["evaluations"] = memory.get("evaluations", 0) + 1
        memory["scale_mean"] += (factor - memory["scale_mean"]) / evaluations
        return memory, factor / memory["scale_mean"] if self.config.mean_one else factor

    def _placed(self, state: WeightState, factor: float) -> WeightState:
        if self.config.placement == "advantages":
            return replace(state, step_scale=factor)
        return replace(state, weights_K=tuple(factor * share for share in state.memory["shares"]))


def _remarks(state: WeightState, volume: float, points_MK: np.ndarray) -> tuple[str, ...]:
    """Says when there is nothing to measure: no policy is above the reference point in every objective."""
    if volume > 0 or len(points_MK) < 4:
        return state.remarks
    remark = (
        "after three evaluations no policy is above the reference point in every objective, so the hypervolume is 0 and "
        "does not grow: set weighting.reference to a table of worse values, or to {} for the worst bounds"
    )
    return state.remarks if remark in state.remarks else (*state.remarks, remark)
