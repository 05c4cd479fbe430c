"""Held-out evaluation: samples of a policy, and their values on every objective."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from align.runlog import sample_rows
from align.together import together
from rewards.types import RewardMatrix
from rollout.sampler import Sampler, SamplingParams
from rollout.types import Prompt, SampleGroup

Score = Callable[[Sequence[SampleGroup]], tuple[RewardMatrix, RewardMatrix]]


@dataclass(frozen=True)
class Evaluation:
    """Held-out samples and their rewards, all processes together.

    Args:
        raw_PGK: Values in raw units; NaN where missing.
        rows: One row per sample, as `align.runlog.sample_rows` makes them.
        domains: Of each of the P prompts; "" where they have one source.
    """

    raw_PGK: np.ndarray
    rows: Sequence[Mapping[str, Any]]
    domains: Sequence[str]


def evaluate(sampler: Sampler, score: Score, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> Evaluation:
    """Sample every prompt and score the samples; every process takes its share and gets the whole.

    Args:
        sampler: Holds the policy.
        score: Gives the matrix of this process's groups, and that of all processes.
        prompts: P held-out prompts, the same in every process; at least one per process.
        params: With G samples per prompt, and the seed of this process.
        step: Written into the rows.

    Raises:
        RolloutError: In every process, when any of them cannot have its samples.
    """
    processes = PartialState()
    share = prompts[processes.process_index :: processes.num_processes]
    groups = together(lambda: sampler.sample(share, params))
    local, gathered = score(groups)
    rows = sample_rows(step, groups, local, weights_K=(), advantages_N=())
    domains = gather_object([prompt.domain for prompt in share])
    return Evaluation(gathered.raw_NK.reshape(len(prompts), params.samples_per_prompt, -1), gather_object(rows), domains)
