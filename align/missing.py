"""What missing values do to a batch. Missing is never 0."""

from collections.abc import Sequence

import numpy as np

from rewards.types import NO_VALUE, OUTSIDE, Missing, Objective, RewardMatrix

BY_HAND = ": without a single value there is nothing to go on with (`paretune rewards try` scores texts by hand)"


class MissingRewardError(RuntimeError):
    """A value is missing, and the objective's policy is to stop."""


def failing(matrix: RewardMatrix, limit: float) -> dict[str, str]:
    """Sentences, by objective, about those of which more than a share of the values failed; any, where the policy is `fail`.

    A reward that itself says that it has no value for a sample has not failed.
    """
    sentences = {}
    for k, objective in enumerate(matrix.objectives):
        reasons = [why for (_, column), why in sorted(matrix.errors.items()) if column == k and why != NO_VALUE]
        if len(reasons) > (0.0 if objective.missing is Missing.FAIL else limit) * len(matrix.raw_NK):
            how_many = f"{len(reasons)} of {len(matrix.raw_NK)} samples"
            sentences[objective.name] = f"objective {objective.name!r} failed on {how_many}; the first: {reasons[0]}"
    return sentences


def refuse_missing(matrix: RewardMatrix, limit: float) -> None:
    """Raise MissingRewardError when an objective with the policy `fail` lacks a value, or one failed beyond the limit."""
    for k, objective in enumerate(matrix.objectives):
        rows = np.flatnonzero(matrix.missing_NK[:, k])
        if objective.missing is Missing.FAIL and len(rows):
            reason = matrix.errors.get((int(rows[0]), k), "no reason was recorded")
            bounds = f" or objectives.{objective.name}.bounds" if OUTSIDE in reason else ""
            key = f"--objectives.{objective.name}.missing"
            way_out = f", or say what a missing value does: {key}=drop_sample (or drop_group, neutral)"
            raise MissingRewardError(
                f"objective {objective.name!r} has no value for {len(rows)} of {len(matrix.raw_NK)} samples; the first: "
                f"{reason}. Mend the reward{bounds}{BY_HAND if len(rows) == len(matrix.raw_NK) else way_out}"
            )
    if sentences := failing(matrix, limit):
        way_out = f", or let more of it fail: --scoring.max_failed (now {limit:g})"
        whole = any(matrix.missing_NK[:, k].all() for k, o in enumerate(matrix.objectives) if o.name in sentences)
        raise MissingRewardError(f"{'; '.join(sentences.values())}. Mend the reward{BY_HAND if whole else way_out}")


def unmeasured(matrix: RewardMatrix) -> dict[str, str]:
    """Sentences, by objective, about those that have no value for any sample of a batch."""
    sentences = {}
    for k, objective in enumerate(matrix.objectives):
        if matrix.missing_NK[:, k].all():
            reason = matrix.errors.get((0, k), "no reason was recorded")
            sentences[objective.name] = f"objective {objective.name!r} has no value for any sample of the batch: {reason}"
    return sentences


def apply_missing(rewards_PGK: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Rewards (P, G, K) after the missing-value policies: NaN where a sample is left out, numbers elsewhere.

    A neutral value is the mean of its group's other values of that objective, or of the batch's where the group has
    none, or a constant where nobody has one: it then moves no advantage.
    """
    if not np.isnan(rewards_PGK).any():
        return rewards_PGK
    left_out_PG, rewards_PGK = left_out(rewards_PGK, objectives), rewards_PGK.copy()
    for k, objective in enumerate(objectives):
        if objective.missing is Missing.NEUTRAL:
            rewards_PGK[:, :, k] = _fill(rewards_PGK[:, :, k])
    rewards_PGK[left_out_PG] = np.nan
    return rewards_PGK


def left_out(rewards_PGK: np.ndarray, objectives: Sequence[Objective]) -> np.ndarray:
    """Mask (P, G) of the samples that the missing-value policies leave out."""
    left_out_PG = np.zeros(rewards_PGK.shape[:2], dtype=bool)
    for k, objective in enumerate(objectives):
        missing_PG = np.isnan(rewards_PGK[:, :, k])
        if objective.missing is Missing.DROP_GROUP:
            left_out_PG |= missing_PG.any(axis=1, keepdims=True)
        elif objective.missing is not Missing.NEUTRAL:
            left_out_PG |= missing_PG
    return left_out_PG


def _fill(rewards_PG: np.ndarray) -> np.ndarray:
    present = np.ma.masked_invalid(rewards_PG)
    batch_mean = present.mean() if present.count() else 0.0
    group_mean_P1 = present.mean(axis=1, keepdims=True).filled(batch_mean)
    return np.where(np.isnan(rewards_PG), group_mean_P1, rewards_PG)
