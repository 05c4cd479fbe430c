"""From the section `selftrain` to the weights of what a round trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from align.config.selftrain import AnyPromptWeights, AnyWeights, FeasibleWeights, SelftrainConfig
from align.selftrain.rows import Pair
from align.selftrain.tilt import fit_tilt
from align.selftrain.weights import (
    Weights,
    compose,
    distribution_shift,
    dual_step,
    entropy_weights,
    importance_weights,
    keep_nearest,
    loss_weights,
    shuffled,
    trajectory_weights,
)
from rewards.types import Objective


@dataclass(frozen=True)
class Material:
    """What weights of n samples may look at.

    Args:
        objectives: K of them.
        raw_MK: Values in raw units of all there is to learn from, M samples or more than the n; NaN where missing. A tilt
            is fitted to all of them.
        places_n: Which of the M the samples are.
        duals_n: Multipliers of `feasible`, before the step that it takes.
        entropies_n: Of the answers to the prompt of each sample, bits.
        measure: Losses of pairs of prompt and completion, mean nats per completion token; asked for only when needed.
        pairs: Tokens of the samples.
        trusted: Tokens of trusted samples, by file.
    """

    objectives: Sequence[Objective]
    raw_MK: np.ndarray
    places_n: np.ndarray
    duals_n: np.ndarray
    entropies_n: np.ndarray
    measure: Callable[[Sequence[Pair]], np.ndarray]
    pairs: Sequence[Pair]
    trusted: dict[str, Sequence[Pair]]

    @cached_property
    def losses_n(self) -> np.ndarray:
        """Of the samples."""
        return self.measure(self.pairs)

    def column_M(self, name: str) -> np.ndarray:
        """Raw values of an objective."""
        return self.raw_MK[:, [objective.name for objective in self.objectives].index(name)]


def weigh(section: SelftrainConfig, material: Material, number: int, seed: int) -> Weights:
    """Weights of what round or step `number` trains on: all entries multiplied, with mean one and a cap.

    Raises:
        ValueError: Of a tilt that cannot be had (TiltError), or of a missing value that an entry needs.
    """
    raws = [np.ones(len(material.places_n))]
    raws += [_raw(weights, material, number) for weights in section.weights if weights.type not in ("uniform", "shuffled")]
    return _composed(section, section.weights, raws, seed)


def weigh_prompts(section: SelftrainConfig, entropies_P: np.ndarray, seed: int) -> Weights:
    """Weights of the prompts of a batch, by the entropies of their answers; mean one, and capped as those of samples."""
    raws = [np.ones(len(entropies_P))]
    raws += [entropy_weights(entropies_P, weights.power) for weights in section.prompts if weights.type == "entropy"]
    return _composed(section, section.prompts, raws, seed)


def next_duals(weights: FeasibleWeights, material: Material) -> np.ndarray:
    """The multipliers after a step."""
    return dual_step(material.duals_n, material.losses_n, weights.threshold, weights.rate, weights.leak)


def _composed(
    section: SelftrainConfig, entries: Sequence[AnyWeights | AnyPromptWeights], raws: Sequence[np.ndarray], seed: int
) -> Weights:
    composed = compose(raws, section.cap, section.least_ess)
    if entries and entries[-1].type == "shuffled":
        return Weights(shuffled(composed.values_n, seed), composed.ess, composed.collapsed)
    return composed


def _raw(weights: AnyWeights, material: Material, number: int) -> np.ndarray:
    match weights.type:
        case "entropy":
            return entropy_weights(material.entropies_n, weights.power)
        case "importance":
            trusted_m = material.measure(material.trusted[weights.trusted])
            if weights.form == "rank":
                return keep_nearest(distribution_shift(material.losses_n, trusted_m), weights.share)
            return importance_weights(material.losses_n, trusted_m, weights.cap)
        case "loss":
            temperature = np.inf if number <= weights.warm_up else weights.temperature
            return loss_weights(material.losses_n, weights.shape, temperature)
        case "feasible":
            return next_duals(weights, material)
        case "trajectory":
            factors = weights.returns or dict.fromkeys((o.name for o in material.objectives), 1.0)
            scaled = {o.name: o.scale(material.column_M(o.name)[material.places_n]) for o in material.objectives}
            returns_n = sum(factor * _whole(scaled[name], name, "trajectory") for name, factor in factors.items())
            return trajectory_weights(returns_n, weights.temperature)
        case "tilt":
            features_MF = np.stack([_whole(material.column_M(name), name, "tilt") for name in weights.means], axis=1)
            return fit_tilt(features_MF, np.array(list(weights.means.values()))).weights_N[material.places_n]
    raise AssertionError(weights.type)


def _whole(values_n: np.ndarray, name: str, kind: str) -> np.ndarray:
    if np.isnan(values_n).any():
        raise ValueError(
            f"selftrain.weights: {kind} needs every value of {name!r}, and {int(np.isnan(values_n).sum())} of "
            f"{len(values_n)} are missing: let selftrain.filter ask for one (at_least the worst will do)"
        )
    return values_n
