"""Fixed weights: what the user asked for, at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

from align.config.weighting import FixedWeighting
from align.weighting.base import Observation, Scheme, WeightState, shares
from rewards.types import Objective


@dataclass(frozen=True)
class Fixed(Scheme):
    """Linear scalarisation with constant weights w on the simplex."""

    config: FixedWeighting

    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """The configured weights, divided by their sum."""
        return WeightState(shares(self.config.weights, objectives), step_scale=1.0, memory={})

    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The same state."""
        return state
