"""Weights of samples: raw ones by six methods, and their product with mean one, a cap and an effective sample size.

A raw weight is 0 or more and has no scale: `compose` gives the scale. Arrays have one entry for each of n samples, in
float64. No function takes empty arrays, NaN or infinities: who has nothing to weight, or a sample without a loss, leaves it
out before. All are pure: processes that are given the same numbers reach the same weights.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from typing import Literal

import numpy as np


class WeightsError(ValueError):
    """The weights that were asked for cannot be had from these samples."""


LossShape = Literal["lin_upper", "quadratic", "extremes"]
_SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lin_upper": lambda h_n: np.minimum(h_n + 1.0, 1.0),
    "quadratic": lambda h_n: 1.0 - h_n**2,
    "extremes": np.abs,
}
_ROUNDING = 1e-3  # nats below 0 that a mean of log-probabilities may have come to in half precision


# --- what the answers of a prompt say ---------------------------------------------------------------------------------


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Entropy of the answers to one prompt, over clusters of equal ones (EAST, 2503.23913).

    h = -sum_j p_j log2 p_j in bits, with p_j the share of cluster j among n answers; in [0, log2 n]. Samples that state
    no answer (None) are one cluster more, as in the paper's own code.

    With few samples h is too low, by about (m - 1) / (2 n ln 2) bits for m possible answers (Miller and Madow 1955): 0.09
    for 2 of them and n = 8. As in the paper nothing is corrected: its groups all have one size, and so have ours.

    Args:
        answers: Canonical ones, as `rewards.answers` reads them; text that differs is another answer.
    """
    if not answers:
        raise ValueError("there are no answers to take the entropy of")
    n, counts = len(answers), sorted(Counter(answers).values())
    if len(counts) == 1:
        return 0.0  # the sum below may miss it by a rounding, and powers below 0 would make much of that
    return log2(n) - sum(count * log2(count) for count in counts) / n


def entropy_weights(entropies_n: np.ndarray, power: float) -> np.ndarray:
    """Raw weights of samples by the answer entropy of their prompts (EAST, 2503.23913).

    w = h^power: above 0 it favours prompts that the policy is of several minds about, below 0 those that it is sure of, and
    0 is uniform. Where h = 0, the weight is 1 under power 0 and 0 otherwise, below 0 too: the paper's data have no such
    prompts (it drops those with one answer), and infinity is no weight. When no sample has h above 0 all weights are 1.

    Args:
        entropies_n: In any unit (it cancels in `compose`), 0 or more: of the prompt of each sample.
        power: Any finite number.
    """
    entropies_n = _numbers(entropies_n, "entropies", least=0.0)
    if not np.isfinite(power):
        raise ValueError(f"the power of entropy weights is {power}, and must be a finite number")
    if power == 0 or not entropies_n.any():
        return np.ones_like(entropies_n)
    with np.errstate(over="ignore", under="ignore"):
        raw_n = np.where(entropies_n > 0, np.where(entropies_n > 0, entropies_n, 1.0) ** power, 0.0)
    if not np.isfinite(raw_n).all() or not raw_n.any():
        raise WeightsError(f"entropies to the power of {power} leave double precision: take one nearer to 0")
    return raw_n


# --- how far from trusted samples -------------------------------------------------------------------------------------


def distribution_shift(losses_n: np.ndarray, trusted_losses_m: np.ndarray) -> np.ndarray:
    """How far each sample is from a few trusted ones, by its loss: the distribution shift extent (IWSI, 2408.09849).

    extent = max(w', 1 / w') with w' = mean(trusted losses) / loss, so exp|ln loss - ln mean trusted loss|: 1 at best, and
    large both for what is too easy for the policy and for what is odd to it. Infinite where one of the two losses is 0.

    Departures: a loss is the mean over the completion's tokens, where the paper's is over those of the question as well, so
    that its extent partly measures how the question is put; nothing is clipped (the published code clips both sides
    unequally, and drops ties). As in the paper the losses are those of the policy before this training.

    Args:
        losses_n: Mean negative log-likelihood of each completion, in nats per token.
        trusted_losses_m: The same of the trusted samples, under the same policy.
    """
    ratios_n = _ratios(losses_n, trusted_losses_m)
    with np.errstate(divide="ignore"):
        return np.maximum(ratios_n, 1.0 / ratios_n)


def keep_nearest(extent_n: np.ndarray, share: float) -> np.ndarray:
    """Raw weights 1 for the share of samples with the smallest extent, else 0: the filter of IWSI (2408.09849).

    Kept are those up to the ceil(share * n)-th smallest extent, and all that tie with it. The paper keeps what is at most
    the k-th percentile (k = 80), and finds this better than its weights.

    Args:
        extent_n: Of `distribution_shift`; infinities are furthest.
        share: In (0, 1].
    """
    extent_n = np.asarray(extent_n, dtype=float)
    _numbers(np.where(np.isposinf(extent_n), 1.0, extent_n), "extents", least=0.0)
    if not 0 < share <= 1:
        raise ValueError(f"the share of samples to keep is {share}, and must be above 0 and at most 1")
    kept = max(1, int(np.ceil(share * len(extent_n) - 1e-9)))  # 0.07 * 100 is above 7
    return (extent_n <= np.sort(extent_n)[kept - 1]).astype(float)


def importance_weights(losses_n: np.ndarray, trusted_losses_m: np.ndarray, cap: float) -> np.ndarray:
    """Raw weights by the ratio of losses, the weight form of IWSI ("IWSI-w", 2408.09849).

    w = min(w', cap) with w' = mean(trusted losses) / loss: samples easier than the trusted ones count more, odd ones less.

    Departures as in `distribution_shift`. The published code has a maximum in the place of the minimum, which makes all
    weights equal; this is the formula of the text, which has it barely above no weights at all: prefer `keep_nearest`.

    Args:
        losses_n: As there, in nats per completion token.
        trusted_losses_m: As there.
        cap: Above 0.
    """
    if not (cap > 0 and np.isfinite(cap)):
        raise ValueError(f"the cap of importance weights is {cap}, and must be a finite number above 0")
    return np.minimum(_ratios(losses_n, trusted_losses_m), cap)


def _ratios(losses_n: np.ndarray, trusted_losses_m: np.ndarray) -> np.ndarray:
    """w' of IWSI; 1 where both losses are 0."""
    losses_n = _nats(losses_n, "losses")
    trusted = _nats(trusted_losses_m, "losses of trusted samples").mean()
    with np.errstate(divide="ignore", over="ignore"):
        above_n = np.where(losses_n > 0, trusted / np.where(losses_n > 0, losses_n, 1.0), np.inf)
    return np.where((losses_n == 0) & (trusted == 0), 1.0, above_n)


# --- losses and returns -----------------------------------------------------------------------------------------------


def loss_weights(losses_n: np.ndarray, shape: LossShape, temperature: float) -> np.ndarray:
    """Raw weights by each sample's own loss (dynamic loss-based sample reweighting, 2502.06733).

    h = 2 (loss - min) / (max - min) - 1 in [-1, 1], and w = n softmax(f(h) / temperature), with f
    `lin_upper` min(h + 1, 1): only the easy half counts less;  `quadratic` 1 - h^2: the middle counts most;
    `extremes` |h|: both ends count most. Losses that are all equal get equal weights.

    min and max are of the samples given: the paper's are of the whole batch over all processes, and so should be these. It
    keeps weights uniform for a warm-up, which is the caller's: an infinite temperature is uniform.

    Args:
        losses_n: Any finite numbers.
        shape: As above.
        temperature: Above 0; infinity is uniform.
    """
    if shape not in _SHAPES:
        raise ValueError(f"no loss weights of shape {shape!r}; there are: {', '.join(_SHAPES)}")
    return _softmax(_SHAPES[shape](2.0 * _to_unit(_numbers(losses_n, "losses")) - 1.0), temperature)


def trajectory_weights(returns_n: np.ndarray, temperature: float) -> np.ndarray:
    """Raw weights by each sample's return: return-weighted replay (Hong et al., ICLR 2023, "RW").

    w = n softmax(G' / temperature), with G' = (G - min) / (max - min) in [0, 1]; equal returns get equal weights.

    The paper draws transitions with these probabilities, so that long trajectories count more; here they weight samples, of
    any length alike. One published variant takes the softmax before the min-max, which undoes the temperature.

    Args:
        returns_n: Any finite numbers, larger is better. Less a baseline of their prompt they give the paper's "AW".
        temperature: Above 0, and infinity is uniform; the paper's is 0.1 or 0.2.
    """
    return _softmax(_to_unit(_numbers(returns_n, "returns")), temperature)


def dual_step(duals_n: np.ndarray, losses_n: np.ndarray, threshold: float, rate: float, leak: float = 0.0) -> np.ndarray:
    """One step of the multipliers that weight samples under feasible learning (2501.14912): all losses below a threshold.

    d <- [d + rate (loss - threshold - leak d)]_+ : grows while its sample violates the constraint, and decays to 0 once it
    is met. With leak = 1 / alpha it is the resilient form, which settles at (loss - threshold) / leak where the constraint
    cannot be met; without, such a sample (a wrong label) takes more and more weight.

    The paper also has a dual optimiser with momentum (nuPI); this is plain projected ascent.

    Args:
        duals_n: 0 or more: 0 at first for feasibility alone, or 1 to begin with uniform weights. They are the raw weights.
        losses_n: Of the same samples now; any finite numbers.
        threshold: In the unit of the losses.
        rate: Above 0.
        leak: 0 or more; rate * leak must stay below 2, or the steps overshoot for ever.
    """
    duals_n, losses_n = _numbers(duals_n, "multipliers", least=0.0), _numbers(losses_n, "losses")
    _same_length(duals_n, losses_n, "multipliers", "losses")
    if not (rate > 0 and leak >= 0 and rate * leak < 2 and np.isfinite(threshold) and np.isfinite(rate)):
        raise ValueError(
            f"a dual step with threshold {threshold}, rate {rate} and leak {leak} does not settle: the threshold must be a "
            "finite number, the rate above 0, the leak 0 or more, and the product of the two below 2"
        )
    return np.maximum(duals_n + rate * (losses_n - threshold - leak * duals_n), 0.0)


# --- together ---------------------------------------------------------------------------------------------------------


def shuffled(raw_n: np.ndarray, seed: int) -> np.ndarray:
    """The same weights, dealt out to the samples at random: the control that tells a method from its spread of weights.

    Args:
        raw_n: Weights.
        seed: The permutation is a pure function of it and of n.
    """
    return np.random.default_rng(seed).permutation(_numbers(raw_n, "weights", least=0.0))


@dataclass(frozen=True)
class Weights:
    """Weights of n samples.

    Args:
        values_n: With mean one, none above the cap; all 1 when collapsed.
        ess: Effective sample size (sum w)^2 / (n sum w^2) as a share of n, in (0, 1]: of the capped weights, also when
            they collapsed; 0 when they were all 0, NaN when none could be had.
        collapsed: The effective sample size is below the least one, or so many weights are 0 that the rest, each at its
            cap, would not bring the mean to one.
    """

    values_n: np.ndarray
    ess: float
    collapsed: bool


def compose(raws: Sequence[np.ndarray], cap: float, least_ess: float) -> Weights:
    """Product of raw weights with mean one and a cap, or uniform weights when too few samples would count.

    w = prod_r raw_r;  values = min(s w, cap) with the one s that makes their mean 1. With the weights in falling order,
    s = (n - k cap) / sum_{i > k} w_i for the smallest k where s w_{k+1} <= cap: the k largest are at the cap exactly, the
    others keep their ratios. A common factor on any raw weights changes nothing.

    Papers either clip before they normalise, which moves the mean, or after, which leaves the cap open. Uniform weights on
    collapse are our own rule: a step that rests on a handful of samples is worse than one that ignores the weights.

    Args:
        raws: Arrays of n weights, one at least; 0 or more.
        cap: 1 or more (1 makes all equal); infinity is none.
        least_ess: Share of n in [0, 1] below which weights collapse.
    """
    if not len(raws):
        raise ValueError("there are no weights to compose: uniform ones are one array of ones")
    if not cap >= 1 or not 0 <= least_ess <= 1:
        raise ValueError(
            f"weights with mean one want a cap of 1 or more, not {cap}, and a least effective sample size in [0, 1], not "
            f"{least_ess}"
        )
    product_n = _product([_numbers(raw_n, "weights", least=0.0) for raw_n in raws])
    values_n = _capped(product_n, cap)
    ess = effective_share(values_n)
    collapsed = ess < least_ess or not _near_one(values_n.mean())
    return Weights(np.ones_like(values_n) if collapsed else values_n, ess, collapsed)


def effective_share(weights_n: np.ndarray) -> float:
    """Effective sample size of weights as a share of n (Kish 1965): (sum w)^2 / (n sum w^2) in (0, 1]; 0 if all are 0."""
    weights_n = _numbers(weights_n, "weights", least=0.0)
    if not weights_n.any():
        return 0.0
    scaled_n = np.sort(weights_n / weights_n.max())  # in this order for a sum that no permutation changes
    return float(min(1.0, scaled_n.sum() ** 2 / (len(scaled_n) * (scaled_n**2).sum())))


def _product(raws: Sequence[np.ndarray]) -> np.ndarray:
    """Elementwise, with maximum 1 unless all are 0; by logarithms, so that it neither overflows nor vanishes."""
    logs_n = np.zeros_like(raws[0])
    for raw_n in raws:
        _same_length(raws[0], raw_n, "weights", "other weights")
        with np.errstate(divide="ignore"):
            logs_n = logs_n + np.log(raw_n)
    largest = logs_n.max()
    return np.zeros_like(logs_n) if largest == -np.inf else np.exp(logs_n - largest)


def _capped(weights_n: np.ndarray, cap: float) -> np.ndarray:
    """min(s w, cap) with mean one; where even the cap for all above 0 is too little, that."""
    n, positive = len(weights_n), int((weights_n > 0).sum())
    if positive * cap <= n * (1 + 1e-12):
        return np.where(weights_n > 0, cap, 0.0)
    falling_n = np.sort(weights_n)[::-1]
    tails_n = np.cumsum(falling_n[::-1])[::-1]  # tails_n[k] = sum of all but the k largest
    capped = np.arange(positive)
    left = n - (capped * cap if np.isfinite(cap) else 0.0)
    with np.errstate(over="ignore"):
        scales = left / tails_n[:positive]
        fits = (left > 0) & (scales * falling_n[:positive] <= cap * (1 + 1e-12))
    scale = scales[int(np.argmax(fits))]
    return np.minimum(scale * weights_n, cap)


def _near_one(mean: float) -> bool:
    return abs(mean - 1.0) < 1e-6


def _to_unit(values_n: np.ndarray) -> np.ndarray:
    """Between 0 and 1 by minimum and maximum; all 0.5 when they are equal."""
    with np.errstate(over="ignore"):
        low, spread = values_n.min(), np.ptp(values_n)
    if not np.isfinite(spread):
        raise ValueError("losses or returns are further apart than double precision goes")
    return (values_n - low) / spread if spread > 0 else np.full_like(values_n, 0.5)


def _softmax(scores_n: np.ndarray, temperature: float) -> np.ndarray:
    """n softmax(scores / temperature): mean one."""
    if not temperature > 0:
        raise ValueError(f"the temperature of weights is {temperature}, and must be above 0 (infinity is uniform)")
    with np.errstate(over="ignore"):
        powers_n = np.exp((scores_n - scores_n.max()) / temperature)
    return powers_n * (len(powers_n) / powers_n.sum())


def _nats(values_n: np.ndarray, name: str) -> np.ndarray:
    """Mean negative log-likelihoods; what rounding has brought below 0 is 0."""
    return np.maximum(_numbers(values_n, f"{name} (nats per token)", least=-_ROUNDING), 0.0)


def _numbers(values_n: np.ndarray, name: str, least: float = -np.inf) -> np.ndarray:
    """The values as float64 of shape (n,). Raises ValueError naming the first that is not finite, or below `least`."""
    values_n = np.asarray(values_n, dtype=float)
    if values_n.ndim != 1 or not len(values_n):
        raise ValueError(f"{name} of shape {values_n.shape}: want one for each sample, and at least one sample")
    bad = np.flatnonzero(~(np.isfinite(values_n) & (values_n >= least)))
    if len(bad):
        bound = "" if least == -np.inf else f" of {max(least, 0.0):g} or more"
        raise ValueError(
            f"{name}: number {bad[0]} of {len(values_n)} is {values_n[bad[0]]}, which is no finite number{bound}; leave "
            "samples without one out"
        )
    return values_n


def _same_length(a_n: np.ndarray, b_n: np.ndarray, a_name: str, b_name: str) -> None:
    if len(a_n) != len(b_n):
        raise ValueError(f"{len(a_n)} {a_name} and {len(b_n)} {b_name}: want one of each for every sample")
