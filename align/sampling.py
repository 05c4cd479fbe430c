"""Sampling parameters, seeds included, as pure functions of the configuration and the place in the run.

No generator has a state that would have to be saved: a resumed run draws what the uninterrupted one would have drawn.
"""

import numpy as np

from align.config import Config
from rollout.sampler import SamplingParams

_TRAINING, _EVALUATION = 0, 1  # streams of random numbers


def training_params(config: Config, step: int, process: int) -> SamplingParams:
    """For the batch drawn by one process after `step` optimiser steps."""
    rollout = config.rollout
    return SamplingParams(
        samples_per_prompt=rollout.samples_per_prompt,
        max_tokens=rollout.max_tokens,
        seed=_seed(config.seed, _TRAINING, step, process),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
    )


def evaluation_params(config: Config, process: int) -> SamplingParams:
    """For held-out prompts; the seed is the same at every step, so that policies are compared on equal terms."""
    return SamplingParams(
        samples_per_prompt=config.evaluation.samples_per_prompt,
        max_tokens=config.rollout.max_tokens,
        seed=_seed(config.seed, _EVALUATION, process),
        temperature=config.evaluation.temperature,
    )


def _seed(*key: int) -> int:
    """31 bits, a pure function of the key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
