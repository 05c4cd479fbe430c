"""Weights on their way to a sampler, and the proof that they arrived."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from align.config import Config
from align.config.rollout import VerifyConfig
from align.together import from_main, together
from rollout.sampler import Check, Gap, RolloutError, Sampler
from rollout.types import Prompt


class Policy(Protocol):
    """What is asked of a policy; by all processes together, for its weights may be shared among them."""

    accelerator: Accelerator

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, under the names of a checkpoint."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probabilities (S, T - 1) of the tokens of S sequences, but for the first of each, at temperature 1."""
        ...

    def describe_weights(self) -> Sequence[Any]:
        """What `named_weights` will give, without its values. Raises ValueError when they cannot be sent."""
        ...


class Pusher:
    """Brings a sampler the weights of a policy; all processes call everything together.

    Args:
        config: Says how to verify.
        prompts: To take the beginnings of fixed sequences from.
        vocabulary: Token ids that random sequences may have.
        policy: Whose weights.
        sampler: Takes them; one that shares the policy's memory has nothing to take.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt], vocabulary: int, policy: Policy, sampler: Sampler):
        self._policy = policy
        self._sampler = sampler
        if not sampler.shares_weights:
            together(policy.describe_weights)  # what cannot be sent is said before anything is put together
            engine = config.rollout.engine
            longest = max(len(prompt.token_ids) for prompt in prompts) + config.rollout.max_tokens
            self._canaries = canaries(prompts, engine.verify, longest, vocabulary, config.seed)
            types = {config.policy.dtype, engine.dtype or config.policy.dtype}
            self._band = band_of(engine.verify, types == {"float32"} and policy.accelerator.mixed_precision == "no")

    def push(self, step: int) -> Gap:
        """Push the policy of a step and compare, and once more when they differ; how far they lie apart.

        Raises:
            RolloutError: In every process; it says which weights differ.
        """
        if self._sampler.shares_weights:
            return self._sampler.sync((), step)
        check = Check(self._canaries, self._policy.score(self._canaries), self._band)
        for _ in range(2):
            gap = together(lambda: self._sampler.sync(self._policy.named_weights(), step, check))
            gap = gather_object([gap])[0]  # the main process's: the others send nothing
            if check.passes(gap):
                return gap
        names = from_main(self._sampler.differing)
        raise RolloutError(
            f"step {step}: after two pushes the samplers' log-probabilities of fixed sequences differ from the learner's by "
            f"{gap.mean:.2g} nats on average, {gap.max:.2g} at most (allowed: {check.band.mean:g} and {check.band.max:g}); "
            + (f"they do not compute with these weights: {_abridged(names)}. " if names else "")
            + "If the two only round differently, give both one type (rollout.engine.dtype), or raise "
            "rollout.engine.verify.mean_gap and max_gap"
        )


def band_of(verify: VerifyConfig, exact: bool) -> Gap:
    """The largest gaps that count as rounding, in float32 (`exact`) or in half precision."""
    mean, largest = (1e-3, 1e-2) if exact else (0.05, 0.5)
    return Gap(verify.mean_gap or mean, verify.max_gap or largest)


def canaries(prompts: Sequence[Prompt], verify: VerifyConfig, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Fixed sequences of one length: the beginnings of prompts, and random tokens, so that many weights take part.

    Args:
        prompts: To take beginnings of.
        verify: How many sequences, and how long.
        longest: Tokens that surely fit into the samplers' context.
        vocabulary: Tokens that there are.
        seed: Of the random ones.
    """
    length = max(2, min(verify.tokens, longest - 1))  # scoring makes one more token
    random = np.random.default_rng(seed)
    chosen = [prompts[i % len(prompts)].token_ids[: length // 2] for i in range(verify.sequences)]
    return [[*start, *random.integers(vocabulary, size=length - len(start)).tolist()] for start in chosen]


def _abridged(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
