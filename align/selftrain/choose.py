"""Which samples of a round are trained on: right ones, and pairs of a right and a wrong one. Pure functions.

P prompts with G samples each; whether a sample is right is a mask (P, G), its answer a string, or None where it states none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Answers = Sequence[Sequence[str | None]]


@dataclass(frozen=True)
class Chosen:
    """What a round trains on, one entry per sample, or per pair.

    Args:
        prompts: Index of the prompt.
        right: Index of the right sample within its group.
        wrong: Of the wrong one; empty where samples are trained on alone.
    """

    prompts: tuple[int, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


def choose_samples(right_PG: np.ndarray, mixed_only: bool, most: int | None, rng: np.random.Generator) -> Chosen:
    """The right samples of each prompt, or `most` of them at random; `mixed_only` leaves out prompts where all are right.

    The data of EAST (2503.23913), which takes one, and of IWSI (2408.09849), which takes all.
    """
    prompts, right = [], []
    for p, right_G in enumerate(right_PG):
        found = np.flatnonzero(right_G)
        if mixed_only and len(found) == len(right_G):
            continue
        if most is not None and most < len(found):
            found = np.sort(rng.choice(found, most, replace=False))
        prompts += [p] * len(found)
        right += found.tolist()
    return Chosen(tuple(prompts), tuple(right))


def choose_pairs(right_PG: np.ndarray, answers_PG: Answers, rng: np.random.Generator) -> Chosen:
    """One pair per prompt: a right sample, and one with the most common wrong answer (EAST, 2503.23913).

    Both are drawn at random among those that will do. A wrong answer is one that no right sample of the prompt states: a
    sample may also be left out for its length. Of equally common ones the first seen is taken. A prompt without a right
    sample, or without a wrong answer, gives no pair; samples that state no answer are in none, as in the paper's own data.
    """
    prompts, right, wrong = [], [], []
    for p, (right_G, answers_G) in enumerate(zip(right_PG, answers_PG, strict=True)):
        found = np.flatnonzero(right_G)
        known = {answers_G[g] for g in found} | {None}
        counts = Counter(answer for answer in answers_G if answer not in known)
        if not len(found) or not counts:
            continue
        commonest = counts.most_common(1)[0][0]
        prompts.append(p)
        right.append(int(rng.choice(found)))
        wrong.append(int(rng.choice([g for g, answer in enumerate(answers_G) if answer == commonest])))
    return Chosen(tuple(prompts), tuple(right), tuple(wrong))


def mismatched(completions: Sequence[Sequence[int]], size: int) -> list[Sequence[int]]:
    """For each prompt of a micro-batch the completion of the one before it, the last one's for the first.

    KTO (2402.01306) measures the divergence from the reference on such pairs, as it costs no sampling.
    """
    assert len(completions) % size == 0, "micro-batches are full"
    return [completions[start + (i - 1) % size] for start in range(0, len(completions), size) for i in range(size)]
