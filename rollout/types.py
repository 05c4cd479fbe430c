"""What travels through a rollout: prompts, samples, and the groups they form."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"  # the policy emitted an end-of-sequence token
    LENGTH = "length"  # it reached the token limit first


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, rendered and tokenised.

    Args:
        id: Names the prompt among all; stable across runs.
        text: What the policy reads, after the chat template where there is one.
        token_ids: `text` as token ids.
        columns: The data row it came from; rewards may read any of its fields.
        domain: Name of its source among several; empty where there is one.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion.

    Args:
        token_ids: Completion tokens, the end-of-sequence token included when there is one.
        log_probs: Log-probability (nats) of each token under the sampling distribution; empty when not asked for.
        finish_reason: Why it ended.
        policy_version: Number of optimiser steps the sampling policy had seen.
        text: `token_ids` decoded without special tokens.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    text: str


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]
