"""Scheduled weights: straight lines between milestones."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from align.config.weighting import ScheduleWeighting
from align.weighting.base import Observation, Scheme, WeightState, shares
from rewards.types import Objective


@dataclass(frozen=True)
class Scheduled(Scheme):
    """Piecewise linear weights on the simplex.

    Between milestones (s_i, w_i) and (s_j, w_j), step s gets w = w_i + (w_j - w_i) (s - s_i) / (s_j - s_i), with each w
    divided by its sum first; before s = 0 and after the last milestone the weights are constant.
    """

    config: ScheduleWeighting

    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """Every milestone as a point of the simplex, and the weights of step 0."""
        steps = [0, *(milestone.step for milestone in self.config.milestones)]
        points = [self.config.weights, *(milestone.weights for milestone in self.config.milestones)]
        milestones = [[step, list(shares(point, objectives))] for step, point in zip(steps, points, strict=True)]
        return WeightState(tuple(milestones[0][1]), step_scale=1.0, memory={"milestones": milestones})

    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The weights of the observed step."""
        steps, points = zip(*state.memory["milestones"], strict=True)
        after = bisect_right(steps, observation.step)
        if after == len(steps):
            weights = points[-1]
        else:
            share = (observation.step - steps[after - 1]) / (steps[after] - steps[after - 1])
            weights = [a + (b - a) * share for a, b in zip(points[after - 1], points[after], strict=True)]
        return WeightState(tuple(weights), state.step_scale, state.memory)
