"""From the section `selftrain` to the weights of what a round trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from align.config import Config
from align.config.selftrain import AnyWeights, SelftrainConfig
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
from rollout.prompts import Rendering, Tokenizer, render_prompts, rows_of_file


@dataclass(frozen=True)
class Material:
    """What weights of n samples may look at.

    Args:
        objectives: K of them.
        raw_nK: Values in raw units; NaN where missing.
        entropies_n: Of the answers to the prompt of each sample, bits.
        measure: Losses of pairs of prompt and completion, mean nats per completion token; asked for only when needed.
        pairs: Tokens of the samples.
        trusted: Tokens of trusted samples, by file.
    """

    objectives: Sequence[Objective]
    raw_nK: np.ndarray
    entropies_n: np.ndarray
    measure: Callable[[Sequence[Pair]], np.ndarray]
    pairs: Sequence[Pair]
    trusted: dict[str, Sequence[Pair]]

    @cached_property
    def losses_n(self) -> np.ndarray:
        """Of the samples."""
        return self.measure(self.pairs)

    def column_n(self, name: str) -> np.ndarray:
        """Raw values of an objective."""
        return self.raw_nK[:, [objective.name for objective in self.objectives].index(name)]


def weigh(section: SelftrainConfig, material: Material, number: int, seed: int) -> Weights:
    """Weights of what round `number` trains on: all entries multiplied, with mean one and a cap.

    Raises:
        ValueError: Of a tilt that cannot be had (TiltError), or of a missing value that an entry needs.
    """
    raws = [np.ones(len(material.raw_nK))]
    raws += [_raw(weights, material, number) for weights in section.weights if weights.type not in ("uniform", "shuffled")]
    composed = compose(raws, section.cap, section.least_ess)
    if section.weights and section.weights[-1].type == "shuffled":
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
            start_n = np.ones(len(material.raw_nK))
            return dual_step(start_n, material.losses_n, weights.threshold, weights.rate, weights.leak)
        case "trajectory":
            factors = weights.returns or dict.fromkeys((o.name for o in material.objectives), 1.0)
            scaled = {o.name: o.scale(material.raw_nK[:, k]) for k, o in enumerate(material.objectives)}
            returns_n = sum(factor * _whole(scaled[name], name, "trajectory") for name, factor in factors.items())
            return trajectory_weights(returns_n, weights.temperature)
        case "tilt":
            features_nF = np.stack([_whole(material.column_n(name), name, "tilt") for name in weights.means], axis=1)
            return fit_tilt(features_nF, np.array(list(weights.means.values()))).weights_N
    raise AssertionError(weights.type)


def _whole(values_n: np.ndarray, name: str, kind: str) -> np.ndarray:
    if np.isnan(values_n).any():
        raise ValueError(
            f"selftrain.weights: {kind} needs every value of {name!r}, and {int(np.isnan(values_n).sum())} of "
            f"{len(values_n)} are missing: let selftrain.filter ask for one (at_least the worst will do)"
        )
    return values_n


def load_trusted(config: Config, tokenizer: Tokenizer, end: int, context: int) -> dict[str, list[Pair]]:
    """Tokens of every trusted sample that weights name, completions with their end token, by file.

    Raises:
        ValueError: A file is missing or empty, a row has no prompt or completion, or a sample is longer than the context.
    """
    files = dict.fromkeys(weights.trusted for weights in config.selftrain.weights if weights.type == "importance")
    return {path: _trusted(path, config, tokenizer, end, context) for path in files}


def _trusted(path: str, config: Config, tokenizer: Tokenizer, end: int, context: int) -> list[Pair]:
    prompts = config.prompts
    rendering = Rendering("prompt", prompts.chat, prompts.system, prompts.chat_template_kwargs)
    try:
        rendered = render_prompts(rows_of_file(path), rendering, tokenizer)
        texts = [prompt.columns.get("completion") for prompt in rendered]
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text:
                raise ValueError(f"row {number} has no text in its field 'completion'")
        completions = [[*ids, end] for ids in tokenizer(text=texts, add_special_tokens=False)["input_ids"]]
        lengths = [len(prompt.token_ids) + len(ids) for prompt, ids in zip(rendered, completions, strict=True)]
        if max(lengths) > context:
            number = int(np.argmax(lengths))
            raise ValueError(
                f"row {number + 1} has {lengths[number]} tokens, and the context of the policy {context}: leave it out"
            )
    except ValueError as error:
        raise ValueError(f"selftrain.weights: trusted samples of {path!r}: {error}") from error
    return [(prompt.token_ids, completion) for prompt, completion in zip(rendered, completions, strict=True)]
