"""Does it help to weight self-made samples? RL alone against RL with a self-training term, by the weights of its samples.

    python -m scripts.study_selftrain [--task built-in] [--output runs/study-selftrain] [--seeds 0 1 2 3 4] [--jobs 2]
    GSM8K=/folder/of/its/jsonl/files python -m scripts.study_selftrain --task gsm8k ...

The task is that of configs/quickstart.yaml, or the expressions of GSM8K, with accuracy and brevity weighted 0.6 and 0.4.
Every variant draws the same number of samples and begins with the same policy; those with a term learn from their own right
answers besides. Trusted samples are 64 worked answers to training prompts. Complete runs are not run again. Prints Markdown
tables: means with 95 % intervals (Student's t) over seeds, and differences seed by seed; the last line is a JSON object.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from align.archive import read_points
from align.load import load_config
from rewards.arithmetic import worked_steps
from rollout.arithmetic import expressions, gsm8k_expressions
from scripts.study_schemes import ROOT, interval, markdown, train_once

WEIGHTS = {"accuracy": 0.6, "brevity": 0.4}
OBJECTIVES = {
    "accuracy": {"reward": "arithmetic_accuracy"},
    "brevity": {"reward": "brevity", "args": {"max_tokens": 32}},
}
CONFIGS = {"built-in": "quickstart.yaml", "gsm8k": "gsm8k_expressions.yaml"}
STEPS = {"built-in": 40, "gsm8k": 80}  # the first is learned by then
TRUSTED = 64
ENTROPY = {"type": "entropy", "power": 1.0}
VARIANTS: dict[str, list[str] | None] = {  # the weights of the term; None has no term
    "RL alone": None,
    "+ uniform": [],
    "+ entropy": ["entropy"],
    "+ importance, rank": ["rank"],
    "+ importance, weight": ["weight"],
    "+ entropy and importance": ["entropy", "rank"],
    "+ the same, shuffled": ["entropy", "rank", "shuffled"],
}
COMMON = (
    f"--objectives={json.dumps(OBJECTIVES)}",
    f"--weighting={json.dumps({'type': 'fixed', 'weights': WEIGHTS})}",
    "--evaluation.samples_per_prompt=2",
    "--checkpoint.every=1000",
    "--checkpoint.keep_front=false",
)


def main() -> None:
    """Run what is missing, then print the tables and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=CONFIGS, default="built-in")
    parser.add_argument("--output", type=Path, default=Path("runs/study-selftrain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="names of variants")
    options, overrides = parser.parse_known_args()
    folder = (options.output / options.task).resolve()
    trusted = write_trusted(folder, options.task)
    work = [(name, seed) for seed in options.seeds for name in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: run(*job, options.task, folder, trusted, overrides), work))
    found = {name: [r for (n, _), r in zip(work, runs, strict=True) if n == name] for name in options.only}
    tables = [ends(found), differences(found)]
    print("\n\n".join(markdown(table) for table in tables if table))
    print(json.dumps({"task": options.task, "seeds": options.seeds, "tables": tables}))


def write_trusted(folder: Path, task: str) -> Path:
    """A file of worked answers to training prompts; the path of it."""
    if task == "built-in":
        rows = expressions(split="train", count=TRUSTED, seed=1)
    else:
        rows = gsm8k_expressions(**load_config(str(ROOT / "configs" / CONFIGS[task])).prompts.train.args)
        rows = [rows[i] for i in np.random.default_rng(1).choice(len(rows), TRUSTED, replace=False)]
    lines = [
        {"prompt": row["prompt"], "completion": ";".join([*worked_steps(row["expression"]), f"#{row['answer']}"])}
        for row in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trusted.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def section(weights: list[str], trusted: Path) -> dict:
    """`selftrain` with those weights."""
    entries = {
        "entropy": ENTROPY,
        "rank": {"type": "importance", "trusted": str(trusted), "share": 0.8},
        "weight": {"type": "importance", "trusted": str(trusted), "form": "weight"},
        "shuffled": {"type": "shuffled"},
    }
    chosen = [entries[name] for name in weights]
    term = {"coefficient": 0.1, "samples": 32}
    return {"filter": {"at_least": {"accuracy": 1.0}}, "weights": chosen, "term": term}


def run(name: str, seed: int, task: str, output: Path, trusted: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Train one variant unless it is complete; held-out means of every evaluation, and their weighted sum."""
    folder = output / f"{name.replace('+ ', '').replace(', ', '-').replace(' ', '-')}-seed{seed}"
    weights, steps = VARIANTS[name], STEPS[task]
    extra = [] if weights is None else [f"--selftrain={json.dumps(section(weights, trusted))}"]
    given = [f"--seed={seed}", f"--steps={steps}", f"--evaluation.every={steps // 4}", *COMMON, *extra, *overrides]
    train_once(folder, ROOT / "configs" / CONFIGS[task], given)
    points = [{o: point.values[o] for o in OBJECTIVES} for point in read_points(folder / "archive.jsonl")]
    return [point | {"sum": sum(WEIGHTS[o] * point[o] for o in OBJECTIVES)} for point in points]


def summary(points: list[dict[str, float]]) -> dict[str, float]:
    """What one run is judged by: its last policy, and the mean of the weighted sum over all evaluations after the first."""
    return {**points[-1], "sum on the way": float(np.mean([point["sum"] for point in points[1:]]))}


def ends(found: dict[str, list]) -> list[dict]:
    """Last policies: mean and interval of each figure."""
    rows = []
    for name, runs in found.items():
        figures = [summary(points) for points in runs]
        rows.append({"variant": name} | {key: interval([f[key] for f in figures]) for key in figures[0]})
    return rows


def differences(found: dict[str, list]) -> list[dict]:
    """The same less those of RL alone and of uniform weights, seed by seed."""
    rows = []
    for name, other in [(n, o) for o in ("RL alone", "+ uniform") for n in found if o in found and n not in ("RL alone", o)]:
        pairs = [(summary(a), summary(b)) for a, b in zip(found[name], found[other], strict=True)]
        rows.append(
            {"variant": name, "less": other} | {key: interval([a[key] - b[key] for a, b in pairs]) for key in pairs[0][0]}
        )
    return rows


if __name__ == "__main__":
    main()
