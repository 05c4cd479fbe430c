"""What every weighting scheme is: `init(objectives) -> state` and `update(state, observation) -> state`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from rewards.types import Objective


class Signal(StrEnum):
    """What a scheme may ask for besides the rewards of the batch; the loop pays only for what is asked."""

    VALIDATION = "validation"  # (K,) newest held-out vector, scaled to [0, 1], larger is better


@dataclass(frozen=True)
class Observation:
    """What a scheme may look at.

    Args:
        step: Optimiser steps taken so far.
        rewards_PGK: Rewards of the batch, scaled to [0, 1], larger is better; NaN where missing or left out.
        signals: Exactly what the scheme `needs`.
    """

    step: int
    rewards_PGK: np.ndarray
    signals: Mapping[Signal, np.ndarray]


@dataclass(frozen=True)
class WeightState:
    """What a scheme has decided, and what it must remember.

    Args:
        weights_K: Weight of each objective.
        step_scale: Factor on the advantages after normalisation (a common factor on rewards would cancel in it).
        memory: The scheme's own numbers, by name; JSON types only, so that saving and replaying are free. Numbers,
            and lists of K numbers, are logged.
    """

    weights_K: tuple[float, ...]
    step_scale: float
    memory: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; floats survive the round trip bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WeightState":
        """The state that `to_json` wrote."""
        return cls(tuple(data["weights_K"]), data["step_scale"], data["memory"])

    def digest(self) -> int:
        """63-bit hash; equal on every process that reached the same state."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class Scheme(Protocol):
    """A weighting scheme: pure functions of its configuration."""

    needs: frozenset[Signal]

    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """The state before the first step."""
        ...

    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The state that acts on the observed batch."""
        ...


def shares(weights: Mapping[str, float], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Weights by name -> a point of the simplex, in the order of the objectives: w_k / sum_l w_l."""
    total = sum(weights.values())
    return tuple(weights[objective.name] / total for objective in objectives)
