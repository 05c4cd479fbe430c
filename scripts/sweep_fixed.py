"""What fixed weights lead to: one run per weight vector, and where its policy ends.

    python scripts/sweep_fixed.py [--output runs/sweep] [--seeds 0] [--prompts 512] [--key=value ...]
    python scripts/sweep_fixed.py --config FILE --weights 0.4/0.6 1/0 [--output DIR] [--seeds 0 1 2] [--key=value ...]

Without a configuration it is the conflict of the built-in task. Runs that are complete are not run again, and one that was
stopped goes on. Any key of the configuration can be overridden. Prints a Markdown table of held-out means with standard
errors over prompts, which begins with the policy before any training; the last line is a JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT_IN = str(ROOT / "configs" / "quickstart.yaml")
WEIGHTS = (  # accuracy, brevity, clarity
    "0.2/0.8/0",
    "0.35/0.65/0",
    "0.4/0.6/0",
    "0.42/0.58/0",
    "0.44/0.56/0",
    "0.46/0.54/0",
    "0.5/0.5/0",
    "0.8/0.2/0",
    "0.6/0.2/0.2",
)


def main() -> None:
    """Run the sweep and print the table and the JSON object."""
    options, overrides = parse()
    names = objectives(options.config)
    chosen = {text: weights_of(text, names) for text in options.weights}
    output = Path(options.output)
    counted = [f"--prompts.evaluation.args.count={options.prompts}"] if options.prompts else []
    rows = []
    for seed in options.seeds:
        for text, weights in chosen.items():
            folder = train(output / f"{text.replace('/', '-')}-seed{seed}", options.config, weights, seed, overrides)
            if not rows:
                rows.append({"weights": "before", "seed": "", **evaluate(folder, "0", counted)})
            rows.append({"weights": text, "seed": seed, **evaluate(folder, "last", counted)})
    print(table(rows, names))
    spans = {name: max(r["values"][name] for r in rows) - min(r["values"][name] for r in rows) for name in names}
    print(json.dumps({"span": spans, "rows": rows}))


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what overrides the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=BUILT_IN)
    parser.add_argument("--weights", nargs="+", help="numbers in the order of the objectives; those left out are 0")
    parser.add_argument("--output", default="runs/sweep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prompts", type=int, help="held-out prompts of the last evaluation, where the source has a count")
    options, overrides = parser.parse_known_args()
    if options.config == BUILT_IN:
        options.weights, options.prompts = options.weights or WEIGHTS, options.prompts or 512
        overrides = ["--evaluation.every=40", *overrides]
    elif not options.weights:
        parser.error("--weights: with --config the weights have to be given")
    return options, overrides


def objectives(config: str) -> list[str]:
    """Names of a configuration's objectives, in its order."""
    import yaml

    return list(yaml.safe_load(Path(config).read_text(encoding="utf-8"))["objectives"])


def weights_of(text: str, names: list[str]) -> dict[str, float]:
    """A weight for every objective, from text such as 0.4/0.6."""
    try:
        numbers = [float(number) for number in text.split("/")]
    except ValueError:
        numbers = []
    if not 0 < len(numbers) <= len(names):
        raise SystemExit(f"--weights {text}: give at most one number for each of {', '.join(names)}, as in 0.4/0.6")
    return dict.fromkeys(names, 0.0) | dict(zip(names, numbers, strict=False))


def train(folder: Path, config: str, weights: dict[str, float], seed: int, overrides: list[str]) -> Path:
    """Train with one weight vector, unless it is done already; the run's folder."""
    if (folder / "config.json").exists():
        paretune("train", "--resume", str(folder))
    else:
        fixed = f"--weighting={json.dumps({'type': 'fixed', 'weights': weights})}"
        paretune("train", "--config", config, f"--output={folder}", f"--seed={seed}", fixed, *overrides)
    return folder


def evaluate(folder: Path, checkpoint: str, overrides: list[str]) -> dict:
    """Held-out figures of a run's policy, evaluated once."""
    figures = folder / f"evaluated-{checkpoint}.json"
    if not figures.exists():
        paretune("eval", str(folder), "--checkpoints", checkpoint, "--json", str(figures), *overrides)
    return next(iter(json.loads(figures.read_text()).values()))


def paretune(*arguments: str) -> None:
    """One command of ours, in a process of its own; its output goes to the terminal's error stream."""
    subprocess.run([sys.executable, "-m", "align.cli", *arguments], stdout=sys.stderr, check=True)


def table(rows: list[dict], names: list[str]) -> str:
    """Markdown: weights, and mean ± standard error of every objective."""
    lines = [f"| weights ({', '.join(names)}) | seed | " + " | ".join(names) + " |", "|" + "---|" * (2 + len(names))]
    for row in rows:
        cells = [f"{row['values'][name]:.3f} ± {row['standard_errors'][name]:.3f}" for name in names]
        lines.append(f"| {row['weights'].replace('/', ' / ')} | {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
