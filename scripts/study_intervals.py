"""How often do the intervals of a front hold the truth? A simulation in which it is known.

    python -m scripts.study_intervals [--repetitions 2000] [--seeds 1 2 3 4 5] [--resamples 400]

The world of `tests/front_world.py`: three and five training seeds of two methods, whose policies lie below those of a third,
80 prompts. The truth is what further runs of the method are worth on average, without the noise of prompts. Prints a
Markdown table with standard errors, of all repetitions of all seeds; what each seed gives goes to stderr.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from align.fronts.statistics import INDICATORS, RESAMPLES
from scripts.study_schemes import markdown
from tests.front_world import SEEDS_MATTER, coverage


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the prompts, in each repetition")
    options = parser.parse_args(arguments)
    found = []
    for seed in options.seeds:
        found.append(coverage(SEEDS_MATTER, np.random.default_rng(seed), options.repetitions, options.resamples))
        print(
            f"seed {seed}:",
            {" ".join(map(str, key)): float(share) for key, share in found[-1].items()},
            file=sys.stderr,
            flush=True,
        )
    total = options.repetitions * len(found)
    shares = {key: sum(shares[key] for shares in found) / len(found) for key in found[0]}
    rows = [
        {"covered, %": name} | {f"{runs} runs": _percent(shares[name, runs], total) for runs in SEEDS_MATTER.runs[1:]}
        for name in INDICATORS
    ]
    print(markdown(rows))


def _percent(share: float, repetitions: int) -> str:
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / repetitions) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
