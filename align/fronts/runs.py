"""Which policies a front is made of: run folders, checkpoints, and model folders of whatever origin. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.build import BUILT_IN_POLICIES, base_model, is_adapter, locate_model
from align.checkpoint import STATE_FILE, checkpoint_name, complete_checkpoints
from align.config import Config
from align.fronts.fingerprint import WEIGHTS, has_tokenizer, hub_commit
from align.fronts.logs import Notes, json_of, read_log, samples_by, seconds_by, tokens_by
from align.fronts.merged import Merged, merged_of
from align.load import load_config

HALF = "go on with the run by --resume, or leave it away"


@dataclass(frozen=True)
class Candidate:
    """A policy that may be on the front.

    Args:
        id: Names it in tables, unlike all others.
        path: Folder or hub name of its weights.
        group: The run that it is a point of: a run folder, or what a model folder is one point of.
        run: Run folder; "" for policies from elsewhere.
        method: What made it; runs of one method differ in nothing but the seed.
        step: Optimiser steps it had seen.
        seed: Training seed.
        samples: Training samples drawn until then.
        tokens: Tokens of prompts and completions until then.
        seconds: Wall-clock time until then.
        weights: Those in force, by objective; of a merged model its coefficients, by parent.
        config: Of its run.
        merged: What a merged model is made of.
    """

    id: str
    path: str
    group: str
    run: str = ""
    method: str = ""
    step: int | None = None
    seed: int | None = None
    samples: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    weights: Mapping[str, float] | None = None
    config: Config | None = None
    merged: Merged | None = None


def find_candidates(targets: Sequence[str], checkpoints: str, notes: Notes) -> list[Candidate]:
    """The policies that the arguments of a command name; those named twice once.

    Args:
        targets: Each a run folder, a checkpoint, a model folder, a folder of model folders (the points of one run), a hub
            name or `builtin:...`; with `LABEL=` in front of it to name the method.
        checkpoints: Of a run folder: `last`, `all`, or steps with commas, 0 being the policy it started from.
        notes: Gets what was passed over.

    Raises:
        ValueError: One of them is none of these, is half-written, or cannot be used.
    """
    found: dict[str, Candidate] = {}
    for target in targets:
        label, path = _labelled(target)
        for candidate in _candidates(path, checkpoints, notes):
            named = replace(candidate, method=label) if label else candidate
            key = f"{named.path} {named.method if label else named.run}"
            found.setdefault(key if named.step == 0 or label else named.path, named)
    for candidate in found.values():
        check_policy(candidate.path)
    return list(found.values())


def _labelled(target: str) -> tuple[str, str]:
    label, equals, path = target.partition("=")
    return (label, path) if equals and label and not Path(target).exists() else ("", target)


def _candidates(target: str, checkpoints: str, notes: Notes) -> list[Candidate]:
    path = Path(target).expanduser()
    name = str(path) if path.exists() else target
    if is_run(path):
        return _of_run(path, checkpoints, notes)
    if path.parent.name == "checkpoints" and is_run(path.parent.parent) and path.is_dir():
        if not (path / STATE_FILE).is_file():
            raise ValueError(f"{path} is a half-written checkpoint: it has no {STATE_FILE}; take another, or {HALF}")
        return _of_run(path.parent.parent, path.name.rpartition("-")[2], notes)
    if _is_model(path):
        return [_of_model(path, name, name, _name_of(path), notes)]
    children = sorted(path.iterdir()) if path.is_dir() else []
    inner = [child for child in children if _is_model(child) and not child.name.startswith(".")]  # those are half-written
    if inner:
        return [_of_model(child, f"{name}/{child.name}", name, _name_of(path), notes) for child in inner]
    if path.is_dir():
        raise ValueError(
            f"{target} is neither a run folder, nor a model folder, nor a folder of such: it has no config.json"
        )
    try:
        located = locate_model(target)
    except ValueError as error:
        kinds = "a run folder, a checkpoint, a model folder, a hub name such as Qwen/Qwen3-0.6B, nor builtin:"
        raise ValueError(f"there is no {target}: it is neither {kinds}{BUILT_IN_POLICIES[0]}") from error
    return [Candidate(target, located, group=target, method=target)]


def _of_model(path: Path, name: str, group: str, method: str, notes: Notes) -> Candidate:
    """A model folder; all that were merged from the same parents are points of one run, wherever they lie."""
    merged = merged_of(path)
    if merged is None:
        return Candidate(name, str(path), group, method=method)
    weights, spent = merged.weights, merged.spent(notes)
    return Candidate(name, str(path), merged.family, seed=merged.seed, **spent, weights=weights, merged=merged)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return any((folder / name).is_file() for name in ("environment.json", "metrics.jsonl")) or (
        "objectives" in json_of(folder / "config.json")
    )


def _is_model(folder: Path) -> bool:
    return is_adapter(str(folder)) or ((folder / "config.json").is_file() and not is_run(folder))


def _name_of(path: Path) -> str:
    return path.resolve().name


def check_policy(path: str) -> None:
    """Raise ValueError unless a policy has weights and a tokenizer, and the model that LoRA weights belong to is there."""
    folder = Path(path)
    base = base_model(path)
    if base != path and not Path(base).is_dir() and (base.startswith(("/", ".", "~")) or base.count("/") != 1):
        raise ValueError(
            f"{path} holds LoRA weights of {base}, which is not there: put it back, or correct base_model_name_or_path in "
            "its adapter_config.json"
        )
    for place in dict.fromkeys((path, base)):
        if not Path(place).is_dir() and not hub_commit(place, "main") and _offline():
            raise ValueError(
                f"{place} is not in the local cache, and HF_HUB_OFFLINE forbids to download it: unset that, download it "
                f"(hf download {place}), or give a folder"
            )
    if not folder.is_dir():
        return
    if not any(True for pattern in WEIGHTS[:4] for _ in folder.glob(pattern)):
        raise ValueError(
            f"{path} has no weights (*.safetensors or pytorch_model*.bin): it is half-written, or no model folder"
        )
    if not has_tokenizer(folder) and base == path:
        raise ValueError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer_config.json, ...): copy these files from the model that it "
            "was trained from"
        )


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


# --- run folders ------------------------------------------------------------------------------------------------------


def _of_run(run: Path, checkpoints: str, notes: Notes) -> list[Candidate]:
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is a half-written run: it has no config.json; {HALF}")
    config = load_config(str(run / "config.json"))
    saved = {step: str(path) for step, path in complete_checkpoints(run / "checkpoints")}
    for path in sorted((run / "checkpoints").glob("checkpoint-*")):
        if path.is_dir() and not (path / STATE_FILE).is_file():
            notes.add(f"{path} is half-written and was passed over")
    metrics, timings = (read_log(run / name, notes) for name in ("metrics.jsonl", "timings.jsonl"))
    reached = max((row["step"] for row in metrics), default=0)
    if reached < config.steps:
        notes.add(f"{run} stands at step {reached} of {config.steps}")
    found = []
    for step in _steps(run, checkpoints, saved):
        path = saved[step] if step else locate_model(config.policy.model)
        found.append(
            Candidate(
                id=f"{run}@{step}",
                path=path,
                group=str(run),
                run=str(run),
                step=step,
                seed=config.seed,
                samples=samples_by(run, config, step),
                tokens=tokens_by(metrics, step),
                seconds=seconds_by(timings, step),
                weights=_weights(config, metrics, step),
                config=config,
            )
        )
    return found


def _steps(run: Path, checkpoints: str, saved: Mapping[int, str]) -> list[int]:
    if checkpoints == "all":
        return [0, *saved]
    if not saved and checkpoints != "0":
        raise ValueError(f"{run} is a half-written run: it has no complete checkpoint ({checkpoint_name(0)[:-1]}N); {HALF}")
    if checkpoints == "last":
        return [max(saved)]
    chosen = []
    for text in checkpoints.split(","):
        if not text.strip().isdigit() or int(text) not in {0, *saved}:
            raise ValueError(f"--checkpoints: {run} has none of step {text!r}; it has {', '.join(map(str, [0, *saved]))}")
        chosen.append(int(text))
    return chosen


def _weights(config: Config, metrics: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Weights in force at a step: as logged, else the user's, divided by their sum."""
    for row in metrics:
        logged = {name: row.get(f"weights/{name}") for name in config.objectives}
        if row["step"] == step and all(value is not None for value in logged.values()):
            return logged
    total = math.fsum(config.user_weights.values()) or 1.0
    return {name: config.user_weights.get(name, 0.0) / total for name in config.objectives}
