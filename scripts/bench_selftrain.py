"""Step time with self-training against that without it: with an empty pool, and by the size of the term.

    python scripts/bench_selftrain.py [--cycles 40]

One run of the built-in task takes a step of each kind in turn, in an order that is drawn anew each time, so that whatever
else the machine does falls on all alike; ratios are of steps of one turn, and their median is printed with its 95%
bootstrap interval, of CPU time and of wall time. `--kinds without,empty` compares these alone. The last line is JSON.
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
KINDS = ("without", "empty", *map(str, SIZES))
TRL = {"learning_rate": 1e-7, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "use_cpu": True}


def main() -> None:
    """Run, and print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=40)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    seconds, tokens = measure(options.cycles + WARM_UP, kinds)
    figures = {}
    for clock, by_kind in seconds.items():
        without, *others = (np.array(by_kind[kind][WARM_UP:]) for kind in kinds)
        for kind, taken in zip(kinds[1:], others, strict=True):
            figures[f"{clock}/{kind}"] = interval(taken / without)
            print(f"{clock:<5} {kind:<6} {figures[f'{clock}/{kind}'][0]:.3f} x  {figures[f'{clock}/{kind}'][1:]}")
            if kind != "empty" and clock == "cpu":
                drawn, extra = np.mean(tokens[kind][WARM_UP:]), np.median(taken - without)
                figures[f"microseconds_per_token/{kind}"] = 1e6 * extra / drawn
                print(f"{kind} samples, {drawn:.0f} tokens: {1e3 * extra:.1f} ms, {1e6 * extra / drawn:.1f} us a token")
    print(json.dumps(figures))


def interval(ratios: np.ndarray) -> list[float]:
    """Median, and the 95% bootstrap interval of it."""
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(ratios, len(ratios))) for _ in range(2000)]
    return [round(float(value), 4) for value in (np.median(ratios), *np.quantile(medians, [0.025, 0.975]))]


def measure(cycles: int, kinds: Sequence[str]) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[int]]]:
    """Seconds of every step, by clock and kind, turn by turn; tokens that every draw had, by its size."""
    from transformers import TrainerCallback

    from align.plan import Schedule
    from align.runfolder import open_run
    from align.selftrain.pool import Pool
    from align.selftrain.training import Draw
    from align.train import build, build_learner

    rng = np.random.default_rng(0)
    order = [kinds[i] for _ in range(cycles) for i in rng.permutation(len(kinds))]
    steps = len(order)
    section = {"filter": {"at_least": {"accuracy": 1}}, "weights": ["entropy"], "term": {"samples": SIZES[0]}}
    seconds: dict[str, dict[str, list[float]]] = {clock: {kind: [] for kind in kinds} for clock in ("cpu", "wall")}
    tokens: dict[str, list[int]] = {kind: [] for kind in kinds}

    class Turns(TrainerCallback):
        """Makes the next step one of the next kind."""

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            kind = order[state.global_step]
            learner._drawn = Draw()
            learner._selftrain = None if kind == "without" else base
            learner.rollouts._config = plain if kind == "without" else learner.parts.config  # log-probabilities or none
            learner._pool = Pool(base.pool, []) if kind == "empty" else full
            if kind == "empty":
                impossible = base.filter.model_copy(update={"at_least": {"accuracy": 2.0}})
                learner._selftrain = base.model_copy(update={"filter": impossible})
            elif kind != "without":
                learner._selftrain = base.model_copy(update={"term": base.term.model_copy(update={"samples": int(kind)})})
            self.start = {"cpu": time.process_time(), "wall": time.perf_counter()}

        def on_step_end(self, args, state, control, **kwargs) -> None:
            kind = order[state.global_step - 1]
            seconds["cpu"][kind].append(time.process_time() - self.start["cpu"])
            seconds["wall"][kind].append(time.perf_counter() - self.start["wall"])
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
        plain = learner.parts.config.model_copy(update={"selftrain": None})
        learner.train()
    return seconds, tokens


def tokens_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Tokens of prompts and completions."""
    return sum(len(prompt) + len(completion) for prompt, completion in pairs)


if __name__ == "__main__":
    main()
