"""`paretune front`: evaluates policies, and says which of them make the front and what the methods are worth."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.build import objectives_of
from align.config import Config
from align.engine import check_engine
from align.fronts.compute import Measured, front_of, measured
from align.fronts.evaluation import Wanted, evaluate_all
from align.fronts.files import table_of, write_files
from align.fronts.logs import Notes
from align.fronts.methods import check_objectives, name_methods, note_differences
from align.fronts.runs import Candidate, find_candidates
from align.load import load_config


@dataclass(frozen=True)
class Asked:
    """What a command asks for; the options of `paretune front`."""

    targets: Sequence[str]
    config: str
    checkpoints: str
    output: Path
    cache: Path
    seeds: Sequence[int]
    validation: int
    test: int
    overrides: Sequence[str]


def front(asked: Asked) -> int:
    """Write the front and print its tables. Raises ValueError for what the user can mend."""
    found, _ = make_front(asked)
    print(table_of(found))
    print(f"{asked.output}: front.json, front.csv, front.md, front.png, front.html")
    return 0


def make_front(asked: Asked) -> tuple[dict[str, Any], Measured]:
    """Evaluate what is not in the cache, compute, and write the files.

    Raises:
        ValueError: A policy or the configuration cannot be used, or policies cannot be compared.
    """
    notes = Notes()
    candidates = find_candidates(asked.targets, asked.checkpoints, notes)
    config = _config(asked, candidates)
    check_engine(config)
    candidates = name_methods(candidates)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    wanted = Wanted(config, asked.seeds, asked.validation, asked.test)
    found = evaluate_all([c.path for c in candidates], wanted, asked.cache)
    said = len(notes)
    for note in found.notes:
        notes.add(note)
    note_differences(candidates, config, notes)
    data = measured(candidates, found, config)
    front = front_of(data, found, config, asked.seeds, notes)
    for note in notes[said:]:
        print(f"note: {note}", file=sys.stderr)
    write_files(asked.output, front, data)
    from align.fronts.page import write_page
    from align.fronts.picture import draw  # matplotlib takes a second to import

    draw(asked.output / "front.png", front, objectives_of(config))
    write_page(asked.output / "front.html", front)
    return front, data


def _config(asked: Asked, candidates: Sequence[Candidate]) -> Config:
    """That of --config, or of the first run: then all runs must have its objectives."""
    if asked.config:
        return load_config(asked.config, asked.overrides)
    runs = [c.run for c in candidates if c.run]
    if not runs:
        raise ValueError(f"{asked.targets[0]} is no run folder, so the objectives and prompts must come from --config FILE")
    check_objectives(candidates)
    return load_config(str(Path(runs[0]) / "config.json"), asked.overrides)
