"""Between the learner and its sampler: verified weights go out, samples come back, the next batch may be drawn ahead."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from accelerate import PartialState

from align.build import PromptSets
from align.config import Config
from align.plan import Plan
from align.push import Policy, Pusher
from align.sampling import Place, training_params
from align.together import together
from rollout.sampler import Sampler, SamplingParams
from rollout.types import SampleGroup


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
        prompts: Those to train on are sampled.
        sampler: Makes the samples.
        policy: The learner.
        vocabulary: Token ids that random sequences may have.
    """

    def __init__(self, config: Config, plan: Plan, prompts: PromptSets, sampler: Sampler, policy: Policy, vocabulary: int):
        self.sampler = sampler
        self._metrics: dict[str, float] = {}
        self._config = config
        self._plan = plan
        self._prompts = prompts.train
        self._place = Place(PartialState().process_index, plan.processes)
        self._synced = -1  # step whose policy the sampler holds
        self._order = prompts.order(plan.prompts, config.seed).tolist()
        self._ahead: _Ahead | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pusher = Pusher(config, prompts.train, vocabulary, policy, sampler)

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
        gap = self._pusher.push(step)
        if not self.sampler.shares_weights:
            seconds = time.perf_counter() - start
            self._metrics |= {"time/sync": seconds, "sync/gap_mean": gap.mean, "sync/gap_max": gap.max}
        self._synced = step

    def close(self) -> None:
        """Give up what is being drawn, and release the sampler."""
        self.sampler.close()
        self._thread.shutdown()

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
