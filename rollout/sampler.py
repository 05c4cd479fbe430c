"""The one seam to generation engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.types import Prompt, SampleGroup


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
    """

    samples_per_prompt: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Sampler(Protocol):
    """Makes samples with the newest policy it was given."""

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[SampleGroup]:
        """One group of `params.samples_per_prompt` samples per prompt, in the order of the prompts."""
        ...

    def sync(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Take over new policy weights. Engines that share the learner's memory only note the version."""
        ...

    def close(self) -> None:
        """Release processes, ports and memory."""
        ...
