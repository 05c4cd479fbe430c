"""Held-out evaluation: a policy's mean on every objective, with standard errors over prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from align.runlog import sample_rows
from align.together import together
from rewards.types import Objective, RewardMatrix
from rollout.sampler import Sampler, SamplingParams
from rollout.types import Prompt, SampleGroup

Score = Callable[[Sequence[SampleGroup]], tuple[RewardMatrix, RewardMatrix]]


@dataclass(frozen=True)
class Summary:
    """Means in raw units, their standard errors, and shares of missing values, by objective name.

    `domains` has the means of each domain alone, where the prompts are a mixture.
    """

    values: Mapping[str, float]
    standard_errors: Mapping[str, float]
    missing: Mapping[str, float]
    domains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


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


def summarize(raw_PGK: np.ndarray, objectives: Sequence[Objective], domains: Sequence[str] = ()) -> Summary:
    """Mean over prompts of the mean over samples; missing values are left out.

    The standard error is that of a mean of P independent prompts, s / sqrt(P) with s the standard deviation (n - 1) of
    the prompt means: samples of one prompt are not independent. It is NaN with fewer than two prompts, and the mean is
    NaN without any value. With the `domains` of the P prompts, means are also taken of each one.
    """
    present = np.ma.masked_invalid(raw_PGK)
    prompt_means_PK = present.mean(axis=1)
    counts_K = np.ma.count(prompt_means_PK, axis=0)
    means_K = np.ma.filled(prompt_means_PK.mean(axis=0), np.nan)
    errors_K = np.ma.filled(prompt_means_PK.std(axis=0, ddof=1), np.nan) / np.sqrt(np.maximum(counts_K, 1))
    missing_K = np.isnan(raw_PGK).mean(axis=(0, 1))
    by_name = [{o.name: float(x) for o, x in zip(objectives, row, strict=True)} for row in (means_K, errors_K, missing_K)]
    names = sorted(filter(None, set(domains)))
    of_domains = {name: summarize(raw_PGK[np.array(domains) == name], objectives).values for name in names}
    return Summary(*by_name, of_domains)
