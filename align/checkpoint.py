"""Checkpoints: what TRL does not save, which ones are complete, and which ones to keep. Imports no torch."""

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.files import replace_text

STATE_FILE = "paretune.json"  # written last: a checkpoint without it was cut off and does not count


@dataclass(frozen=True)
class RunState:
    """What a run needs, besides TRL's own files, to go on as if it had not stopped.

    Args:
        step: Optimiser steps taken.
        micro_step: Forward and backward passes taken, TRL's place within a batch of samples.
        processes: Number of learner processes.
        fingerprint: Of the configuration, see `Config.fingerprint`.
        weighting: State of the weighting scheme, as JSON.
        gram: Inner products of the objectives' gradients (K, K) that wait for the next batch; empty when there are none.
        watch: What the watch for reward hacking remembers, as JSON.
        duals: Multipliers of the samples in the pool, in their order; empty when there are none.
        pooled: Samples that have passed, and joined `pool.jsonl`.
    """

    step: int
    micro_step: int
    processes: int
    fingerprint: str
    weighting: dict[str, Any]
    gram: list[list[float]] = field(default_factory=list)
    watch: dict[str, Any] = field(default_factory=dict)
    duals: list[float] = field(default_factory=list)
    pooled: int = 0


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint of a step; TRL's."""
    return f"checkpoint-{step}"


def write_state(checkpoint: Path, state: RunState) -> None:
    """Mark a checkpoint complete."""
    replace_text(checkpoint / STATE_FILE, json.dumps(asdict(state), allow_nan=False))


def read_state(checkpoint: Path) -> RunState:
    """The state of a complete checkpoint. Raises ValueError when there is none, or it is not readable."""
    file = checkpoint / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a complete checkpoint: it has no {STATE_FILE}")
    try:
        return RunState(**json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint, oldest first."""
    found = [(int(p.parent.name.rpartition("-")[2]), p.parent) for p in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    return sorted(found)


def prune(folder: Path, keep: int, also: Collection[int]) -> None:
    """Delete checkpoints but the newest `keep` and those of the steps in `also`."""
    for step, path in complete_checkpoints(folder)[:-keep]:
        if step not in also:
            (path / STATE_FILE).unlink()  # first, so that a half-deleted one does not count as complete
            shutil.rmtree(path)
