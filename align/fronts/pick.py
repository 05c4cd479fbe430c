"""`paretune pick`: names the policy that suits a wish best, says how sure that is, and exports it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from align.config import Config
from align.fronts.card import model_card
from align.fronts.choose import choose, make_wish, sentences
from align.fronts.compute import Measured, without_nan
from align.fronts.export import check_free, export_policy
from align.fronts.files import FRONT, read_front
from align.fronts.front import Asked, make_front
from align.fronts.runs import Candidate
from align.load import load_config
from rewards.types import Missing, Objective


def pick(asked: Asked, wishes: Sequence[str], export: str, json_path: str) -> int:
    """Choose, print, and export where a folder is named. Raises ValueError for what the user can mend.

    Args:
        asked: The runs, or one front that is there already.
        wishes: --prefer, --at-least, --at-most, --maximize, --minimize.
        export: Folder for the policy; "" for none.
        json_path: File for the figures; "" for none.
    """
    if export:
        check_free(Path(export))
    front, data = _stored(Path(asked.targets[0])) if is_front(asked.targets) else make_front(asked)
    wish = make_wish(*wishes, data)
    choice = choose(data, wish)
    chosen = data.candidates[choice.index]
    print("\n".join(sentences(choice, wish, data)))
    print(f"weights: {chosen.path}")
    if json_path:
        figures = asdict(choice) | {"id": chosen.id, "path": chosen.path, "wish": asdict(wish)}
        figures["best"] = {data.candidates[m].id: share for m, share in choice.best.items()}
        del figures["index"]
        Path(json_path).write_text(json.dumps(without_nan(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if export:
        config = Config.model_validate(front["config"])
        run = Path(chosen.run) / "config.json"
        of_run = load_config(str(run)) if chosen.run and run.is_file() else None
        export_policy(chosen.path, Path(export), model_card(front, data, choice, wish, of_run), of_run or config)
        print(f"exported to {export}")
    return 0


def is_front(targets: Sequence[str]) -> bool:
    """Whether the arguments are one front that was made before."""
    path = Path(targets[0])
    return len(targets) == 1 and (path.suffix == ".json" or (path / FRONT).is_file())


def _stored(path: Path) -> tuple[dict[str, Any], Measured]:
    front, validation_MPK, test_MPK = read_front(path)
    keys = ("id", "path", "run", "step", "method", "seed", "samples", "tokens", "seconds", "weights")
    candidates = [Candidate(group="", **{key: point[key] for key in keys}) for point in front["points"]]
    objectives = [_objective(o) for o in front["objectives"]]
    return front, Measured(candidates, objectives, front["reference"], _finite(validation_MPK), _finite(test_MPK))


def _objective(o: Mapping[str, Any]) -> Objective:
    return Objective(o["name"], o["direction"] == "maximize", tuple(o["bounds"]), Missing.NEUTRAL)


def _finite(values_MPK: np.ndarray) -> np.ndarray:
    """Infinite values are none."""
    return np.where(np.isfinite(values_MPK), values_MPK, np.nan)
