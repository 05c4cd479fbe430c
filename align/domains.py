"""Weights of prompt domains: sources of a mixture count more or less in the advantages, by weights that may follow training.

J counts the domains. Weights lie on the simplex; the advantages of a prompt are multiplied by the weight of its domain,
scaled to mean one over the batch. They act beside the shares by which domains are sampled: in the long run a domain has a
part of the gradient in proportion to share * weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config import Config
from align.config.domains import AlignmentDomains, AnyDomains, ExcessDomains, FixedDomains

NAN = float("nan")

# --- formulas ---------------------------------------------------------------------------------------------------------


def prompt_factors(weights_J: np.ndarray, domains_P: np.ndarray) -> np.ndarray:
    """Factors (P,) on the advantages of the prompts of a batch: f_p = w_j(p) / mean_q w_j(q), of mean one.

    Args:
        weights_J: Above 0, of any scale.
        domains_P: Place of each prompt's domain among them. Domains that the batch has no prompt of have no say.
    """
    raw_P = weights_J[domains_P] / weights_J[domains_P].max()
    return raw_P / raw_P.mean()


def exponentiated(weights_J: np.ndarray, scores_J: np.ndarray, rate: float, smoothing: float) -> np.ndarray:
    """One exponentiated update on the simplex, smoothed: w_j <- (1 - c) w_j exp(rate s_j) / Z + c / J (DoReMi, 2305.10429).

    Args:
        weights_J: On the simplex.
        scores_J: Of any unit; a common constant cancels.
        rate: Eta of the paper, which has 1.
        smoothing: c of the paper, which has 1e-3 or 1e-4.
    """
    raised_J = weights_J * np.exp(rate * (scores_J - scores_J.max()))
    return (1 - smoothing) * raised_J / raised_J.sum() + smoothing / len(weights_J)


def excess(reference_J: np.ndarray, values_J: np.ndarray) -> np.ndarray:
    """What the domains are below what they could reach: s_j = max(reference_j - value_j, 0), NaN where one is not known.

    After DoReMi (2305.10429), whose excess is that of the loss of a proxy over the loss of a reference model. Departures:
    rewards in the place of losses; the clip is of the domain, not of every token.
    """
    return np.maximum(reference_J - values_J, 0.0)


def alignment(gram_JJ: np.ndarray, target_J: np.ndarray, cosine: bool, self_term: bool) -> np.ndarray:
    """Agreement (J,) of each domain's mean gradient with the mean one of the target; NaN of a domain without a gradient.

    s_j = <g_j, mean_{t in target} g_t> / mean_i |g_i|^2,   or the mean of the cosines of the angles

    After DoGE (2310.15393). Departures: divided by the mean squared length, so that a rate means the same for every model
    and batch; the mean over the target in the place of the sum; scores below 0 are kept, where the paper's code clips them;
    gradients are of the policy loss under the advantages of the batch. Means over few prompts are long by their noise, which
    the self-term counts.

    Args:
        gram_JJ: Inner products of the domains' mean gradients; 0 where a domain has none.
        target_J: Mask of the target.
        cosine: Take cosines, so that lengths do not count.
        self_term: Count t = j; without it the target of a domain is the others, and NaN where there are none.
    """
    square_J = gram_JJ.diagonal()
    speaks_J = square_J > 0
    if not speaks_J.any():
        return np.full(len(gram_JJ), NAN)
    length_J = np.sqrt(np.where(speaks_J, square_J, 1.0))
    relative_JJ = gram_JJ / np.outer(length_J, length_J) if cosine else gram_JJ / square_J[speaks_J].mean()
    counted_JJ = np.broadcast_to(target_J & speaks_J, gram_JJ.shape) & (self_term | ~np.eye(len(gram_JJ), dtype=bool))
    sums_J, counts_J = (relative_JJ * counted_JJ).sum(axis=1), counted_JJ.sum(axis=1)
    return np.where(speaks_J & (counts_J > 0), sums_J / np.maximum(counts_J, 1), NAN)


def domain_columns(advantages_PG: np.ndarray, domains_P: np.ndarray, count: int) -> np.ndarray:
    """Advantages (P, G, J) under which the gradient of the batch is that of each domain's mean over its own prompts.

    A_pgj = A_pg 1[p in j] P / P_j, with P_j the prompts of domain j in the batch; all 0 where there is none.
    """
    of_PJ = domains_P[:, None] == np.arange(count)
    share_J = of_PJ.mean(axis=0)
    return advantages_PG[:, :, None] * (of_PJ / np.where(share_J > 0, share_J, 1.0))[:, None, :]


def domain_means(values_PGK: np.ndarray, domains_P: np.ndarray, count: int) -> np.ndarray:
    """Means (J, K) over the samples of each domain that have a value; NaN where none has."""
    of_JPG = (domains_P == np.arange(count)[:, None])[:, :, None] & np.ones(values_PGK.shape[:2], dtype=bool)
    means_JK = [np.ma.filled(np.ma.masked_invalid(values_PGK[of_PG]).mean(axis=0), NAN) for of_PG in of_JPG]
    return np.array(means_JK).reshape(count, values_PGK.shape[2])


# --- step by step -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DomainRules:
    """What stays the same from step to step.

    Args:
        names: Of the J domains, in the order of their places; none where prompts have one source.
        config: How their weights come about.
        shares_K: The user's share of each objective, in a domain's weighted reward; their sum is 1.
    """

    names: Sequence[str]
    config: AnyDomains
    shares_K: Sequence[float]

    def table(self, values_J: np.ndarray) -> dict[str, float]:
        """By name; without those that have none, for which JSON has no number."""
        return {name: float(value) for name, value in zip(self.names, values_J, strict=True) if np.isfinite(value)}

    def vector(self, table: Mapping[str, float]) -> np.ndarray:
        """The other way round (J,)."""
        return np.array([table.get(name, NAN) for name in self.names])


UNDIVIDED = DomainRules((), FixedDomains(type="fixed"), ())


def domain_rules(config: Config) -> DomainRules:
    """Of a run."""
    weights = config.user_weights
    total = sum(weights.values())
    shares_K = [weights[name] / total for name in config.objectives]
    return DomainRules(list(config.train_domains), config.domains or FixedDomains(type="fixed"), shares_K)


@dataclass(frozen=True)
class DomainStep:
    """What a batch decided.

    Args:
        memory: To go on from, as JSON: tables by domain.
        factors_P: On the advantages of each prompt.
        metrics: Numbers to log.
    """

    memory: Mapping[str, Any]
    factors_P: np.ndarray
    metrics: Mapping[str, float]


def weigh_domains(
    rules: DomainRules, before: Mapping[str, Any], domains_P: np.ndarray, rewards_PGK: np.ndarray, gram_JJ: np.ndarray
) -> DomainStep:
    """The weights of the domains that act on a batch. A domain that says nothing new keeps its last score, or has none.

    Args:
        rules: The run's domains.
        before: Memory after the previous batch; empty before the first.
        domains_P: Place of the domain of each prompt.
        rewards_PGK: Scaled to [0, 1], larger is better; NaN where missing.
        gram_JJ: Inner products of the domains' gradients; of size 0 where there are none (yet).
    """
    config, count = rules.config, len(rules.names)
    weights_J = rules.vector(before["weights"] if before else config.weights or dict.fromkeys(rules.names, 1.0))
    weights_J = weights_J / weights_J.sum()
    memory, scores_J = {}, rules.vector(before.get("scores", {}))
    if isinstance(config, ExcessDomains):
        counted = np.flatnonzero(rules.shares_K)
        means_J = domain_means(rewards_PGK[:, :, counted], domains_P, count) @ np.array(rules.shares_K)[counted]
        memory, fresh_J = _excess(rules, config, before, means_J)
        scores_J = np.where(np.isfinite(fresh_J), fresh_J, scores_J)
    if isinstance(config, AlignmentDomains) and gram_JJ.size:
        target_J = np.isin(rules.names, config.target or rules.names)
        fresh_J = alignment(gram_JJ, target_J, config.cosine, config.self_term)
        scores_J = np.where(np.isfinite(fresh_J), fresh_J, scores_J)
    if not isinstance(config, FixedDomains) and np.isfinite(scores_J).any():
        known_J = np.where(np.isfinite(scores_J), scores_J, np.nanmean(scores_J))
        weights_J = exponentiated(weights_J, known_J, config.rate, config.smoothing)
    factors_P = prompt_factors(weights_J, domains_P)
    figures = {"weight": weights_J, "share": np.bincount(domains_P, minlength=count) / len(domains_P)}
    figures |= {} if isinstance(config, FixedDomains) else {config.type: scores_J}
    metrics = {f"domains/{n}/{key}": float(x) for key, xs in figures.items() for n, x in zip(rules.names, xs, strict=True)}
    memory = {**memory, "weights": rules.table(weights_J), "scores": rules.table(scores_J)}
    return DomainStep(memory, factors_P, metrics)


def _excess(
    rules: DomainRules, config: ExcessDomains, before: Mapping[str, Any], means_J: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Moving averages of the domains' rewards, the best that they have been, and the excess (J,)."""
    last_J, best_J = (rules.vector(before.get(key, {})) for key in ("values", "best"))
    moved_J = config.average * last_J + (1 - config.average) * means_J
    values_J = np.where(np.isnan(last_J), means_J, np.where(np.isnan(means_J), last_J, moved_J))
    best_J = np.fmax(best_J, values_J)
    reference_J = best_J if config.reference == "best" else rules.vector(config.reference)
    return {"values": rules.table(values_J), "best": rules.table(best_J)}, excess(reference_J, values_J)
