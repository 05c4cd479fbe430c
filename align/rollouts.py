"""Between the learner and its sampler: verified weights go out, samples come back, the next batch may be drawn ahead."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from align.config import Config
from align.config.rollout import VerifyConfig
from align.plan import Plan
from align.sampling import Place, training_params
from align.together import from_main, together
from rollout.prompts import prompt_order
from rollout.sampler import Check, Gap, RolloutError, Sampler, SamplingParams
from rollout.types import Prompt, SampleGroup


class Policy(Protocol):
    """What is asked of the learner; by all processes together, for its weights may be shared among them."""

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


@dataclass(frozen=True)
class _Ahead:
    """A batch that is being drawn."""

    indices: Sequence[int]
    groups: Future[list[SampleGroup]]


class Rollouts:
    """Samples for the learner, from one process's point of view; all processes call everything together.

    Args:
        config: Says how to sample.
        plan: Batch arithmetic.
        prompts: To train on.
        sampler: Makes the samples.
        policy: The learner.
        vocabulary: Token ids that random sequences may have.
    """

    def __init__(
        self, config: Config, plan: Plan, prompts: Sequence[Prompt], sampler: Sampler, policy: Policy, vocabulary: int
    ):
        self.sampler = sampler
        self._metrics: dict[str, float] = {}
        self._config = config
        self._plan = plan
        self._prompts = prompts
        self._policy = policy
        self._place = Place(PartialState().process_index, plan.processes)
        self._synced = -1  # step whose policy the sampler holds
        self._order = prompt_order(len(prompts), plan.prompts, config.seed).tolist()
        self._ahead: _Ahead | None = None
        self._thread = ThreadPoolExecutor(1)
        if not sampler.shares_weights:
            together(policy.describe_weights)  # what cannot be sent is said before anything is put together
            engine = config.rollout.engine
            longest = max(len(prompt.token_ids) for prompt in prompts) + config.rollout.max_tokens
            self._canaries = canaries(prompts, engine.verify, longest, vocabulary, config.seed)
            types = {config.policy.dtype, engine.dtype or config.policy.dtype}
            self._band = band_of(engine.verify, types == {"float32"} and policy.accelerator.mixed_precision == "no")

    def batch(self, indices: Sequence[int], step: int, version: int) -> list[SampleGroup]:
        """Samples of this process's prompts of a batch, and with lookahead the start of those of the next one.

        Args:
            indices: Of the prompts, one per group.
            step: Optimiser steps taken; the first of the batch.
            version: Steps that the policy had taken which is to draw them: `step`, or fewer for an earlier policy.

        Raises:
            RolloutError: In every process, when any of them cannot have its samples.
        """
        if self._ahead is not None:
            start = time.perf_counter()
            ahead, self._ahead = self._ahead, None
            groups = together(ahead.groups.result)
            assert list(indices) == list(ahead.indices), "TRL asks for other prompts than were drawn ahead"
        else:
            self.sync(version)
            start = time.perf_counter()
            groups = together(lambda: self._draw(indices, step))
        self._metrics["time/sampling"] = time.perf_counter() - start
        if self._config.rollout.lookahead:
            self._look_ahead(step)
        age = max(step - sample.policy_version for group in groups for sample in group.samples)
        limit = self._config.rollout.lookahead * self._plan.steps_per_batch + step - version
        assert age <= limit, f"a sample is {age} steps old, more than the {limit} that are allowed"
        self._metrics["policy_age"] = age
        return groups

    def draw(self, indices: Sequence[int], params: SamplingParams) -> list[SampleGroup]:
        """Samples of the first policy, apart from any batch. Raises RolloutError in every process when any has none."""
        self.sync(0)
        return together(lambda: self.sampler.sample([self._prompts[i] for i in indices], params))

    def take_metrics(self) -> dict[str, float]:
        """Figures since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def sync(self, step: int) -> None:
        """Bring the sampler the policy of a step, and verify that it arrived.

        Raises:
            RolloutError: In every process; it says which weights differ.
        """
        if step == self._synced:
            return
        if self._ahead is not None:
            together(self._ahead.groups.result)  # samples of one batch come from one policy
        start = time.perf_counter()
        if self.sampler.shares_weights:
            self.sampler.sync((), step)
        else:
            self._push(step)
            self._metrics["time/sync"] = time.perf_counter() - start
        self._synced = step

    def close(self) -> None:
        """Give up what is being drawn, and release the sampler."""
        self.sampler.close()
        self._thread.shutdown()

    def _push(self, step: int) -> None:
        """Push and compare, and once more when they differ."""
        check = Check(self._canaries, self._policy.score(self._canaries), self._band)
        for _ in range(2):
            gap = together(lambda: self.sampler.sync(self._policy.named_weights(), step, check))
            gap = gather_object([gap])[0]  # the main process's: the others send nothing
            self._metrics |= {"sync/gap_mean": gap.mean, "sync/gap_max": gap.max}
            if check.passes(gap):
                return
        names = from_main(self.sampler.differing)
        raise RolloutError(
            f"step {step}: after two pushes the samplers' log-probabilities of fixed sequences differ from the learner's by "
            f"{gap.mean:.2g} nats on average, {gap.max:.2g} at most (allowed: {check.band.mean:g} and {check.band.max:g}); "
            + (f"they do not compute with these weights: {_abridged(names)}. " if names else "")
            + "If the two only round differently, give both one type (rollout.engine.dtype), or raise "
            "rollout.engine.verify.mean_gap and max_gap"
        )

    def _look_ahead(self, step: int) -> None:
        """Start the batch after this one, by the policy of this one."""
        following = step + self._plan.steps_per_batch
        number = following // self._plan.steps_per_batch
        if number >= self._plan.batches:
            return
        self.sync(step)
        indices = self._indices(number)
        self._ahead = _Ahead(indices, self._thread.submit(self._draw, indices, following))

    def _draw(self, indices: Sequence[int], step: int) -> list[SampleGroup]:
        params = training_params(self._config, step, self._place)
        return self.sampler.sample([self._prompts[i] for i in indices], params)

    def _indices(self, batch: int) -> list[int]:
        """This process's prompts of a batch, as TRL will ask for them: its share is one block."""
        size = self._config.rollout.prompts_per_batch
        share = size // self._plan.processes
        first = batch * size + self._place.process * share
        return self._order[first : first + share]


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
