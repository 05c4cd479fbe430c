"""From the section `selftrain` to the weights of what a round trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from align.config.selftrain import AnyPromptWeights, AnyWeights, FeasibleWeights, SelftrainConfig, TiltWeights
from align.selftrain.rows import Pair
from align.selftrain.tilt import fit_tilt
from align.selftrain.weights import (
    Weights,
    WeightsError,
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

FURTHEST = 0.05  # share of an objective's range by which a tilt may miss without a word


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

    def mean(self, name: str, weights_n: np.ndarray) -> float:
        """Weighted mean of an objective over the samples, in raw units; of plain ones where all weights are 0."""
        values_n = self.column_M(name)[self.places_n]
        return float(np.average(values_n, weights=weights_n if weights_n.any() else None))


@dataclass(frozen=True)
class Weighed:
    """Weights of n samples, and what they make of the means that a tilt wants.

    Args:
        weights: Of the samples.
        reached: Mean of each objective that a tilt names over the samples, with the weights as they are.
        missed: What is to be said, by objective, where other entries, the cap or a collapse take the tilt's effect.
    """

    weights: Weights
    reached: dict[str, float]
    missed: dict[str, str]


def weigh(section: SelftrainConfig, material: Material, number: int, seed: int) -> Weighed:
    """Weights of what round or step `number` trains on: all entries multiplied, with mean one and a cap.

    Raises:
        WeightsError: A tilt cannot be had (TiltError), a value is missing that an entry needs, or an entropy weight
            leaves double precision.
    """
    entries = [weights for weights in section.weights if weights.type not in ("uniform", "shuffled")]
    raws = [_raw(weights, material, number) for weights in entries]
    weights = _composed(section, section.weights, [np.ones(len(material.places_n)), *raws], seed)
    reached: dict[str, float] = {}
    missed: dict[str, str] = {}
    for entry, raw_n in zip(entries, raws, strict=True):
        if entry.type == "tilt":
            reached |= {name: material.mean(name, weights.values_n) for name in entry.means}
            if section.weights[-1].type != "shuffled":  # which is there to take the effect of all others
                missed |= _missed(entry, material, raw_n, reached)
    return Weighed(weights, reached, missed)


def _missed(entry: TiltWeights, material: Material, raw_n: np.ndarray, reached: dict[str, float]) -> dict[str, str]:
    """Objectives whose mean is further from that under the tilt alone than a share of their range: a draw from a larger
    pool misses by chance, which is not counted."""
    ranges = {objective.name: objective.bounds[1] - objective.bounds[0] for objective in material.objectives}
    return {
        name: f"tilt: the mean of {name!r} is {reached[name]:.3g}, where {wanted:g} is wanted: other weights, "
        "selftrain.cap or a collapse take its effect"
        for name, wanted in entry.means.items()
        if abs(reached[name] - material.mean(name, raw_n)) > FURTHEST * ranges[name]
    }


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
        raise WeightsError(
            f"selftrain.weights: {kind} needs every value of {name!r}, and {int(np.isnan(values_n).sum())} of "
            f"{len(values_n)} are missing: let selftrain.filter ask for one (at_least the worst will do)"
        )
    return values_n
