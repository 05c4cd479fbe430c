"""The files of a front: front.json, front.csv, front.md, and the vectors that choosing from it again needs."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.files import replace_text, replacing
from align.fronts.compute import FORMAT, PARTS, XS, Measured

FRONT, VECTORS = "front.json", "vectors.npz"
INDICATOR_NAMES = {
    "hypervolume": "hypervolume",
    "igd_plus": "IGD+",
    "epsilon": "additive epsilon",
    "expected_utility": "expected utility",
}


def write_files(folder: Path, front: Mapping[str, Any], data: Measured) -> None:
    """Write all but the picture, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.array([c.id for c in data.candidates])
    with replacing(folder / VECTORS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, ids=ids, validation=data.validation_MPK, test=data.test_MPK)
    replace_text(folder / "front.csv", csv_of(front))
    replace_text(folder / "front.md", table_of(front))
    replace_text(folder / FRONT, json.dumps(front, indent=1, allow_nan=False) + "\n")


def read_front(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """front.json (or its folder) with the raw values (M, P, K) of the validation and of the test prompts.

    Raises:
        ValueError: It is no front, or its vectors are not there or belong to another one.
    """
    file = path / FRONT if path.is_dir() else path
    try:
        front = json.loads(file.read_text(encoding="utf-8"))
        if front["format"] != FORMAT:
            raise ValueError(
                f"{file} has the format {front['format']}, this is for {FORMAT}: make it again by paretune front"
            )
        ids = [point["id"] for point in front["points"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a front that paretune front has written: {error!r}") from error
    try:
        with np.load(file.with_name(VECTORS)) as arrays:
            there, validation, test = arrays["ids"].tolist(), arrays["validation"], arrays["test"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file.with_name(VECTORS)} cannot be read: run paretune front again ({error})") from error
    if there != ids:
        raise ValueError(f"{file.with_name(VECTORS)} belongs to another front than {file}: run paretune front again")
    return front, validation, test


# --- tables -----------------------------------------------------------------------------------------------------------


def csv_of(front: Mapping[str, Any]) -> str:
    """One row per point; empty where there is no number."""
    names = [o["name"] for o in front["objectives"]]
    rows = []
    for point in front["points"]:
        row = {key: point[key] for key in ("id", "method", "seed", "step", *XS, "on_front", "on_test_front", "path")}
        for part in PARTS:
            for name in names:
                row[f"{part}/{name}"] = point[part]["values"][name]
                row[f"{part}/{name}/standard_error"] = point[part]["standard_errors"][name]
                row[f"{part}/{name}/missing"] = point[part]["missing"][name]
        row |= {f"weight/{name}": point["weights"].get(name) for name in names}
        rows.append(row | {"merged": merged_from(point)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table_of(front: Mapping[str, Any]) -> str:
    """Markdown: the points, the methods, and what is to be said."""
    names = [o["name"] for o in front["objectives"]]
    counts = front["prompts"]
    titles = [
        f"{o['name']} ({'larger' if o['direction'] == 'maximize' else 'smaller'} is better)" for o in front["objectives"]
    ]
    points = [
        [p["id"], p["method"], "front" if p["on_front"] else "", *(_measure(p["test"], name) for name in names)]
        for p in sorted(front["points"], key=lambda p: not p["on_front"])
    ]
    methods = [
        [m["method"], str(m["runs"]), *(_interval(m[key]) for key in INDICATOR_NAMES)]
        for m in sorted(front["methods"], key=lambda m: -(m["hypervolume"]["mean"] or 0))
    ]
    merged = [f"* {p['id']} = {_cell(merged_from(p))}" for p in front["points"] if p.get("parents")]
    bias = front["selection_bias"]
    lines = [
        f"# Front of {len(front['points'])} policies",
        "",
        f"Chosen on {counts['validation']} validation prompts; means ± one standard error on {counts['test']} others, the "
        f"test prompts, with sampling seeds {', '.join(map(str, front['seeds']))}.",
        "",
        *_table(["policy", "method", "chosen", *titles], points),
        "",
        f"## Methods, with {front['level']:.0%} intervals",
        "",
        *_table(["method", "runs", *INDICATOR_NAMES.values()], methods),
        "",
        "Of IGD+ and epsilon, which are distances to the front of all policies, smaller is better.",
        "",
        *_dominance(front),
        f"The front chosen on validation has a hypervolume of {_number(bias['hypervolume_on_validation'])} on test. "
        f"Choosing on test would have reported {_number(bias['hypervolume_on_test'])}, with a bias of about "
        f"{_number(bias['bias'])}.",
        *(["", "## Merged models", "", *merged] if merged else []),
        *(["", "## Notes", "", *(f"* {_cell(note)}" for note in front["notes"])] if front["notes"] else []),
    ]
    return "\n".join(lines) + "\n"


def merged_from(point: Mapping[str, Any]) -> str:
    """What a merged model is made of; "" for others."""
    return " + ".join(f"{c:g} × {name}" for name, c in point["weights"].items() if c) if point.get("parents") else ""


def _dominance(front: Mapping[str, Any]) -> list[str]:
    """The likeliest cases of one method dominating another."""
    pairs = sorted((d for d in front["dominates"] if d["probability"] >= 0.5), key=lambda d: -d["probability"])
    if not pairs:
        return []
    rows = [[d["a"], d["b"], f"{d['probability']:.2f}"] for d in pairs[:20]]
    title = "Where a run of one method dominates a run of another with a probability of one half or more:"
    return [title, "", *_table(["method", "dominates", "probability"], rows), ""]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_cell(cell) for cell in row] for row in rows]
    head = [[_cell(title) for title in titles], ["---"] * len(titles)]
    return [f"| {' | '.join(row)} |" for row in head + cells]


def _cell(text: str) -> str:
    """Nothing in a name breaks a table."""
    return " ".join(text.replace("|", "\\|").split())


def _measure(part: Mapping[str, Any], name: str) -> str:
    value, error, missing = (part[key][name] for key in ("values", "standard_errors", "missing"))
    if value is None:
        return "missing"
    share = f" ({missing:.1%} missing)" if missing else ""
    return f"{_number(value)} ± {_number(error)}{share}"


def _interval(found: Mapping[str, Any]) -> str:
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(number: float | None) -> str:
    return "?" if number is None or not math.isfinite(number) else f"{number:.3f}"
