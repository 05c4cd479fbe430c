"""What made a policy: runs that differ in nothing but their seed are runs of one method; what runs must have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config import Config
from align.config.base import Signal
from align.fronts.logs import Notes
from align.fronts.merged import Parent
from align.fronts.runs import Candidate
from align.runfolder import flatten

NO_METHOD = (  # what two runs of one method may differ in
    "seed", "evaluation.", "checkpoint.", "prompts.evaluation.", "rollout.engine.", "rollout.lookahead", "trl.report_to",
    "trl.logging_steps", "trl.run_name", "learner.micro_batch_size", "objectives.",
)  # fmt: skip
MEASURED = ("prompts.chat", "prompts.system", "rollout.max_tokens", "policy.dtype")
MAX_KEYS = 3  # that tell two methods of one label apart, where so few do


def name_methods(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Give candidates their method: type of weighting and its vector, or of merging, and what else tells methods apart."""
    names = _names({c.run: c.config for c in candidates if c.config and not c.method})
    names |= _names_of_merged(candidates)
    return [replace(c, method=c.method or names.get(c.run or c.group, "")) for c in candidates]


def _names(configs: Mapping[str, Config]) -> dict[str, str]:
    """Methods of runs."""
    identities = {run: _identity(config) for run, config in configs.items()}
    labels = {run: _label(config) for run, config in configs.items()}
    told = {}
    for run, identity in identities.items():
        rivals = [identities[other] for other, label in labels.items() if label == labels[run]]
        differing = {key for rival in rivals for key in rival.keys() | identity if rival.get(key) != identity.get(key)}
        told[run] = [f"{key}={identity[key]}" for key in sorted(differing & identity.keys())]
    short = {run: ", ".join([labels[run], *keys[:MAX_KEYS]]) for run, keys in told.items()}
    ambiguous = {short[a] for a in told for b in told if short[a] == short[b] and told[a] != told[b]}
    return {run: ", ".join([labels[run], *told[run]]) if name in ambiguous else name for run, name in short.items()}


def _names_of_merged(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Methods of merged models, by group: that of merging, and of the parents where these tell two apart."""
    merged = {c.group: c.merged for c in candidates if c.merged and not c.method}
    parents = [parent for m in merged.values() for parent in m.parents]
    configs = {c.run: c.config for c in candidates if c.config} | {str(p.run): p.config for p in parents if p.config}
    names = _names(configs)
    steps: dict[str, set[int | None]] = {}
    for parent in parents:
        steps.setdefault(names.get(str(parent.run), parent.name), set()).add(parent.step)

    def called(parent: Parent) -> str:
        name = names.get(str(parent.run), parent.name)
        return f"{name}@{parent.step}" if len(steps[name]) > 1 else name

    of = {group: " + ".join(sorted(called(parent) for parent in m.parents)) for group, m in merged.items()}
    of = {group: f"{of[group]}, from {m.base}" if m.base else of[group] for group, m in merged.items()}
    kinds = {m.method: {of[group] for group, other in merged.items() if other.method == m.method} for m in merged.values()}
    return {group: f"{m.method} of {of[group]}" if len(kinds[m.method]) > 1 else m.method for group, m in merged.items()}


def _identity(config: Config) -> dict[str, Any]:
    flat = flatten(config.settled(exclude_defaults=True))
    length = {"steps": config.steps} if config.rounds is None else {"rounds.count": config.rounds.count}
    return {key: value for key, value in flat.items() if not key.startswith(NO_METHOD)} | length


def _label(config: Config) -> str:
    """Such as `fixed 0.5/0.3/0.2`: type, and the user's weights in the order of the objectives, divided by their sum."""
    weights = config.weighting.weights
    total = sum(weights.values()) or 1.0
    vector = "/".join(f"{weights.get(name, 0.0) / total:.3g}" for name in config.objectives)
    return f"{config.weighting.type} {vector}" if weights else config.weighting.type


def check_objectives(candidates: Sequence[Candidate]) -> None:
    """Raise ValueError, naming runs, objective and values, unless all runs have the same objectives and bounds."""
    runs = {c.run: c.config for c in candidates if c.config}
    first, *others = runs.items() if runs else [("", None)]
    way_out = "; compare runs of the same objectives, or say by --config FILE on which ones to evaluate them all"
    for run, config in others:
        mine, theirs = first[1].objectives, config.objectives
        if list(mine) != list(theirs):
            raise ValueError(f"{first[0]} has the objectives {', '.join(mine)}, and {run} has {', '.join(theirs)}{way_out}")
        for name in mine:
            for key in ("bounds", "direction", "reward", "args"):
                a, b = (getattr(objectives[name], key) for objectives in (mine, theirs))
                if a != b:
                    shown = [list(x) if isinstance(x, tuple) else x for x in (a, b)]
                    raise ValueError(
                        f"objectives.{name}.{key} is {shown[0]} in {first[0]} and {shown[1]} in {run}: their values "
                        f"cannot be compared{way_out}"
                    )


def note_differences(candidates: Sequence[Candidate], config: Config, notes: Notes) -> None:
    """Note what runs were trained with otherwise than they are evaluated, and which have seen the prompts before.

    Args:
        candidates: The policies.
        config: That they are evaluated by.
        notes: Gets the sentences.
    """
    runs = {c.run: c.config for c in candidates if c.config}
    here = {Path(run).resolve() for run in runs}
    parents = [p for c in candidates if c.merged for p in c.merged.parents if p.config]
    runs |= {str(p.run): p.config for p in parents if p.run.resolve() not in here}
    wanted = flatten(config.model_dump(mode="json"))
    for run, other in runs.items():
        flat = flatten(other.model_dump(mode="json"))
        keys = [key for key in wanted if key.startswith(MEASURED) and key in flat and flat[key] != wanted[key]]
        for key in keys:
            notes.add(f"{run} has {key}={flat[key]}; it is evaluated with {wanted[key]}")
    prompts = config.prompts.evaluation
    seen = [run for run, other in runs.items() if other.prompts.evaluation == prompts and _has_looked(other)]
    if seen:
        some = ", ".join(seen[:3]) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "")
        notes.add(
            f"{some}: checkpoints were kept, or weights moved, by values on these very prompts; an evaluation source that "
            "no run has seen (--prompts.evaluation=...) measures without that advantage"
        )


def _has_looked(config: Config) -> bool:
    """Whether held-out values had a say in the run."""
    return bool(config.evaluation.every) and (config.checkpoint.keep_front or Signal.VALIDATION in config.weighting.needs)
