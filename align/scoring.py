"""Scoring by all processes together, with a circuit breaker: training waits for a reward that fails too often."""

import time
from collections.abc import Callable, Sequence

from accelerate import PartialState
from accelerate.utils import gather_object

from align.config import ScoringConfig
from align.missing import failing
from rewards.bus import RewardBus
from rewards.types import RewardMatrix, stack
from rollout.types import SampleGroup


def score_together(
    bus: RewardBus, groups: Sequence[SampleGroup], config: ScoringConfig, pause: Callable[[], None]
) -> tuple[RewardMatrix, RewardMatrix]:
    """Score this process's groups; where too much fails and may yet succeed, wait and score that again.

    Every process sees the values of all, so all of them wait or none does.

    Args:
        bus: Scores.
        groups: Of this process.
        config: What is too much; how long and how often to wait.
        pause: Called in all processes before the first wait.

    Returns:
        The matrix of this process, and that of all of them one below the other. Whether to go on with them is not
        decided here.
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
        if PartialState().is_main_process:
            again = f"trying again in {config.pause:g} s, for the {attempt + 1}. of {config.pauses} times"
            print(f"paused: {'; '.join(sentences.values())}; {again}", flush=True)
        time.sleep(config.pause)
        local = bus.score_again(groups, local, list(sentences))
    return local, gathered
