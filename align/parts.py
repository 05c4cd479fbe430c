"""What a learner is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from align.archive import Archive
from align.build import PromptSets
from align.config import Config
from align.plan import Plan, Schedule
from align.runlog import RunFiles
from align.selftrain.sources import Sources
from align.step import StepRules
from rewards.bus import RewardBus


@dataclass(frozen=True)
class Parts:
    """What a learner is made of.

    Args:
        config: The resolved configuration.
        plan: Batch arithmetic.
        schedule: Says at which steps the policy is evaluated and saved.
        rules: Objectives, scheme, estimator and combination.
        prompts: To train on, and held out.
        bus: Scores samples.
        tokenizer: The policy's.
        model: Folder or hub name of the policy.
        files: Where this process writes.
        archive: Evaluated points.
        sources: What self-training needs.
        stop: Whether this process was asked to stop.
    """

    config: Config
    plan: Plan
    schedule: Schedule
    rules: StepRules
    prompts: PromptSets
    bus: RewardBus
    tokenizer: PreTrainedTokenizerBase
    model: str
    files: RunFiles
    archive: Archive
    sources: Sources
    stop: Callable[[], bool]
