"""What the keys of self-training ask of each other and of the rest."""

from collections.abc import Sequence

from align.config.base import unknown_name
from align.config.sections import Keys
from align.config.selftrain import AnyPromptWeights, AnyWeights, SelftrainConfig

OF_VALUES = ("entropy", "trajectory", "tilt")  # weights that look at what trusted samples have not: values, and a group
OF_THE_TERM = ("filter", "weights", "pool")


def describe_selftrain(config: Keys) -> list[str]:
    """What self-training keeps and how it weighs that, in one line; none without it."""
    section = config.selftrain
    if section is None:
        return []
    kept = [f"{name} {word} {x:g}" for name, x, word in section.filter.thresholds]
    kept += [word for word in ("majority", "nondominated") if getattr(section.filter, word)]
    parts = [f"of {', '.join(kept) or 'all samples'}", f"weights {_types(section.weights)}"]
    if section.term:
        parts.append(f"a term of {section.term.samples} samples times {section.term.coefficient:g}")
    if section.prompts:
        parts.append(f"prompts by {_types(section.prompts)}")
    return ["; ".join(parts)]


def _types(entries: Sequence[AnyWeights | AnyPromptWeights]) -> str:
    return " x ".join(entry.type for entry in entries) or "equal"


def selftrain_problems(config: Keys) -> list[str]:
    """Everything about self-training that cannot be run as it stands."""
    section = config.selftrain
    if section is None:
        return []
    problems = [
        f"{key}: {unknown_name('objective', name, config.objectives)}"
        for key, names in _named(section).items()
        for name in names
        if name not in config.objectives
    ]
    problems += _out_of_bounds(config, section)
    problems += _place(config, section)
    problems += _entries("selftrain.weights", section.weights) + _entries("selftrain.prompts", section.prompts)
    for i, weights in enumerate(section.weights):
        key = f"selftrain.weights[{i}]"
        if weights.type == "feasible" and weights.rate * weights.leak >= 2:
            problems.append(f"{key}: rate={weights.rate} times leak={weights.leak} is not below 2: lower one of them")
        if weights.type == "importance" and weights.form == "rank" and weights.share * section.cap < 1:
            problems.append(
                f"{key}: to have mean one, the share={weights.share:g} that is kept needs weights of "
                f"{1 / weights.share:.3g}, above selftrain.cap={section.cap:g}: raise one of them"
            )
        if weights.type == "importance" and weights.form == "rank" and weights.share < section.least_ess:
            problems.append(
                f"{key}: the share={weights.share:g} that is kept is below selftrain.least_ess={section.least_ess:g}, so "
                "the weights would always be given up: raise share, or lower least_ess"
            )
        if weights.type in OF_VALUES and section.pool.seeds:
            problems.append(
                f"{key}: {weights.type} weights look at what samples of selftrain.pool.seeds have not, values or a group: "
                "remove one of the two"
            )
        problems += _missing(config, section, key, weights)
    if sum(weights.type == "feasible" for weights in section.weights) > 1:
        problems.append("selftrain.weights: a sample has one multiplier, and feasible is here twice: remove one")
    return problems


def _out_of_bounds(config: Keys, section: SelftrainConfig) -> list[str]:
    """Thresholds and means that no value of their objective can have."""
    tables = {"selftrain.filter.at_least": section.filter.at_least, "selftrain.filter.at_most": section.filter.at_most}
    for i, weights in enumerate(section.weights):
        if weights.type == "tilt":
            tables[f"selftrain.weights[{i}].means"] = weights.means
    problems = []
    for key, table in tables.items():
        for name, value in table.items():
            low, high = config.objectives[name].bounds if name in config.objectives else (value, value)
            if not low <= value <= high:
                problems.append(f"{key}.{name}: {value:g} is outside the bounds [{low:g}, {high:g}] of the objective")
    return problems


def _place(config: Keys, section: SelftrainConfig) -> list[str]:
    """Weights that act nowhere, or where they cannot."""
    if config.rounds is not None:
        used = _given(section, ("term", "prompts", "pool"))
        return [f"selftrain.{name}: rounds have no updates by advantages that it could act on: remove it" for name in used]
    if section.term is None and not section.prompts:
        return [
            "selftrain: nothing here trains on the policy's samples: add selftrain.term (to the loss of every update), "
            "selftrain.prompts (weights on the advantages), or `rounds`"
        ]
    if section.term is None:
        used = _given(section, OF_THE_TERM)
        return [f"selftrain.{name}: it is about what selftrain.term draws from: add that, or remove it" for name in used]
    return []


def _given(section: SelftrainConfig, names: Sequence[str]) -> list[str]:
    """Those that differ from their defaults."""
    return [name for name in names if getattr(section, name) != type(section).model_fields[name].default]


def _entries(key: str, entries: Sequence[AnyWeights | AnyPromptWeights]) -> list[str]:
    """A shuffle that is not of all others."""
    problems = []
    for i, weights in enumerate(entries):
        if weights.type == "shuffled" and i + 1 < len(entries):
            problems.append(f"{key}[{i}]: shuffled deals out the weights of the others: put it last")
        elif weights.type == "shuffled" and i == 0:
            problems.append(f"{key}[{i}]: there are no other weights to shuffle: put some before it, or take uniform")
    return problems


def _missing(config: Keys, section: SelftrainConfig, key: str, weights: AnyWeights) -> list[str]:
    """Values that weights need, that may be missing, and that no threshold asks for."""
    if weights.type not in ("trajectory", "tilt") or config.rounds is not None:  # rounds leave such samples out
        return []
    needed = weights.means if weights.type == "tilt" else weights.returns or config.objectives
    asked = section.filter.at_least.keys() | section.filter.at_most.keys()
    return [
        f"{key}: {weights.type} needs every value of {name!r}, and objectives.{name}.missing="
        f"{config.objectives[name].missing} lets samples pass without: let selftrain.filter ask for one (at_least the worst "
        "will do), or set missing to fail"
        for name in needed
        if name in config.objectives and config.objectives[name].missing != "fail" and name not in asked
    ]


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
