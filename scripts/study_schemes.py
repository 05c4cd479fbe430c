"""Do the schemes do their job? Every scheme and 7 fixed weight vectors on the built-in task, several seeds.

    python scripts/study_schemes.py [--output runs/study] [--seeds 0 1 2 3 4] [--jobs 2] [--only NAME ...] [--key=value ...]

Two objectives in conflict, accuracy and brevity. All runs have the same number of samples, evaluations, and the same
combination (each objective's advantage standardised over the batch, then the weighted sum), except where the name says
otherwise. Complete runs are not run again. Prints Markdown tables: mean and 95 % interval (Student's t) over seeds; the last
line is a JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from align.archive import hypervolume_share, read_points
from align.load import load_config

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = {
    "accuracy": {"reward": "arithmetic_accuracy"},
    "brevity": {"reward": "brevity", "args": {"max_tokens": 32}},
}
COMMON = (
    f"--objectives={json.dumps(OBJECTIVES)}",
    "--steps=160",
    "--evaluation.every=16",
    "--checkpoint.every=1000",
    "--checkpoint.keep_front=false",
    "--trl.learning_rate=1e-4",
)
THRESHOLD = 0.65  # accuracy that `lagrangian` is to hold
TOLERANCE = 0.05


def fixed(accuracy: float) -> dict:
    """A fixed weight vector."""
    return {"type": "fixed", "weights": {"accuracy": accuracy, "brevity": round(1 - accuracy, 3)}}


SWEEP = {f"fixed {a:g}/{1 - a:g}": fixed(a) for a in (0.8, 0.7, 0.675, 0.65, 0.625, 0.6, 0.5)}
SCHEMES = {
    "lagrangian": {
        "type": "lagrangian",
        "constraints": {"accuracy": {"at_least": THRESHOLD}},
        "optimize": "brevity",
    },
    "hypervolume": {"type": "hypervolume"},
    "hypervolume_gradient": {"type": "hypervolume_gradient", "vector": "batches"},
    "hypervolume_gradient, archive": {"type": "hypervolume_gradient", "against": "archive"},
    "gradient": {"type": "gradient"},
    "mgda": {"type": "mgda", "smoothing": 0.9},
    "normalize_then_sum": fixed(0.5),
    "schedule": {
        "type": "schedule",
        "weights": {"accuracy": 0.8, "brevity": 0.2},
        "milestones": [
            {"step": 40, "weights": {"accuracy": 0.66, "brevity": 0.34}},
            {"step": 160, "weights": {"accuracy": 0.54, "brevity": 0.46}},
        ],
    },
}


def main() -> None:
    """Run what is missing, then print the tables and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", default=[*SWEEP, *SCHEMES], help="names of variants")
    options, overrides = parser.parse_known_args()
    variants = {name: {**SWEEP, **SCHEMES}[name] for name in options.only}
    work = [(name, seed) for seed in options.seeds for name in variants]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: run(*job, variants[job[0]], options.output, overrides), work))
    results = {name: [r for (n, _), r in zip(work, runs, strict=True) if n == name] for name in variants}
    tables = [ends(results), *([fronts(results)] if set(SWEEP) <= set(results) else [])]
    print("\n\n".join(markdown(table) for table in tables))
    print(json.dumps({"seeds": options.seeds, "threshold": THRESHOLD, "tables": tables}))


def run(name: str, seed: int, weighting: dict, output: Path, overrides: list[str]) -> dict:
    """Train one variant unless it is complete; its archive, and its training means over the last fifth of the steps."""
    folder = output / f"{name.replace('/', '-').replace(', ', '-').replace(' ', '-')}-seed{seed}"
    combination = "normalize_then_sum" if name == "normalize_then_sum" else "estimate_then_sum"
    chosen = [f"--weighting={json.dumps(weighting)}", f"--combination={combination}"]
    train_once(folder, ROOT / "configs" / "quickstart.yaml", [f"--seed={seed}", *COMMON, *chosen, *overrides])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = lines[-len(lines) // 5 :]
    means = {o: float(np.mean([line[f"objectives/{o}/mean"] for line in last])) for o in OBJECTIVES}
    points = [[point.values[o] for o in OBJECTIVES] for point in read_points(folder / "archive.jsonl")]
    return {"last": means, "points": points}


def train_once(folder: Path, config: Path, overrides: list[str]) -> None:
    """Train, or go on, unless the run is complete; stops when the folder holds a run of other keys."""
    given = [*overrides, f"--output={folder}"]
    if not (folder / "config.json").exists():
        paretune("train", "--config", str(config), *given)
        return
    asked, held = (load_config(str(file), more) for file, more in ((config, given), (folder / "config.json", given[-1:])))
    different = [key for key in type(asked).model_fields if getattr(asked, key) != getattr(held, key)]
    if different:
        sys.exit(f"{folder} holds a run with other values of {', '.join(different)}: give the same, or another --output")
    if not (folder / "report.html").exists():  # written at the end of a run
        paretune("train", "--resume", str(folder))


def paretune(*arguments: str) -> None:
    """One command of ours, in a process of its own with one thread; its output is shown only when it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "align.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}")


def ends(results: dict) -> list[dict]:
    """Where each variant trains in its last fifth, how many seeds hold the threshold, and its archive's hypervolume."""
    rows = []
    for name, runs in results.items():
        accuracy, brevity = ([run["last"][o] for run in runs] for o in OBJECTIVES)
        held = sum(abs(a - THRESHOLD) <= TOLERANCE or a > THRESHOLD for a in accuracy)
        row = {"variant": name, "accuracy": interval(accuracy), "brevity": interval(brevity), "held": f"{held}/{len(runs)}"}
        volumes = [volume(run["points"]) for run in runs]
        against = [volume(run["points"]) for run in results.get("fixed 0.5/0.5", [])]
        rows.append(row | {"hypervolume": interval(volumes), "less equal weights": _difference(volumes, against)})
    return rows


def fronts(results: dict) -> list[dict]:
    """Share of the sweep's hypervolume (7 archives, or only their 7 last policies) that one run's archive has."""
    whole = [np.vstack([run["points"] for run in runs]) for runs in zip(*(results[n] for n in SWEEP), strict=True)]
    last = [np.vstack([run["points"][-1] for run in runs]) for runs in zip(*(results[n] for n in SWEEP), strict=True)]
    rows = []
    for name in results:
        volumes = [volume(run["points"]) for run in results[name]]
        row = {"one run of": name}
        for key, unions in {"of the sweep's archives": whole, "of its 7 last policies": last}.items():
            row[key] = interval([v / volume(union) for v, union in zip(volumes, unions, strict=True)])
        rows.append(row)
    return rows


def volume(points) -> float:
    """Hypervolume of points (accuracy, brevity), both from 0 to 1, above (0, 0)."""
    return hypervolume_share(np.array(points), np.zeros(len(OBJECTIVES)))


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


def _difference(values: list[float], against: list[float]) -> str:
    """Interval of the difference, seed by seed."""
    return interval([a - b for a, b in zip(values, against, strict=True)]) if len(values) == len(against) else ""


def markdown(rows: list[dict]) -> str:
    """A table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


if __name__ == "__main__":
    main()
