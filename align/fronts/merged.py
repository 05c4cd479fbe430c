"""What a merged model is made of: its merge.json, and the runs of its parents where they are there. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.config import Config
from align.files import MERGE_FILE
from align.fronts.logs import Notes, json_of, read_log, samples_by, seconds_by, tokens_by
from align.load import load_config


@dataclass(frozen=True)
class Parent:
    """A policy that a merged model is made of.

    Args:
        name: As merge.json has it.
        folder: Of its weights.
        coefficient: Its own.
        step: Of the checkpoint; None where it is no run's.
        run: Its run folder; None where it is no run's, or that is not there any more.
        samples: That were drawn to train it, as merge.json has them.
    """

    name: str
    folder: str
    coefficient: float
    step: int | None
    run: Path | None
    samples: int | None

    @cached_property
    def config(self) -> Config | None:
        """Of its run."""
        return load_config(str(self.run / "config.json")) if self.run else None


@dataclass(frozen=True)
class Merged:
    """A merged model: the method, its parents, and the model that they started from where that took part."""

    method: str
    parents: Sequence[Parent]
    base: str

    @property
    def weights(self) -> dict[str, float]:
        """Coefficients by the names of the parents."""
        found: dict[str, float] = {}
        for parent in self.parents:
            found[parent.name] = found.get(parent.name, 0.0) + parent.coefficient
        return found

    @property
    def family(self) -> str:
        """The same for all models of one merge, whatever their coefficients."""
        return " ".join([self.method, *sorted(parent.folder for parent in self.parents), self.base])

    @property
    def seed(self) -> int | None:
        """Training seed, where the parents of which it is known agree."""
        seeds = {parent.config.seed for parent in self.parents if parent.config}
        return next(iter(seeds)) if len(seeds) == 1 else None

    def spent(self, notes: Notes) -> dict[str, Any]:
        """Samples, tokens and seconds of the parents that take part, summed up; a run of two parents counts once."""
        last: dict[str, Parent] = {}
        for parent in self.parents:
            key = str(parent.run or parent.folder)
            if parent.coefficient and (parent.step or 0) >= (last.get(key, parent).step or 0):
                last[key] = parent
        costs = [_spent(parent, notes) for parent in last.values()]
        found = {}
        for key in costs[0]:
            parts = [cost[key] for cost in costs]
            found[key] = None if None in parts else sum(parts)
        return found


def merged_of(folder: Path) -> Merged | None:
    """What the merge.json of a model folder says; None where there is none that can be read."""
    record = json_of(folder / MERGE_FILE)
    try:
        parents = [_parent(row, float(c)) for row, c in zip(record["parents"], record["coefficients"], strict=True)]
        known = any(parent.coefficient for parent in parents)
        return Merged(str(record["method"]), parents, record["base"] or "") if known else None
    except (KeyError, TypeError, ValueError):
        return None


def _parent(row: Mapping[str, Any], coefficient: float) -> Parent:
    folder, step = Path(row["folder"]), row["step"]
    run = folder.parent.parent
    known = step is not None and folder.parent.name == "checkpoints" and (run / "config.json").is_file()
    return Parent(str(row["model"]), str(folder), coefficient, step, run if known else None, row["samples"])


def _spent(parent: Parent, notes: Notes) -> dict[str, Any]:
    if parent.run is None or parent.config is None:
        return {"samples": parent.samples, "tokens": None, "seconds": None}
    metrics, timings = (read_log(parent.run / name, notes) for name in ("metrics.jsonl", "timings.jsonl"))
    return {
        "samples": samples_by(parent.run, parent.config, parent.step) if parent.samples is None else parent.samples,
        "tokens": tokens_by(metrics, parent.step),
        "seconds": seconds_by(timings, parent.step),
    }
