"""What the parts of `bench_rollout.py` share: the setting, local servers, and how figures are put together."""

import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from align.build import locate_model
from rollout.server import ServerOptions
from rollout.workers import LocalWorkers

ROOT = Path(__file__).resolve().parent.parent
GROUP = 8  # samples per prompt
CACHE_GIB = 1.5  # of every server: 256 sequences of the larger model take 1 GiB or a little more
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    model: str
    rounds: int
    tokens: int
    samples: int
    delay: float
    folder: Path

    @property
    def policy(self) -> str:
        """Folder of the policy; one of random weights is made when it is first asked for."""
        if self.model == "shipped":
            return locate_model("builtin:arithmetic")
        if not (self.folder / "policy").exists():
            from scripts.bench_probe import random_policy

            random_policy(self.folder, self.model)
        return str(self.folder / "policy")

    @property
    def context(self) -> int:
        """Tokens of a sequence: the shipped policy's, or a little more than the longest ones take."""
        return 256 if self.model == "shipped" else 8 * self.tokens + 32

    @property
    def longest(self) -> int:
        """Tokens of an uneven completion at most."""
        return min(4 * self.tokens, self.context // 2)

    @property
    def stop(self) -> list[int]:
        """Tokens that end an uneven sample: the shipped policy's own, or some, each as likely as the other 257."""
        return [256] if self.model == "shipped" else list(range(65, 73))


@contextmanager
def serve(setting: Setting, count: int) -> Iterator[LocalWorkers]:
    """Local servers of the policy, as a run starts them."""
    options = ServerOptions(
        model=setting.policy, revision="", dtype="float32", max_concurrent=256, max_model_len=setting.context,
        tensor_parallel=1, gpu_memory=0.9, cpu_cache_gib=CACHE_GIB, trust_remote_code=False, sync="directory", args={},
    )  # fmt: skip
    workers = LocalWorkers(options, count, setting.folder / "workers", [[]] * count)
    workers.start()
    with closing(workers):
        yield workers


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of two series, pair by pair."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def in_turn(names: Sequence[str], round_number: int) -> list[str]:
    """To and fro."""
    return list(names) if round_number % 2 == 0 else list(reversed(names))


def say(text: str) -> None:
    """To stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
