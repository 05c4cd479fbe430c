"""From chosen samples to the rows that a trainer gets, in the order in which it gets them. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.selftrain.choose import Chosen, mismatched
from rollout.prompts import prompt_order
from rollout.types import SampleGroup

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of a completion
LogProbs = Callable[[Sequence[Pair]], np.ndarray]  # of whole completions under the policy, nats
Row = dict[str, Any]
IGNORED = -100  # label of a token that is not learned from


@dataclass(frozen=True)
class Batches:
    """How rows fill batches.

    Args:
        batch_size: Rows per optimiser step, over all processes.
        micro_batch_size: Rows per forward pass.
        epochs: Times that each row is wanted.
        seed: Of their order.
    """

    batch_size: int
    micro_batch_size: int
    epochs: int
    seed: int

    def steps(self, rows: int) -> int:
        """Optimiser steps: full batches alone, the last one filled up from one more pass over the rows."""
        return -(-rows * self.epochs // self.batch_size)

    def order(self, rows: int) -> list[int]:
        """Indices of the rows in the order of training: pass after pass, each in an order of its own."""
        return prompt_order(rows, self.steps(rows) * self.batch_size, self.seed).tolist()


def sft_rows(groups: Sequence[SampleGroup], chosen: Chosen, weights_n: np.ndarray, batches: Batches) -> list[Row]:
    """Prompt and completion as one sequence; only completion tokens are learned from."""
    rows = []
    for (prompt, completion), weight in zip(pairs_of(groups, chosen.prompts, chosen.right), weights_n, strict=True):
        labels = [IGNORED] * len(prompt) + list(completion)
        rows.append({"input_ids": [*prompt, *completion], "labels": labels, "weight": float(weight)})
    return [rows[i] for i in batches.order(len(rows))]


def dpo_rows(
    groups: Sequence[SampleGroup], chosen: Chosen, weights_n: np.ndarray, batches: Batches, log_probs: LogProbs
) -> list[Row]:
    """Pairs, with the log-probabilities under the policy as it is: the reference."""
    right, wrong = (pairs_of(groups, chosen.prompts, samples) for samples in (chosen.right, chosen.wrong))
    reference = log_probs([*right, *wrong])
    rows = [
        {
            "prompt_ids": list(right[i][0]),
            "chosen_ids": list(right[i][1]),
            "rejected_ids": list(wrong[i][1]),
            "ref_chosen_logps": float(reference[i]),
            "ref_rejected_logps": float(reference[i + len(right)]),
            "weight": float(weight),
        }
        for i, weight in enumerate(weights_n)
    ]
    return [rows[i] for i in batches.order(len(rows))]


def kto_rows(
    groups: Sequence[SampleGroup], chosen: Chosen, weights_n: np.ndarray, batches: Batches, log_probs: LogProbs
) -> list[Row]:
    """The two of each pair one by one, with a completion of another row for the divergence, and the reference of both."""
    pairs = [pair for s in (chosen.right, chosen.wrong) for pair in pairs_of(groups, chosen.prompts, s)]
    order = batches.order(len(pairs))
    others = mismatched([pairs[i][1] for i in order], batches.micro_batch_size)
    crossed = [(pairs[i][0], other) for i, other in zip(order, others, strict=True)]
    reference, reference_crossed = log_probs(pairs), log_probs(crossed)
    return [
        {
            "prompt_ids": list(pairs[i][0]),
            "completion_ids": list(pairs[i][1]),
            "KL_completion_ids": list(other),
            "label": i < len(chosen),
            "ref_logps": float(reference[i]),
            "ref_KL_logps": float(reference_crossed[place]),
            "weight": float(weights_n[i % len(chosen)]),
        }
        for place, (i, (_, other)) in enumerate(zip(order, crossed, strict=True))
    ]


def pairs_of(groups: Sequence[SampleGroup], prompts: Sequence[int], samples: Sequence[int]) -> list[Pair]:
    """Tokens of prompts and of samples of theirs."""
    chosen = [(groups[p].prompt, groups[p].samples[g]) for p, g in zip(prompts, samples, strict=True)]
    return [(prompt.token_ids, sample.token_ids) for prompt, sample in chosen]
