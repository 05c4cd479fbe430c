"""The quickstart from start to report, and the time to the first answer of the command line.

    python scripts/bench_quickstart.py [--rounds 3]

Everything runs in fresh processes. The last line is a JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def main() -> None:
    """Time the commands and print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures: dict[str, list[float]] = {"quickstart_s": [], "hypervolume_ratio": [], "help_s": [], "check_s": []}
    for i in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            figures["quickstart_s"].append(seconds("train", "--config", str(QUICKSTART), f"--output={run}", f"--seed={i}"))
            figures["hypervolume_ratio"].append(hypervolume_ratio(run))
        for _ in range(5):
            figures["help_s"].append(seconds("--help"))
            figures["check_s"].append(seconds("check", str(QUICKSTART)))
        print(f"round {i + 1}: " + "  ".join(f"{name} {values[-1]:.2f}" for name, values in figures.items()), flush=True)
    print(json.dumps({name: statistics.median(values) for name, values in figures.items()} | {"rounds": options.rounds}))


def seconds(*arguments: str) -> float:
    """Wall time of one `paretune` command."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "align.cli", *arguments],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"paretune {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return time.perf_counter() - start


def hypervolume_ratio(run: Path) -> float:
    """Hypervolume of a run's archive over that of the policy it started from."""
    from align.archive import Archive
    from align.build import objectives_of
    from align.load import load_config

    config = load_config(str(run / "config.json"))
    archive = Archive(run / "archive.jsonl", objectives_of(config), config.evaluation.reference)
    return archive.hypervolume() / archive.hypervolume(1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
