"""Advantage estimators: rewards_PG -> advantages_PG, as pure functions.

P prompts, G samples each. A sample that is left out is NaN in the rewards; it touches no statistic and its advantage
is 0. Standard deviations are of samples (n - 1).
"""

import numpy as np

EPSILON = 1e-4  # keeps divisions by a standard deviation finite; TRL's value


def grpo(rewards_PG: np.ndarray, scale: str) -> np.ndarray:
    """Group-relative advantage.

    A = (r - mean_g) / (s + EPSILON), with s the standard deviation of the group ("group", DeepSeekMath, 2402.03300), of
    the batch ("batch"), or without the division ("none", Dr. GRPO, 2503.20783).
    """
    rewards = np.ma.masked_invalid(rewards_PG)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (rewards.std(ddof=1) + EPSILON)
    return _zero_where_left_out(centred)


def rloo(rewards_PG: np.ndarray) -> np.ndarray:
    """Leave-one-out advantage: A_i = r_i - mean of the other rewards of the group (2402.14740).

    With n samples present, A_i = (r_i - mean_g) n / (n - 1); a sample alone in its group gets 0.
    """
    rewards = np.ma.masked_invalid(rewards_PG)
    count = rewards.count(axis=1, keepdims=True)
    return _zero_where_left_out((rewards - rewards.mean(axis=1, keepdims=True)) * (count / np.maximum(count - 1, 1)))


def reinforce(rewards_PG: np.ndarray, whiten: bool) -> np.ndarray:
    """REINFORCE with the batch mean as baseline: A = r - mean; whitened, (r - mean) / (s + EPSILON) (2501.03262)."""
    rewards = np.ma.masked_invalid(rewards_PG)
    centred = rewards - rewards.mean()
    return _zero_where_left_out(centred / (rewards.std(ddof=1) + EPSILON) if whiten else centred)


def _zero_where_left_out(advantages: np.ma.MaskedArray) -> np.ndarray:
    return np.ma.masked_invalid(advantages).filled(0.0)
