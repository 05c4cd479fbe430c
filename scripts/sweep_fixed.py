"""The conflict of the built-in task: one run per fixed weight vector, and where its policy ends.

    python scripts/sweep_fixed.py [--output runs/sweep] [--seeds 0] [--prompts 512] [--key=value ...]

Runs that are complete are not run again, and one that was stopped goes on. Any key of the configuration can be overridden.
Prints a Markdown table of held-out means with standard errors; the last line is a JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("accuracy", "brevity", "clarity")
WEIGHTS = (  # accuracy, brevity, clarity
    (0.2, 0.8, 0.0),
    (0.35, 0.65, 0.0),
    (0.4, 0.6, 0.0),
    (0.42, 0.58, 0.0),
    (0.44, 0.56, 0.0),
    (0.46, 0.54, 0.0),
    (0.5, 0.5, 0.0),
    (0.8, 0.2, 0.0),
    (0.6, 0.2, 0.2),
)


def main() -> None:
    """Run the sweep and print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/sweep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, default=512, help="held-out prompts of the final evaluation")
    options, overrides = parser.parse_known_args()
    rows = [
        {"weights": weights, "seed": seed, **run(weights, seed, Path(options.output), options.prompts, overrides)}
        for seed in options.seeds
        for weights in WEIGHTS
    ]
    print(table(rows))
    spans = {name: max(r["values"][name] for r in rows) - min(r["values"][name] for r in rows) for name in OBJECTIVES}
    print(json.dumps({"span": spans, "rows": rows}))


def run(weights: tuple[float, ...], seed: int, output: Path, prompts: int, overrides: list[str]) -> dict:
    """Train with one weight vector, unless it is done already, and evaluate the last policy."""
    folder = output / ("-".join(f"{w:g}" for w in weights) + f"-seed{seed}")
    chosen = dict(zip(OBJECTIVES, weights, strict=True))
    if (folder / "config.json").exists():
        paretune("train", "--resume", str(folder))
    else:
        fixed = f"--weighting={json.dumps({'type': 'fixed', 'weights': chosen})}"
        config = str(ROOT / "configs" / "quickstart.yaml")
        paretune(
            "train", "--config", config, f"--output={folder}", f"--seed={seed}", fixed, "--evaluation.every=40", *overrides
        )
    figures = folder / "final.json"
    paretune("eval", str(folder), "--json", str(figures), f"--prompts.evaluation.args.count={prompts}")
    return next(iter(json.loads(figures.read_text()).values()))


def paretune(*arguments: str) -> None:
    """One command of ours, in a process of its own; its output goes to the terminal's error stream."""
    subprocess.run([sys.executable, "-m", "align.cli", *arguments], cwd=ROOT, stdout=sys.stderr, check=True)


def table(rows: list[dict]) -> str:
    """Markdown: weights, and mean ± standard error of every objective."""
    head = f"| weights ({', '.join(OBJECTIVES)}) | seed | " + " | ".join(OBJECTIVES) + " |"
    lines = [head, "|" + "---|" * (2 + len(OBJECTIVES))]
    for row in rows:
        cells = [f"{row['values'][name]:.3f} ± {row['standard_errors'][name]:.3f}" for name in OBJECTIVES]
        lines.append(f"| {' / '.join(f'{w:g}' for w in row['weights'])} | {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
