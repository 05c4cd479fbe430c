"""Distributional control of a run: what `estimator: dpg` decides batch by batch, and remembers. Pure functions of arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from align import dpg
from align.config.advantages import DpgEstimator
from align.selftrain.tilt import Tilt, TiltError, fit_tilt
from rewards.types import Objective

_CORRECTIONS = 8  # of what is asked of the fit; each leaves a small part of the gap


class ControlError(RuntimeError):
    """The distribution that was asked for cannot be had from what the policy samples."""


@dataclass(frozen=True)
class ControlState:
    """What is remembered from batch to batch; JSON types only.

    Args:
        coefficients: lambda, per unit of each objective in `moments`.
        window: (log mean of P / q, samples) of the last batches, from which Z of the batch normaliser comes.
        proposal: Optimiser steps that the policy had taken which draws the samples (with `proposal: adaptive`).
        gap: Sum of KL(p || pi) - KL(p || q) over the batches since the proposal was last looked at.
        batches: Their number.
    """

    coefficients: tuple[float, ...]
    window: tuple[tuple[float, int], ...]
    proposal: int = 0
    gap: float = 0.0
    batches: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ControlState":
        """The state that `to_json` wrote."""
        window = tuple((float(log_mean), int(samples)) for log_mean, samples in data["window"])
        return cls(**{**data, "coefficients": tuple(data["coefficients"]), "window": window})


def fit_control(
    estimator: DpgEstimator, objectives: Sequence[Objective], raw_PGK: np.ndarray
) -> tuple[ControlState, Mapping[str, float]]:
    """The state before the first update, from samples of the reference policy itself; and figures of the fit.

    lambda is that at which every prompt's own tilt, on average over the prompts, has the moments (`fit_tilt` with groups):
    both normalisers lead to these tilts, they differ in how much each prompt counts on the way.

    Args:
        estimator: Says which objectives, and which moments.
        objectives: The K objectives.
        raw_PGK: Their values in their own units; NaN for samples that are left out.

    Raises:
        ControlError: A feature never fires, or the moments are out of reach.
    """
    features_PGF, holds_PG = features_of(estimator, objectives, raw_PGK)
    present_PG = ~np.isnan(features_PGF).any(axis=2) & ~np.isnan(raw_PGK).any(axis=2)
    counts_PG = holds_PG & present_PG
    if not counts_PG.any():
        raise ControlError(
            f"estimator.always: {' and '.join(estimator.always)} held in none of {int(present_PG.sum())} samples of the "
            "first policy, so there is nothing to go towards: start from a policy that does it now and then, or draw more "
            "samples (estimator.fit)"
        )
    groups_PG = np.broadcast_to(np.arange(len(raw_PGK))[:, None], counts_PG.shape)
    figures = {"fit/always": float(counts_PG.sum() / present_PG.sum())} if estimator.always else {}
    coefficients_F = np.zeros(0)
    if estimator.moments:
        tilt = _tilt(estimator, features_PGF[counts_PG], groups_PG[counts_PG])
        coefficients_F = tilt.coefficients_F
        figures |= {"fit/ess": tilt.ess, "fit/divergence": tilt.divergence}
        reached_F = dpg.jackknifed_moments(tilt.weights_N, features_PGF[counts_PG], groups_PG[counts_PG])
        for f, name in enumerate(estimator.moments):
            figures |= {f"fit/reached/{name}": reached_F[f], f"fit/given/{name}": features_PGF[counts_PG][:, f].mean()}
            figures[f"fit/gap/{name}"] = abs(estimator.moments[name] - reached_F[f]) / np.ptp(features_PGF[counts_PG][:, f])
            figures[f"coefficient/{name}"] = coefficients_F[f]
    log_weights_PG = dpg.log_target(np.zeros(counts_PG.shape), features_PGF, coefficients_F, holds_PG)
    log_mean = dpg.log_means(log_weights_PG[present_PG][None])[0]
    state = ControlState(tuple(map(float, coefficients_F)), ((float(log_mean), int(present_PG.sum())),))
    return state, {name: float(value) for name, value in figures.items()}


def control(
    estimator: DpgEstimator,
    objectives: Sequence[Objective],
    state: ControlState,
    raw_PGK: np.ndarray,
    log_probs_3PG: np.ndarray,
    step: int,
) -> tuple[ControlState, np.ndarray, Mapping[str, float]]:
    """Advantages (P, G) of a batch, the state after it, and figures to log.

    Args:
        estimator: The target, and how to go there.
        objectives: The K objectives.
        state: After the previous batch.
        raw_PGK: Values in the units of the objectives; NaN for samples that are left out.
        log_probs_3PG: Of the samples under pi, q and a, nats.
        step: Optimiser steps taken so far.
    """
    features_PGF, holds_PG = features_of(estimator, objectives, raw_PGK)
    left_out_PG = np.isnan(raw_PGK).any(axis=2)
    log_policy_PG, log_proposal_PG, log_reference_PG = np.where(left_out_PG, np.nan, log_probs_3PG)
    target_PG = dpg.log_target(log_reference_PG, features_PGF, np.array(state.coefficients), holds_PG)
    log_weights_PG, log_r_PG = target_PG - log_proposal_PG, log_policy_PG - log_proposal_PG
    state, log_normaliser_P = _normaliser(estimator, state, log_weights_PG)
    log_w_PG = dpg.normalised(log_weights_PG, log_normaliser_P)
    advantages_PG = dpg.dpg_advantages(log_w_PG, log_r_PG, estimator.baseline, estimator.cap)

    figures = dict(dpg.divergences(log_w_PG, log_r_PG, log_policy_PG - log_reference_PG))
    figures["capped"] = float((np.exp(log_w_PG[~np.isnan(log_w_PG)]) > estimator.cap).mean())
    figures["log_normaliser"] = float(log_normaliser_P[np.isfinite(log_normaliser_P)].mean())
    moments_F = dpg.policy_moments(np.concatenate([features_PGF, holds_PG[:, :, None]], axis=2), log_r_PG)
    figures |= {f"moment/{name}": moments_F[f] for f, name in enumerate(estimator.moments)}
    if estimator.always:
        figures["always"] = moments_F[-1]
    if estimator.proposal == "adaptive":
        gap = figures["kl_target_policy"] - figures["kl_target_proposal"]
        figures["proposal"] = state.proposal
        state = _next_proposal(state, estimator.every, gap, step)
    return state, advantages_PG, {name: float(value) for name, value in figures.items()}


def features_of(
    estimator: DpgEstimator, objectives: Sequence[Objective], raw_PGK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """phi (P, G, F) of the objectives in `moments`, and whether all of `always` holds (P, G): has its best value.

    Raises:
        ControlError: A value of an objective in `always` is neither its best nor its worst.
    """
    names = [objective.name for objective in objectives]
    features_PGF = raw_PGK[:, :, [names.index(name) for name in estimator.moments]]
    holds_PG = np.ones(raw_PGK.shape[:2], dtype=bool)
    for name in estimator.always:
        objective = objectives[names.index(name)]
        values_PG = objective.scale(raw_PGK[:, :, names.index(name)])
        between = values_PG[(values_PG != 0) & (values_PG != 1) & ~np.isnan(values_PG)]
        if len(between):
            value = raw_PGK[:, :, names.index(name)][np.isin(values_PG, between)][0]
            raise ControlError(
                f"estimator.always: {name!r} had the value {value:g}, and what always holds can only hold or not hold: its "
                f"values have to be {objective.bounds[0]:g} or {objective.bounds[1]:g}; put it into estimator.moments, or "
                "give it a reward of two values"
            )
        holds_PG &= values_PG == 1
    return features_PGF, holds_PG


def _tilt(estimator: DpgEstimator, features_NF: np.ndarray, groups_N: np.ndarray) -> Tilt:
    """The tilt whose jackknifed moments are those wanted: the plain ones of small groups lie below what p really has.

    What is asked of `fit_tilt` is moved by what the jackknife finds missing, a few times over, as long as that can be had.
    In groups of two the jackknifed moment is 2 m - mean phi, so that whole steps would go back and forth for ever: a gap
    that has turned round, and is still beyond the tolerance, halves those that follow.
    """
    names, moments_F = list(estimator.moments), np.array(list(estimator.moments.values()))
    try:
        tilt = fit_tilt(features_NF, moments_F, None, estimator.fit.tolerance, groups_N, names)
    except TiltError as error:
        raise ControlError(
            f"estimator.moments cannot be had from what the first policy samples: {error}. Ask for what lies in reach, draw "
            "more samples (estimator.fit), or start from a policy that does it more often"
        ) from error
    asked_F, length, before_F = moments_F, 1.0, np.zeros_like(moments_F)
    for _ in range(_CORRECTIONS):
        found_F = dpg.jackknifed_moments(tilt.weights_N, features_NF, groups_N)
        gap_F = (moments_F - found_F) / np.ptp(features_NF, axis=0)
        if gap_F @ before_F < 0 and np.abs(gap_F).max() > estimator.fit.tolerance:
            length /= 2
        asked_F, before_F = asked_F + length * moments_F - length * found_F, gap_F
        try:
            tilt = fit_tilt(features_NF, asked_F, None, estimator.fit.tolerance / 10, groups_N, names)
        except TiltError:
            break  # the last one has to do
    return tilt


def unreached(estimator: DpgEstimator, figures: Mapping[str, float]) -> list[str]:
    """Which moments the fit that has these figures leaves further than the tolerance from what is wanted."""
    return [
        f"{name} {figures[f'fit/reached/{name}']:.3g} in the place of {moment:g}"
        for name, moment in estimator.moments.items()
        if figures[f"fit/gap/{name}"] > estimator.fit.tolerance
    ]


def _normaliser(estimator: DpgEstimator, state: ControlState, log_weights_PG: np.ndarray) -> tuple[ControlState, np.ndarray]:
    """log Z (P,): of every group by itself, or of the last `window` batches together, which the state remembers."""
    samples = int((~np.isnan(log_weights_PG)).sum())
    if samples:
        batch = (float(dpg.log_means(log_weights_PG.reshape(1, -1))[0]), samples)
        if np.isfinite(batch[0]):
            state = replace(state, window=(*state.window, batch)[-estimator.window :])
    if estimator.normaliser == "prompt":
        return state, dpg.log_means(log_weights_PG)
    log_means, counts = (np.array(column) for column in zip(*state.window, strict=True))
    largest = log_means.max()
    log_z = largest + np.log((counts * np.exp(log_means - largest)).sum() / counts.sum())
    return state, np.full(len(log_weights_PG), log_z)


def _next_proposal(state: ControlState, every: int, gap: float, step: int) -> ControlState:
    """Every so many batches: samples come from the policy after the coming update, if it has come nearer than they are."""
    if np.isfinite(gap):
        state = replace(state, gap=state.gap + gap)
    state = replace(state, batches=state.batches + 1)
    if state.batches < every:
        return state
    nearer = state.gap < 0
    return replace(state, proposal=step + 1 if nearer else state.proposal, gap=0.0, batches=0)
