"""Which samples pass the filter of self-training. Pure functions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.config.selftrain import FilterConfig
from align.pareto import nondominated
from align.selftrain.choose import Answers
from rewards.types import Objective


@dataclass(frozen=True)
class Passed:
    """What passes.

    Args:
        right_PG: Mask of samples that do.
        failed: How many samples do not meet each condition, by its name.
    """

    right_PG: np.ndarray
    failed: dict[str, int]


def passing(
    rules: FilterConfig,
    objectives: Sequence[Objective],
    raw_PGK: np.ndarray,
    left_out_PG: np.ndarray,
    answers_PG: Answers,
    tokens_PG: np.ndarray,
) -> Passed:
    """Samples that meet every condition, have tokens to learn from, and are not left out.

    Args:
        rules: The conditions.
        objectives: K of them.
        raw_PGK: Values in raw units; NaN where missing, which meets no condition on it.
        left_out_PG: Mask of the samples that the missing-value policies leave out.
        answers_PG: For the majority; None of samples that are left out.
        tokens_PG: Length of each sample.
    """
    column = {objective.name: k for k, objective in enumerate(objectives)}
    raw_PGK = np.where(left_out_PG[:, :, None], np.nan, raw_PGK)
    met = {f"{name} at_least {least:g}": raw_PGK[:, :, column[name]] >= least for name, least in rules.at_least.items()}
    met |= {f"{name} at_most {most:g}": raw_PGK[:, :, column[name]] <= most for name, most in rules.at_most.items()}
    if rules.majority:
        met["majority"] = np.array([in_majority(answers_G) for answers_G in answers_PG])
    if rules.nondominated:
        values_PGK = np.stack([o.scale(raw_PGK[:, :, k]) for k, o in enumerate(objectives)], axis=2)
        met["nondominated"] = np.array([best_of_group(values_GK) for values_GK in values_PGK])
    met["has tokens"] = np.asarray(tokens_PG) > 0
    met["has all values"] = ~left_out_PG
    right_PG = np.logical_and.reduce(list(met.values()))
    return Passed(right_PG, {name: int((~mask_PG).sum()) for name, mask_PG in met.items()})


def in_majority(answers_G: Sequence[str | None]) -> np.ndarray:
    """Mask (G,) of the samples with the most common answer; no sample that states none, and the first of equally common."""
    counts = Counter(answer for answer in answers_G if answer is not None)
    commonest = counts.most_common(1)[0][0] if counts else None
    return np.array([answer is not None and answer == commonest for answer in answers_G])


def best_of_group(values_GK: np.ndarray) -> np.ndarray:
    """Mask (G,) of the samples that no other dominates; larger is better. One with a missing value neither does nor is."""
    complete_G = ~np.isnan(values_GK).any(axis=1)
    best_G = np.zeros(len(values_GK), bool)
    if complete_G.any():
        best_G[complete_G] = nondominated(values_GK[complete_G])
    return best_G
