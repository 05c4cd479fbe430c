"""Scoring by all processes together, with a circuit breaker: training waits for a reward that fails too often."""

import time
from collections.abc import Callable, Sequence

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from align.config import ScoringConfig
from align.missing import MissingRewardError, failing
from rewards.bus import RewardBus
from rewards.types import RewardMatrix, stack
from rollout.types import SampleGroup


def score_together(
    bus: RewardBus,
    groups: Sequence[SampleGroup],
    config: ScoringConfig,
    pause: Callable[[], None],
    stop: Callable[[], bool],
) -> tuple[RewardMatrix, RewardMatrix]:
    """Score this process's groups; where too much fails and may yet succeed, wait and score that again.

    Every process sees the values of all, so all of them wait or none does.

    Args:
        bus: Scores.
        groups: Of this process.
        config: What is too much; how long and how often to wait.
        pause: Called in all processes before the first wait.
        stop: Whether this process was asked to stop; a wait ends then.

    Returns:
        The matrix of this process, and that of all of them one below the other. Whether to go on with them is not
        decided here.

    Raises:
        MissingRewardError: In all processes: one of them was asked to stop while all waited.
    """
    local = bus.score(groups)
    for attempt in range(config.pauses + 1):
        everywhere = gather_object([(local, bus.may_recover())])
        gathered = stack([matrix for matrix, _ in everywhere])
        sentences = failing(gathered, config.max_failed)
        passing = set().union(*(names for _, names in everywhere))
        if not sentences or not passing.issuperset(sentences) or attempt == config.pauses:
            break
        if attempt == 0:
            pause()
        why = "; ".join(sentences.values())
        _say(f"paused: {why}; trying again in {config.pause:g} s ({attempt + 1} of {config.pauses})")
        if not _waited(config.pause, stop):
            raise MissingRewardError(f"stopped while the run waited for a reward: {why}")
        local = bus.score_again(groups, local, list(sentences))
    if attempt and not sentences:
        _say("all rewards are there again: the run goes on")
    return local, gathered


def _waited(seconds: float, stop: Callable[[], bool]) -> bool:
    """Wait, all processes together; False as soon as one of them was asked to stop."""
    end = time.monotonic() + seconds
    while not any(gather_object([stop()])):
        left = end - time.monotonic()
        if any(gather_object([left <= 0])):
            return True
        time.sleep(min(1.0, max(0.0, left)))
    return False


def _say(line: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(line)
