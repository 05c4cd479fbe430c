"""Weights from the objectives' policy gradients: mirror ascent on their influence, and the min-norm mixture."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from align.config.weighting import GradientWeighting, MgdaWeighting
from align.weighting.adaptive import Adaptive
from align.weighting.base import Observation, Signal


class FromGradients(Adaptive):
    """Base of a scheme that looks at nothing but the inner products of the objectives' policy gradients."""

    def propose(
        self, weights_K: np.ndarray, prior_K: np.ndarray, memory: Mapping[str, Any], observation: Observation
    ) -> tuple[np.ndarray, Mapping[str, Any]]:
        """What `choose` says, once there are gradients."""
        if Signal.GRAM not in observation.signals:
            return np.full(len(weights_K), np.nan), {}
        return self.choose(weights_K, observation.signals[Signal.GRAM])

    @abstractmethod
    def choose(self, weights_K: np.ndarray, gram_KK: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        """As `propose`, from the weights in force (K,) and the Gram matrix (K, K)."""


@dataclass(frozen=True)
class Gradient(FromGradients):
    """Mirror ascent on influence (2509.11452; the rule is that of DoGE, 2310.15393).

    I_k = <g_k, sum_j g_j>,   w_k <- w_k exp(step_size I_k) / Z

    with g_k the policy gradient of objective k alone. Departures: I is divided by the mean squared length of the
    gradients, so that `step_size` (the paper's learning rate over mu, .1 or .01) means the same for every model and
    batch; cosines and leaving out j = k are options; the pull towards the user's shares is ours (without it small
    constant differences compound without end); gradients are not clipped one by one, which would erase their lengths.
    """

    config: GradientWeighting

    def choose(self, weights_K: np.ndarray, gram_KK: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        """One step of mirror ascent."""
        influence_K = influence(gram_KK, self.config.cosine, self.config.self_term)
        exponent_K = self.config.step_size * influence_K
        return weights_K * np.exp(exponent_K - exponent_K.max()), {"influence": influence_K}


@dataclass(frozen=True)
class Mgda(FromGradients):
    """Multiple-gradient descent: the convex mixture of the gradients with the smallest norm (Désidéri 2012, 1810.04650).

    w = argmin_{w in simplex} w^T gram w; a step along sum_k w_k g_k then worsens no objective, to first order. With
    `unit` the gradients are brought to length one first. The user's shares say only which objectives take part, and
    where `pull` goes. Departure: an objective without any gradient in a batch keeps its weight (the shortest mixture would
    be its 0, and nothing would be trained).
    """

    config: MgdaWeighting

    def choose(self, weights_K: np.ndarray, gram_KK: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        """The min-norm weights."""
        speaks = np.flatnonzero(gram_KK.diagonal() > 0)
        wanted_K = np.full(len(weights_K), np.nan)
        if speaks.size:
            chosen_KK = cosines(gram_KK) if self.config.unit else gram_KK
            wanted_K[speaks] = min_norm(chosen_KK[np.ix_(speaks, speaks)])
        return wanted_K, {"min_norm": wanted_K}


def influence(gram_KK: np.ndarray, cosine: bool, self_term: bool) -> np.ndarray:
    """I_k = sum_j gram_kj / (mean of the diagonal) (K,), or of cosines; without j = k when `self_term` is off.

    An objective without a gradient has influence 0.
    """
    mean_square = gram_KK.diagonal().mean()
    relative_KK = cosines(gram_KK) if cosine else gram_KK / mean_square if mean_square > 0 else np.zeros_like(gram_KK)
    return relative_KK.sum(axis=1) - (0.0 if self_term else relative_KK.diagonal())


def cosines(gram_KK: np.ndarray) -> np.ndarray:
    """Cosine of the angle between every two gradients (K, K); 0 where one of them is 0."""
    length_K = np.sqrt(gram_KK.diagonal())
    products_KK = np.outer(length_K, length_K)
    return np.divide(gram_KK, products_KK, out=np.zeros_like(gram_KK), where=products_KK > 0)


def min_norm(gram_KK: np.ndarray) -> np.ndarray:
    """argmin of w^T gram w over the simplex (K,), for a diagonal that is not all 0; of several the most even one.

    With gram = L L^T it is the non-negative least-squares problem min |L^T u|^2 + (1 - sum u)^2, whose solution is in
    proportion to w (the minimum over the scale of u keeps its direction).
    """
    values, vectors = np.linalg.eigh(gram_KK / gram_KK.diagonal().max())
    root = (vectors * np.sqrt(np.maximum(values, 0.0) + 1e-9)).T  # the small ridge picks the even one of equal minima
    solution, _ = nnls(np.vstack([root, np.ones(len(gram_KK))]), np.append(np.zeros(len(gram_KK)), 1.0))
    return solution / solution.sum()
