"""Step time with self-training against that without it: with an empty pool, and by the size of the term.

    python scripts/bench_selftrain.py [--cycles 40]

One run of the built-in task takes a step of each kind in turn, so that whatever else the machine does falls on all alike;
ratios are of neighbouring steps, and their median is printed with its 95% bootstrap interval, of CPU time and of wall time.
The last line is a JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # cycles not counted
SIZES = (32, 64, 128)
KINDS = ("without", "empty", *SIZES)
TRL = {"learning_rate": 1e-7, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "use_cpu": True}


def main() -> None:
    """Run, and print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=40)
    cycles = parser.parse_args().cycles + WARM_UP
    seconds, tokens = measure(cycles)
    figures = {}
    for clock in ("cpu", "wall"):
        table = np.array(seconds[clock]).reshape(cycles, len(KINDS))[WARM_UP:]
        for column, kind in enumerate(KINDS[1:], 1):
            figures[f"{clock}/{kind}"] = interval(table[:, column] / table[:, 0])
            print(f"{clock:<5} {kind!s:<6} {figures[f'{clock}/{kind}'][0]:.3f} x  {figures[f'{clock}/{kind}'][1:]}")
    table = np.array(seconds["cpu"]).reshape(cycles, len(KINDS))[WARM_UP:]
    extra = np.median(table - table[:, :1], axis=0)
    for column, size in enumerate(SIZES, 2):
        drawn = np.mean(tokens[size][WARM_UP:])
        figures[f"microseconds_per_token/{size}"] = 1e6 * extra[column] / drawn
        print(
            f"{size} samples, {drawn:.0f} tokens: {1e3 * extra[column]:.1f} ms, {1e6 * extra[column] / drawn:.1f} us a token"
        )
    print(json.dumps(figures))


def interval(ratios: np.ndarray) -> list[float]:
    """Median, and the 95% bootstrap interval of it."""
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(ratios, len(ratios))) for _ in range(2000)]
    return [round(float(value), 4) for value in (np.median(ratios), *np.quantile(medians, [0.025, 0.975]))]


def measure(cycles: int) -> tuple[dict[str, list[float]], dict[int, list[int]]]:
    """Seconds of every step, by clock, in the order of KINDS again and again; tokens that every draw had, by its size."""
    from transformers import TrainerCallback

    from align.plan import Schedule
    from align.runfolder import open_run
    from align.selftrain.pool import Pool
    from align.selftrain.training import Draw
    from align.train import build, build_learner

    steps = cycles * len(KINDS)
    section = {"filter": {"at_least": {"accuracy": 1}}, "weights": ["entropy"], "term": {"samples": SIZES[0]}}
    seconds: dict[str, list[float]] = {"cpu": [], "wall": []}
    tokens: dict[int, list[int]] = {size: [] for size in SIZES}

    class Turns(TrainerCallback):
        """Makes the next step one of the next kind."""

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            kind = KINDS[state.global_step % len(KINDS)]
            learner._drawn = Draw()
            learner._selftrain = None if kind == "without" else base
            learner._pool = Pool(base.pool, []) if kind == "empty" else full
            if kind == "empty":
                impossible = base.filter.model_copy(update={"at_least": {"accuracy": 2.0}})
                learner._selftrain = base.model_copy(update={"filter": impossible})
            elif kind in SIZES:
                learner._selftrain = base.model_copy(update={"term": base.term.model_copy(update={"samples": kind})})
            self.start = {"cpu": time.process_time(), "wall": time.perf_counter()}

        def on_step_end(self, args, state, control, **kwargs) -> None:
            seconds["cpu"].append(time.process_time() - self.start["cpu"])
            seconds["wall"].append(time.perf_counter() - self.start["wall"])
            kind = KINDS[(state.global_step - 1) % len(KINDS)]
            if kind in SIZES:
                tokens[kind].append(tokens_of(learner._drawn.pairs))

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"--output={folder}/run", f"--steps={steps}", "--evaluation.every=0", f"--trl={json.dumps(TRL)}",
            f"--selftrain={json.dumps(section)}",
        ]  # fmt: skip
        run = open_run(str(ROOT / "configs" / "quickstart.yaml"), "", overrides)
        run.folder.mkdir()
        learner = build_learner(run, build(run), Schedule(steps + 1, 0, steps + 1), [Turns()])
        base, full = learner.parts.config.selftrain, learner._pool
        learner.train()
    return seconds, tokens


def tokens_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Tokens of prompts and completions."""
    return sum(len(prompt) + len(completion) for prompt, completion in pairs)


if __name__ == "__main__":
    main()
