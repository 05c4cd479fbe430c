"""Sampling with vLLM servers: speed, balance, weight pushes, lookahead, memory, and whether equal batches come out equal.

    python scripts/bench_rollout.py [--only throughput,transformers,balance,...] [--model 25m|shipped]

What is compared takes turns within one run, so that other work on the machine meets both; ratios are taken round by round.

throughput  One server through `VllmSampler`, against vLLM's offline class in a process of its own: the same requests, seeds,
            threads, cache and options; both make texts and log-probabilities. By wall time, and by processor time, which
            other work on the machine changes less. `even`: nothing stops a sample before `--tokens`. `uneven`: some
            tokens do, four times as many tokens at the latest.
transformers   The same against transformers' generation, which is slow where lengths are uneven: give few `--rounds`.
balance     Two servers, uneven prompts and completions: wall time against that of the same requests dealt out by hindsight
            (longest first, by true numbers of tokens), and against the mean time that a server had something to do.
            `at_once`: all samples are in flight from the start, as by default. `queued`: an eighth of them per server.
sync        A verified push of weights as a share of a whole step; TRL's `step_time`, also given, lacks the optimiser step.
lookahead   Steps whose sampling and whose training each sleep `--delay` seconds, with and without lookahead.
memory      Largest resident memory of every process: one learner, two under ZeRO-2, two under ZeRO-3, each with a server.
repeat      Equal batches: share of samples with other tokens, and the largest difference of log-probabilities before them.
resume      The quickstart twice, and once stopped half-way and resumed, on the same server: how far the runs differ.

Words go to stderr, and so does all else that is said; the last line of stdout is a JSON object. Times are in seconds.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `paretune` does

from scripts.bench_rollout_common import CORES, Setting, say

PARTS = {  # and the module that has them
    "throughput": "sampling",
    "transformers": "sampling",
    "balance": "sampling",
    "sync": "runs",
    "lookahead": "runs",
    "memory": "runs",
    "repeat": "sampling",
    "resume": "runs",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts one after another, and print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts, with commas")
    parser.add_argument("--model", choices=("25m", "shipped"), default="25m", help="25m: 26 million random weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of an even sample")
    parser.add_argument("--samples", type=int, default=256, help="of a batch")
    parser.add_argument("--delay", type=float, default=3.0, help="of lookahead: seconds slept per batch and per update")
    parser.add_argument("--device-note", default="", help="what the figures were taken on")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, what was started is stopped
    figures: dict[str, Any] = vars(options) | {"cores": CORES, "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        setting = Setting(options.model, options.rounds, options.tokens, options.samples, options.delay, Path(folder))
        for name in chosen:
            start = time.perf_counter()
            part = getattr(import_module(f"scripts.bench_rollout_{PARTS[name]}"), name)
            figures[name] = part(setting) | {"took": round(time.perf_counter() - start, 1)}
            say(f"{name}: {json.dumps(figures[name], indent=1)}")
    print(json.dumps(figures | {"load_after": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
