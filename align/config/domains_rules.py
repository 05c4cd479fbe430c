"""What several sources of prompts, and the weights of these domains, ask of each other and of the rest."""

from collections.abc import Collection

from align.config.base import unknown_name
from align.config.domains import AlignmentDomains, AnyDomains, ExcessDomains
from align.config.probe_rules import probe_problems
from align.config.sections import AnySource, Keys
from align.config.weighting import FromGradients, ProbeConfig


def domains_problems(config: Keys) -> list[str]:
    """Everything about domains that cannot be run as it stands."""
    problems = _mixture("prompts.train", config.prompts.train) + _mixture("prompts.evaluation", config.prompts.evaluation)
    evaluation = config.prompts.evaluation
    if evaluation is not None and evaluation.type == "mixture" and evaluation.shares:
        problems.append("prompts.evaluation.shares: every held-out prompt is evaluated: remove it")
    section = config.domains
    if section is None or problems:
        return problems
    if config.prompts.train.type != "mixture":
        return [
            f"domains.type={section.type}: one source of prompts has nothing to weigh: make prompts.train a mixture "
            "({type: mixture, sources: {NAME: ..., NAME: ...}}), or remove domains"
        ]
    return [*_names(section, list(config.train_domains)), *_elsewhere(config), *_gradients(config, section)]


def _mixture(key: str, source: AnySource | None) -> list[str]:
    if source is None or source.type != "mixture":
        return []
    problems = _table(f"{key}.shares", source.shares, source.sources)
    if len(source.sources) < 2:
        problems.append(f"{key}.sources: {list(source.sources)} is one source only: add another, or put it in {key} itself")
    return problems


def _names(section: AnyDomains, domains: Collection[str]) -> list[str]:
    problems = _table("domains.weights", section.weights, domains)
    if section.type == "fixed" and not section.weights:
        problems.append(f"domains.weights is missing: type fixed needs a weight of every domain ({', '.join(domains)})")
    if isinstance(section, ExcessDomains) and section.reference != "best":
        problems += _table("domains.reference", section.reference, domains)
        if not section.reference:
            problems.append("domains.reference names no domain: give a value of each, or take best")
    if isinstance(section, AlignmentDomains):
        unknown = [name for name in section.target if name not in domains]
        problems += [f"domains.target: {unknown_name('domain', name, domains)}" for name in unknown]
    return problems


def _table(key: str, table: Collection[str], domains: Collection[str]) -> list[str]:
    """A table that is given names every domain, and no other."""
    problems = [f"{key}: {unknown_name('domain', name, domains)}" for name in table if name not in domains]
    return problems + [f"{key} has no number for {name!r}: add it" for name in domains if table and name not in table]


def _elsewhere(config: Keys) -> list[str]:
    """Ways of training in which weights of domains have no place."""
    if config.rounds is not None:
        return ["domains: rounds have no advantages to weigh (shares of prompts.train do act): remove it"]
    if config.estimator.type == "dpg":
        return [
            "domains: estimator.type=dpg trains towards one distribution, which weights of its prompts would change: remove "
            "it, or take another estimator"
        ]
    return []


def _gradients(config: Keys, section: AnyDomains) -> list[str]:
    """What `alignment` needs beside what the scheme needs."""
    if not isinstance(section, AlignmentDomains):
        return []
    problems = []
    if not section.self_term and not section.target and len(config.train_domains) == 2:
        problems.append(
            "domains.self_term=false: without it two domains agree with each other equally, so that nothing moves: set it "
            "to true, or name one in domains.target"
        )
    if not isinstance(config.weighting, FromGradients):
        return problems + probe_problems(config)
    if section.probe != ProbeConfig():
        problems.append(
            f"domains.probe: weighting.type={config.weighting.type} measures gradients too, and one pass reads all: say how "
            "in weighting.probe, and remove this"
        )
    return problems
