"""What the schemes share that move weights on the simplex: prior, pull, smoothing, floor, ceiling, interval, warm-up."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.config.weighting import Adaptive as Options
from align.weighting.base import Observation, Scheme, Signal, WeightState, shares
from rewards.types import Objective


@dataclass(frozen=True)
class Adaptive(Scheme):
    """Base of a scheme: `propose` says where the weights should go, this class when and how they get there.

    Objectives whose share in `config.weights` is 0 are only watched: their weight stays 0 and `propose` never sees them.
    Without a proposal (NaN) an objective keeps its weight, up to the pull and the bounds. Every batch is shown to
    `propose`, also while no move is due, so that moving averages miss none.
    """

    config: Options

    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """The user's shares, within floor and ceiling."""
        prior_K = np.array(shares(self.config.weights, objectives))
        pairs = [[objective.name, share] for objective, share in zip(objectives, prior_K.tolist(), strict=True)]
        shared = np.flatnonzero(prior_K > 0)
        weights_K = np.zeros(len(prior_K))
        weights_K[shared] = bounded(prior_K[shared], self.config.floor, self.config.ceiling)
        memory = {"prior": pairs, "moved": [], **self.remember([objectives[k] for k in shared])}
        return WeightState(tuple(weights_K.tolist()), step_scale=1.0, memory=memory)

    def due(self, state: WeightState, step: int) -> bool:
        """Whether the weights move at `step`: after the warm-up, and `every` steps after the last move."""
        moved = state.memory["moved"]
        return step >= self.config.warm_up and (not moved or step - moved[0] >= self.config.every)

    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The weights after one move, where one is due; what is remembered, in any case."""
        prior_K = np.array([share for _, share in state.memory["prior"]])
        names = [name for name, share in state.memory["prior"] if share > 0]
        shared = np.flatnonzero(prior_K > 0)
        weights_K = np.array(state.weights_K)
        proposal, memory = self.propose(weights_K[shared], prior_K[shared], state.memory, _only(observation, shared))
        tables = {key: named(names, value) if isinstance(value, np.ndarray) else value for key, value in memory.items()}
        if self.due(state, observation.step):
            weights_K[shared] = settle(weights_K[shared], proposal, prior_K[shared], self.config)
            tables["moved"] = [observation.step]
        return replace(state, weights_K=tuple(weights_K.tolist()), memory={**state.memory, **tables})

    def remember(self, objectives: Sequence[Objective]) -> Mapping[str, Any]:
        """What else the first state remembers; `objectives` are those with a share."""
        return {}

    @abstractmethod
    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """Where the weights should go, and what to remember and log.

        Args:
            weights_K: In force so far, on the simplex; K counts the objectives with a share.
            prior_K: The user's shares.
            memory: As remembered.
            observation: Of the objectives with a share.

        Returns:
            Numbers (K,), 0 or more, in proportion to the wanted weights (NaN keeps one as it is); and entries of the
            memory to write: arrays (K,) become tables by objective.
        """


def _only(observation: Observation, shared: np.ndarray) -> Observation:
    """The observation without the objectives that are only watched."""
    columns = {Signal.VALIDATION: lambda x: x[:, shared], Signal.GRAM: lambda x: x[np.ix_(shared, shared)]}
    signals = {key: columns[key](value) if key in columns else value for key, value in observation.signals.items()}
    return Observation(observation.step, observation.rewards_PGK[:, :, shared], signals)


def named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Table by objective; numbers that are not finite have no place in JSON and are left out."""
    return {name: float(value) for name, value in zip(names, values, strict=True) if np.isfinite(value)}


def settle(weights_K: np.ndarray, proposal_K: np.ndarray, prior_K: np.ndarray, options: Options) -> np.ndarray:
    """One move of the weights towards a proposal: w' = P(s w + (1 - s) ((1 - p) q + p prior)).

    q is the proposal on the simplex (where it is NaN or sums to 0, the weights as they are), p the pull, s the smoothing,
    P the projection onto floor and ceiling.
    """
    seen = np.isfinite(proposal_K)
    total = proposal_K[seen].sum()
    wanted_K = weights_K
    if total > 0:
        wanted_K = np.where(seen, proposal_K / total * (1 - weights_K[~seen].sum()), weights_K)
    wanted_K = (1 - options.pull) * wanted_K + options.pull * prior_K
    return bounded(options.smoothing * weights_K + (1 - options.smoothing) * wanted_K, options.floor, options.ceiling)


def bounded(weights_K: np.ndarray, floor: float, ceiling: float) -> np.ndarray:
    """The point of the simplex with floor <= w_k <= ceiling that is nearest to the weights (Euclidean).

    It is clip(w - t) for the one t at which it sums to 1, found by bisection; weights that are fine stay as they are.
    """
    if weights_K.min() >= floor and weights_K.max() <= ceiling:
        return weights_K / weights_K.sum()
    low, high = weights_K.min() - ceiling, weights_K.max() - floor
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(weights_K - middle, floor, ceiling).sum() > 1 else (low, middle)
    return np.clip(weights_K - high, floor, ceiling)
