"""One step as a page: from the reward matrix of a batch to its advantages and the next weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.combine import combine, objective_advantages
from align.config import CombinationConfig, EstimatorConfig
from align.control import ControlState, control
from align.domains import UNDIVIDED, DomainRules, domain_means, weigh_domains
from align.missing import apply_missing, refuse_missing
from align.weighting import Observation, Scheme, Signal, WeightState
from rewards.types import Objective, RewardMatrix


@dataclass(frozen=True)
class StepRules:
    """What stays the same from step to step."""

    objectives: Sequence[Objective]
    scheme: Scheme
    estimator: EstimatorConfig
    combination: CombinationConfig
    group_size: int
    max_failed: float
    domains: DomainRules = UNDIVIDED

    @property
    def probes(self) -> bool:
        """Whether gradients are measured: of the objectives, of the domains, or of both."""
        return Signal.GRAM in self.scheme.needs or self.domains.config.type == "alignment"


@dataclass(frozen=True)
class StepResult:
    """What a step decided.

    Args:
        advantages_PG: One advantage per sample, `step_scale` included; 0 for samples that are left out.
        state: The state whose weights made them.
        metrics: Numbers to log.
    """

    advantages_PG: np.ndarray
    state: WeightState
    metrics: Mapping[str, float]


def take_step(
    rules: StepRules,
    state: WeightState,
    matrix: RewardMatrix,
    step: int,
    signals: Mapping[Signal, np.ndarray],
) -> StepResult:
    """Decide the weights and advantages of a batch.

    Args:
        rules: The run's objectives, scheme, estimator and combination.
        state: State of the scheme after the previous batch.
        matrix: Rewards of the whole batch, all processes together; N = P * G rows, group by group.
        step: Optimiser steps taken so far.
        signals: What the scheme and the estimator need, as far as there is any yet (`ADVANTAGES` is made here).

    Raises:
        MissingRewardError: A value is missing whose policy is `fail`.
    """
    if rules.estimator.type == "dpg":
        return _take_control_step(rules, state, matrix, step, signals)
    rewards_PGK = _rewards(rules, matrix)
    missing_PGK = matrix.missing_NK.reshape(rewards_PGK.shape)
    seen_PGK = np.where(missing_PGK, np.nan, rewards_PGK)  # a scheme sees what was measured, not what is filled in
    streams_PGK = _with_kl(rewards_PGK, signals)
    if Signal.ADVANTAGES in rules.scheme.needs:
        signals = {**signals, Signal.ADVANTAGES: _advantages(rules, streams_PGK, state)}
    observation = Observation(step, seen_PGK, {need: signals[need] for need in rules.scheme.needs if need in signals})
    before, state = state, rules.scheme.update(state, observation)

    advantages_PG = _speaking_advantages(rules, rewards_PGK, streams_PGK, state)
    advantages_PG *= state.step_scale
    figures = _of_domains(rules, matrix, signals)
    if Signal.DOMAINS in signals:
        gram_JJ = signals.get(Signal.DOMAIN_GRAM, np.zeros((0, 0)))
        weighed = weigh_domains(rules.domains, before.domains, signals[Signal.DOMAINS], seen_PGK, gram_JJ)
        state, figures = replace(state, domains=weighed.memory), {**figures, **weighed.metrics}
        advantages_PG *= weighed.factors_P[:, None]

    metrics = _metrics(rules.objectives, matrix, state, _constant(rewards_PGK), advantages_PG)
    return StepResult(advantages_PG, state, {**metrics, **_observed_gram(rules, observation), **figures})


def _take_control_step(
    rules: StepRules, state: WeightState, matrix: RewardMatrix, step: int, signals: Mapping[Signal, np.ndarray]
) -> StepResult:
    """Advantages towards the target distribution: neither weights nor combination have a part in them."""
    raw_PGK = raw_rewards(rules, matrix, rules.group_size)
    before, log_probs_3PG = ControlState.from_json(state.control), signals[Signal.LOG_PROBS]
    after, advantages_PG, figures = control(rules.estimator, rules.objectives, before, raw_PGK, log_probs_3PG, step)
    state = replace(state, control=after.to_json())
    metrics = _metrics(rules.objectives, matrix, state, _constant(raw_PGK), advantages_PG)
    metrics |= {f"dpg/{name}": value for name, value in figures.items()} | _of_domains(rules, matrix, signals)
    return StepResult(advantages_PG, state, metrics)


def raw_rewards(rules: StepRules, matrix: RewardMatrix, group_size: int) -> np.ndarray:
    """Values (P, G, K) in the units of the objectives after the missing-value policies. Raises MissingRewardError."""
    refuse_missing(matrix, rules.max_failed)
    return apply_missing(matrix.raw_NK.reshape(-1, group_size, len(rules.objectives)), rules.objectives)


def advantages_alone(rules: StepRules, matrix: RewardMatrix) -> np.ndarray:
    """Advantages (N, K) that each objective would give if it were the only one. Raises MissingRewardError."""
    advantages_PGK = objective_advantages(_rewards(rules, matrix), rules.estimator, rules.combination)
    return advantages_PGK.reshape(len(matrix.raw_NK), -1)


def advantages_in_force(
    rules: StepRules, state: WeightState, matrix: RewardMatrix, signals: Mapping[Signal, np.ndarray]
) -> np.ndarray:
    """Advantages (P, G) that the weights of a state make of a batch, without the step scale and weights of domains."""
    rewards_PGK = _rewards(rules, matrix)
    return _speaking_advantages(rules, rewards_PGK, _with_kl(rewards_PGK, signals), state)


def _rewards(rules: StepRules, matrix: RewardMatrix) -> np.ndarray:
    """Rewards (P, G, K) after the missing-value policies."""
    refuse_missing(matrix, rules.max_failed)
    return apply_missing(matrix.values_NK.reshape(-1, rules.group_size, len(rules.objectives)), rules.objectives)


def objective_metrics(matrix: RewardMatrix) -> dict[str, float]:
    """Per objective the raw mean and spread, and the share of missing values."""
    raw_NK, metrics = np.ma.masked_invalid(matrix.raw_NK), {}
    for k, objective in enumerate(matrix.objectives):
        metrics[f"objectives/{objective.name}/mean"] = float(np.ma.filled(raw_NK[:, k].mean(), np.nan))
        metrics[f"objectives/{objective.name}/std"] = float(np.ma.filled(raw_NK[:, k].std(ddof=1), np.nan))
        metrics[f"objectives/{objective.name}/missing"] = float(matrix.missing_NK[:, k].mean())
    return metrics


def _of_domains(rules: StepRules, matrix: RewardMatrix, signals: Mapping[Signal, np.ndarray]) -> dict[str, float]:
    """Raw means per domain and objective, where prompts have domains."""
    if Signal.DOMAINS not in signals:
        return {}
    raw_PGK = matrix.raw_NK.reshape(-1, rules.group_size, len(rules.objectives))
    means_JK = domain_means(raw_PGK, signals[Signal.DOMAINS], len(rules.domains.names))
    return {
        f"domains/{domain}/mean/{objective.name}": float(mean)
        for domain, means_K in zip(rules.domains.names, means_JK, strict=True)
        for objective, mean in zip(rules.objectives, means_K, strict=True)
    }


def gram_keys(objectives: Sequence[Objective]) -> dict[str, tuple[int, int]]:
    """Metric -> row and column of the inner product of two gradients that the scheme looked at, each pair once."""
    names = [objective.name for objective in objectives]
    return {f"gram/{a}/{names[j]}": (i, j) for i, a in enumerate(names) for j in range(i, len(names))}


def _observed_gram(rules: StepRules, observation: Observation) -> dict[str, float]:
    """What the scheme saw of the gradients; with it all that a scheme sees is in the run folder."""
    if Signal.GRAM not in observation.signals:
        return {}
    gram_KK = observation.signals[Signal.GRAM]
    return {key: float(gram_KK[place]) for key, place in gram_keys(rules.objectives).items()}


def _with_kl(rewards_PGK: np.ndarray, signals: Mapping[Signal, np.ndarray]) -> np.ndarray:
    """The objectives and, where the log-ratio to the reference policy is known, minus it as one more stream."""
    if Signal.KL not in signals:
        return rewards_PGK
    left_out_PG = np.isnan(rewards_PGK).any(axis=2)
    closeness_PG = np.where(left_out_PG, np.nan, -signals[Signal.KL])
    return np.concatenate([rewards_PGK, closeness_PG[:, :, None]], axis=2)


def _advantages(rules: StepRules, streams_PGK: np.ndarray, state: WeightState) -> np.ndarray:
    weights = np.array([*state.weights_K, state.kl_weight])[: streams_PGK.shape[2]]
    return combine(streams_PGK, weights, rules.estimator, rules.combination)


def _speaking_advantages(
    rules: StepRules, rewards_PGK: np.ndarray, streams_PGK: np.ndarray, state: WeightState
) -> np.ndarray:
    """Advantages, 0 in groups that say nothing."""
    advantages_PG = _advantages(rules, streams_PGK, state)
    silent_P = _constant(rewards_PGK)[:, np.array(state.weights_K) != 0].all(axis=1) & (state.kl_weight == 0)
    if rules.estimator.type != "reinforce":  # against its own mean, a group without differences says nothing
        advantages_PG[silent_P] = 0.0
    return advantages_PG


def _constant(rewards_PGK: np.ndarray) -> np.ndarray:
    """Mask (P, K) of groups whose present samples all have the same value of an objective."""
    rewards = np.ma.masked_invalid(rewards_PGK)
    return np.ma.filled(rewards.max(axis=1) == rewards.min(axis=1), True)


def _metrics(
    objectives: Sequence[Objective],
    matrix: RewardMatrix,
    state: WeightState,
    constant_PK: np.ndarray,
    advantages_PG: np.ndarray,
) -> dict[str, float]:
    """Weights, `objective_metrics`, and per objective the share of constant groups."""
    metrics = {"step_scale": state.step_scale, "groups/effective": float((advantages_PG != 0).any(axis=1).mean())}
    metrics |= objective_metrics(matrix)
    for k, objective in enumerate(objectives):
        metrics[f"weights/{objective.name}"] = state.weights_K[k]
        metrics[f"objectives/{objective.name}/constant_groups"] = float(constant_PK[:, k].mean())
    if state.kl_weight:
        metrics["weights/kl"] = state.kl_weight
    for name, value in state.memory.items():
        if isinstance(value, (int, float)):
            metrics[f"weighting/{name}"] = float(value)
        elif isinstance(value, dict) and all(isinstance(v, (int, float)) for v in value.values()):
            metrics |= {f"weighting/{name}/{key}": float(v) for key, v in value.items()}
    return metrics
