"""What the logs of a run say was spent until a step. Imports no torch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config import Config
from align.plan import make_plan


class Notes(list[str]):
    """Sentences about what was left out or is not as one may think; each once."""

    def add(self, note: str) -> None:
        """Add a sentence unless it is there."""
        if note not in self:
            self.append(note)


def json_of(file: Path) -> Mapping[str, Any]:
    """A table in a JSON file; empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_log(path: Path, notes: Notes) -> list[dict[str, Any]]:
    """Rows of a log; a line that cannot be read is left out, and its number noted."""
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row.get("step"), int):
                raise ValueError("it has no step")
            rows.append(row)
        except (ValueError, AttributeError):
            notes.add(f"skipped line {number} of {path}: it is not a row of a log")
    return rows


def samples_by(run: Path, config: Config, step: int) -> int | None:
    """Samples that were drawn until a step; None where the run cannot have been as it says."""
    try:
        return make_plan(config, int(json_of(run / "environment.json").get("processes", 1))).samples_by(step)
    except ValueError:
        return None


def tokens_by(metrics: Sequence[Mapping[str, Any]], step: int) -> int | None:
    """Tokens of prompts and completions until a step; None where nobody counted."""
    counts = [row["num_tokens"] for row in metrics if row["step"] <= step and row.get("num_tokens") is not None]
    return int(max(counts)) if counts else (0 if step == 0 and metrics and "num_tokens" in metrics[0] else None)


def seconds_by(timings: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Wall-clock time until a step; None where nobody took it."""
    taken = [row["step_time"] for row in timings if row["step"] <= step and row.get("step_time") is not None]
    return math.fsum(taken) if taken or (step == 0 and timings) else None
