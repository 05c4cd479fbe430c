"""What the keys of self-training ask of each other and of the rest."""

from align.config.base import unknown_name
from align.config.sections import Keys
from align.config.selftrain import SelftrainConfig


def selftrain_problems(config: Keys) -> list[str]:
    """Everything about self-training that cannot be run as it stands."""
    section = config.selftrain
    if section is None:
        return []
    if config.rounds is None:
        return [
            "selftrain: nothing here trains on the policy's samples: add `rounds` and start `paretune rounds`, or remove it"
        ]
    problems = [
        f"{key}: {unknown_name('objective', name, config.objectives)}"
        for key, names in _named(section).items()
        for name in names
        if name not in config.objectives
    ]
    for i, weights in enumerate(section.weights):
        key = f"selftrain.weights[{i}]"
        if weights.type == "shuffled" and i + 1 < len(section.weights):
            problems.append(f"{key}: shuffled deals out the weights of the others: put it last")
        if weights.type == "shuffled" and i == 0:
            problems.append(f"{key}: there are no other weights to shuffle: put some before it, or take uniform")
        if weights.type == "feasible" and weights.rate * weights.leak >= 2:
            problems.append(f"{key}: rate={weights.rate} times leak={weights.leak} is not below 2: lower one of them")
    return problems


def _named(section: SelftrainConfig) -> dict[str, list[str]]:
    """Objectives that the section names, by key."""
    named = {
        "selftrain.filter.at_least": list(section.filter.at_least),
        "selftrain.filter.at_most": list(section.filter.at_most),
        "selftrain.answers": [] if section.answers is None else [section.answers],
    }
    for i, weights in enumerate(section.weights):
        if weights.type in ("trajectory", "tilt"):
            table = "returns" if weights.type == "trajectory" else "means"
            named[f"selftrain.weights[{i}].{table}"] = list(getattr(weights, table))
    return named
