"""Sampling parameters, seeds included, as pure functions of the configuration and the place in the run.

No generator has a state that would have to be saved: a resumed run draws what the uninterrupted one would have drawn.
"""

from dataclasses import dataclass, replace

import numpy as np

from align.config import Config
from rollout.sampler import SamplingParams

_TRAINING, _EVALUATION, _ROUND, _POOL, _FIT = 0, 1, 2, 3, 4  # streams of random numbers


@dataclass(frozen=True)
class Place:
    """One process among all: its index, and their number."""

    process: int = 0
    processes: int = 1


def training_params(config: Config, step: int, place: Place) -> SamplingParams:
    """For one process's part of the batch drawn after `step` optimiser steps: its share is one block."""
    rollout = config.rollout
    return SamplingParams(
        samples_per_prompt=rollout.samples_per_prompt,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        log_probs=rollout.correction.type != "none" or config.estimator.type == "dpg" or _fills_pool(config),
        first=place.process * (rollout.prompts_per_batch // place.processes),
        seed=_seed(config.seed, _TRAINING, step, *_of_process(config, place)),
    )


def fit_params(config: Config, place: Place) -> SamplingParams:
    """For the prompts from which `estimator: dpg` fits its target, before the first update; dealt out one by one."""
    return replace(
        training_params(config, 0, place),
        samples_per_prompt=config.estimator.fit.samples_per_prompt,
        log_probs=False,
        first=place.process,
        stride=place.processes,
        seed=_seed(config.seed, _FIT, *_of_process(config, place)),
    )


def evaluation_params(config: Config, place: Place, start: int = 0) -> SamplingParams:
    """For held-out prompts, dealt out one by one; equal seeds at every step, so that policies meet on equal terms.

    `start` is the place of the first of them among all, where they are sampled part by part.
    """
    part = (start,) if start and config.rollout.engine.type == "transformers" else ()
    return SamplingParams(
        samples_per_prompt=config.evaluation.samples_per_prompt,
        max_tokens=config.rollout.max_tokens,
        temperature=config.evaluation.temperature,
        log_probs=config.rollout.correction.type != "none",
        first=start + place.process,
        stride=place.processes,
        seed=_seed(config.seed, _EVALUATION, *_of_process(config, place), *part),
    )


def _fills_pool(config: Config) -> bool:
    """Whether samples are kept, with the log-probabilities that they were drawn with."""
    return config.selftrain is not None and config.selftrain.term is not None


def pool_seed(config: Config, step: int, use: int) -> int:
    """Of what self-training draws at random for the update after `step` optimiser steps, for each of its uses."""
    return _seed(config.seed, _POOL, step, use)


def _of_process(config: Config, place: Place) -> tuple[int, ...]:
    """An engine with one generator needs one per process; with vLLM every sample has its own, by its place."""
    return (place.process,) if config.rollout.engine.type == "transformers" else ()


def _seed(*key: int) -> int:
    """31 bits, a pure function of the key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1


def round_seed(config: Config, number: int, use: int) -> int:
    """Of what a round of self-training draws besides its samples, for each of its uses."""
    return _seed(config.seed, _ROUND, number, use)
