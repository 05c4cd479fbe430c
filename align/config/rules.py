"""Rules that tie keys of the configuration together: what contradicts itself, as sentences for the user."""

import math
from collections.abc import Iterable, Mapping

from align.config.base import unknown_name
from align.config.domains_rules import domains_problems
from align.config.dpg_rules import dpg_problems
from align.config.lagrangian_rules import lagrangian_problems, posed
from align.config.probe_rules import probe_problems
from align.config.rollout_rules import rollout_problems
from align.config.rounds_rules import rounds_problems
from align.config.sections import Keys, ObjectiveConfig
from align.config.selftrain_rules import selftrain_problems
from align.config.weighting import Adaptive, FixedWeighting, FromGradients, ScheduleWeighting, Signal


def contradictions(config: Keys) -> list[str]:
    """Everything that cannot be run as it stands; each sentence names the key, the value and the way out."""
    problems = [
        *_weights(config),
        *_scheme(config),
        *_reference("evaluation.reference", config.evaluation.reference, config.objectives),
        *rollout_problems(config),
        *rounds_problems(config),
        *selftrain_problems(config),
        *domains_problems(config),
        *dpg_problems(config),
    ]
    if config.evaluation.every and config.prompts.evaluation is None:
        problems.append("prompts.evaluation is missing: name held-out prompts, or set evaluation.every to 0")
    if config.prompts.system and not config.prompts.chat:
        problems.append("prompts.system needs a chat template: set prompts.chat to true, or remove it")
    return problems


def describe(config: Keys) -> str:
    """The weighting of a run in one line, or the target that is trained towards in its place."""
    weighting, estimator = config.weighting, config.estimator
    if estimator.type == "dpg":
        moments = [f"{name} {moment:g} on average" for name, moment in estimator.moments.items()]
        return f"none: towards {', '.join([*moments, *(f'{name} always' for name in estimator.always)])}"
    if weighting.type == "lagrangian":
        problem = posed(config)
        held = [f"{name} {c.kind.replace('_', ' ')} {c.threshold}" for name, c in problem.constraints.items()]
        return f"{weighting.type}: optimise {problem.optimize}; {', '.join(held)}"
    weights = "  ".join(f"{name} {weight:g}" for name, weight in config.user_weights.items())
    return f"{weighting.type}: {weights}"


def describe_domains(config: Keys) -> list[str]:
    """The domains of a run in one line, with how often they are sampled and what weighs them; none where there are none."""
    if not config.train_domains:
        return []
    section = config.domains
    shares = "  ".join(f"{name} {share:.3g}" for name, share in config.train_domains.items())
    weights = ", ".join(f"{name} {weight:g}" for name, weight in section.weights.items()) if section else ""
    kind = section.type if section else "fixed"
    return [f"sampled {shares}; weights {kind}: {weights or 'equal'}{' at first' if kind != 'fixed' else ''}"]


def _weights(config: Keys) -> list[str]:
    weighting, names = config.weighting, list(config.objectives)
    required = isinstance(weighting, FixedWeighting | ScheduleWeighting)
    tables = {"weighting.weights": weighting.weights} if required or weighting.weights else {}
    if isinstance(weighting, ScheduleWeighting):
        tables |= {f"weighting.milestones[{i}].weights": m.weights for i, m in enumerate(weighting.milestones)}
    problems = []
    for key, weights in tables.items():
        problems += _unknown(key, weights, names)
        problems += [f"{key} gives no weight for {n!r}: add it (0 only watches it)" for n in names if n not in weights]
        problems += [f"{key}.{n}: {w} is negative; weights are shares, 0 or more" for n, w in weights.items() if w < 0]
        if weights and math.fsum(map(abs, weights.values())) == 0:
            problems.append(f"{key}: all weights are 0, so nothing would be trained; give at least one objective a share")
    return problems


def _scheme(config: Keys) -> list[str]:
    """What the weighting scheme asks of the rest."""
    weighting, problems = config.weighting, []
    shared = [name for name, share in config.user_weights.items() if share > 0]
    if Signal.VALIDATION in weighting.needs and not config.evaluation.every and weighting.type != "lagrangian":
        keys = [f"weighting.type={weighting.type}"]
        if weighting.type == "hypervolume_gradient":
            options = {"vector": "evaluation", "against": "archive", "reference": "initial"}
            keys = [f"weighting.{key}={value}" for key, value in options.items() if getattr(weighting, key) == value]
        problems.append(
            f"{' and '.join(keys)}: this looks at held-out vectors, but evaluation.every is 0: give a number of steps"
            + (", or take weighting.vector=batches" if keys == ["weighting.vector=evaluation"] else "")
        )
    if isinstance(weighting, Adaptive):
        if len(shared) < 2:
            problems.append(
                f"weighting.type={weighting.type} moves weight between objectives, but only {shared} has a share: give a "
                "second one a share in weighting.weights, or take weighting.type=fixed"
            )
        if shared and weighting.floor * len(shared) > 1:
            problems.append(f"weighting.floor={weighting.floor} times {len(shared)} objectives is more than 1: lower it")
        if shared and weighting.ceiling * len(shared) < 1:
            problems.append(f"weighting.ceiling={weighting.ceiling} times {len(shared)} objectives is less than 1: raise it")
    if weighting.type in ("hypervolume", "hypervolume_gradient") and weighting.reference != "initial":
        problems += _reference("weighting.reference", weighting.reference, config.objectives)
    if weighting.type == "covariance":
        for key in ("target", "cap"):
            if isinstance(table := getattr(weighting, key), dict):
                problems += _unknown(f"weighting.{key}", table, config.objectives)
                problems += [f"weighting.{key} has no number for {n!r}: add it" for n in shared if n not in table]
    if isinstance(weighting, FromGradients):
        problems += probe_problems(config)
    if weighting.type == "lagrangian":
        problems += lagrangian_problems(config)
    return problems


def _reference(key: str, reference: Mapping[str, float], objectives: Mapping[str, ObjectiveConfig]) -> list[str]:
    problems = _unknown(key, reference, objectives)
    for name, value in reference.items():
        if name in objectives and not _leaves_room(value, objectives[name]):
            problems.append(
                f"{key}.{name}: {value} leaves nothing above it within the bounds {list(objectives[name].bounds)}: "
                "choose a value at or near the worst one"
            )
    return problems


def _unknown(key: str, table: Iterable[str], names: Iterable[str]) -> list[str]:
    return [f"{key}: {unknown_name('objective', name, names)}" for name in table if name not in names]


def _leaves_room(reference: float, objective: ObjectiveConfig) -> bool:
    """Whether a reference value lies within the bounds and is not the best one."""
    low, high = objective.bounds
    return low <= reference < high if objective.direction == "maximize" else low < reference <= high
