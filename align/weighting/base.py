"""What every weighting scheme is: `init(objectives) -> state` and `update(state, observation) -> state`."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.config.base import Signal, Weighting
from rewards.types import Objective


@dataclass(frozen=True)
class Observation:
    """What a scheme may look at.

    Args:
        step: Optimiser steps taken so far.
        rewards_PGK: Rewards of the batch, scaled to [0, 1], larger is better; NaN where missing or left out.
        signals: What the scheme `needs`, as far as it can be had yet: a signal is absent until there is one.
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
            and tables of numbers by objective, are logged.
        kl_weight: Weight of minus the log-ratio to the reference policy, beside those of the objectives.
        remarks: Sentences for the user; each is shown once.
        control: What `estimator: dpg` remembers (`align.control.ControlState`, as JSON); empty under the others.
        domains: What the weights of prompt domains remember (`align.domains`, tables by domain); empty without domains.
    """

    weights_K: tuple[float, ...]
    step_scale: float
    memory: Mapping[str, Any]
    kl_weight: float = 0.0
    remarks: tuple[str, ...] = ()
    control: Mapping[str, Any] = field(default_factory=dict)
    domains: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; floats survive the round trip bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WeightState":
        """The state that `to_json` wrote."""
        return cls(**data | {"weights_K": tuple(data["weights_K"]), "remarks": tuple(data["remarks"])})

    def digest(self) -> int:
        """63-bit hash; equal on every process that reached the same state."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class Scheme(ABC):
    """A weighting scheme: pure functions of its configuration. Subclasses are frozen dataclasses with a `config`."""

    config: Weighting

    @property
    def needs(self) -> frozenset[Signal]:
        """What it looks at besides the rewards of the batch."""
        return self.config.needs

    def due(self, state: WeightState, step: int) -> bool:
        """Whether the batch at `step` may move the weights of a state; signals that cost something wait for it."""
        return True

    @abstractmethod
    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """The state before the first step."""

    @abstractmethod
    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The state that acts on the observed batch."""


def shares(weights: Mapping[str, float], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Weights by name -> a point of the simplex, in the order of the objectives: w_k / sum_l w_l; equal without any."""
    weights = weights or {objective.name: 1.0 for objective in objectives}
    total = sum(weights.values())
    return tuple(weights[objective.name] / total for objective in objectives)


def finite_vectors(observation: Observation, columns: Sequence[int]) -> np.ndarray:
    """Held-out vectors (M, columns) with a value for all of some objectives; M is 0 before the first."""
    if Signal.VALIDATION not in observation.signals:
        return np.empty((0, len(columns)))
    points_MK = observation.signals[Signal.VALIDATION][:, columns]
    return points_MK[np.isfinite(points_MK).all(axis=1)]
