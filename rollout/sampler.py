"""The one seam to generation engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rollout.types import Prompt, SampleGroup


class RolloutError(RuntimeError):
    """Samples cannot be had, or not with the policy's weights; the message says why and what helps."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample.

    Args:
        samples_per_prompt: G.
        max_tokens: Longest completion, in tokens.
        seed: Same seed, same policy, same prompts: same samples.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps all.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        min_p: Keep tokens at least this times as likely as the likeliest.
        repetition_penalty: 1 is none.
        log_probs: Whether samples shall have the log-probabilities that they were drawn with.
        first: Place of the first prompt among those of all processes; `stride` apart are the others. Engines that draw every
            sample with a seed of its own then give the same samples whatever the number of processes.
        stride: See `first`.
    """

    samples_per_prompt: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    log_probs: bool = False
    first: int = 0
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Gap:
    """Absolute differences of log-probabilities between two engines, nats: 0 where they share their weights."""

    mean: float = 0.0
    max: float = 0.0


@dataclass(frozen=True)
class Check:
    """How an engine shows that it computes what the learner does.

    Args:
        sequences: S fixed sequences of T token ids each.
        expected: The learner's log-probabilities (S, T - 1), nats, of all tokens but the first, at temperature 1.
        band: The largest gap that counts as rounding.
    """

    sequences: Sequence[Sequence[int]]
    expected: np.ndarray
    band: Gap

    def passes(self, gap: Gap) -> bool:
        """Whether a gap lies within the band; NaN does not."""
        return gap.mean <= self.band.mean and gap.max <= self.band.max


NO_CHECK = Check((), np.zeros((0, 0)), Gap())  # of an engine that has the learner's own weights


class Sampler(Protocol):
    """Makes samples with the newest policy it was given."""

    shares_weights: bool  # with the learner: then there is nothing to push, and nothing to check

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[SampleGroup]:
        """One group of `params.samples_per_prompt` samples per prompt, in the order of the prompts."""
        ...

    def sync(self, weights: Iterable[tuple[str, Any]], version: int, check: Check = NO_CHECK) -> Gap:
        """Take over new policy weights, and say how far they then lie from the learner's. Samples only from what passes.

        Engines that share the learner's memory only note the version.
        """
        ...

    def differing(self) -> Sequence[str]:
        """Names of the weights that the engine does not compute with as they were synced; asked after a failed check."""
        ...

    def close(self) -> None:
        """Release processes, ports and memory."""
        ...
