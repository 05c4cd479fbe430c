"""What evaluates one finished policy after another: engine, rewards and held-out prompts, in one process."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.build import PromptSets, base_model, build_bus
from align.config import Config
from align.engine import open_engine
from align.evaluate import Evaluation, Score, evaluate
from align.loaded import LoadedPolicy
from align.push import Pusher
from align.scoring import score_together
from rollout.sampler import RolloutError, Sampler, SamplingParams
from rollout.types import Prompt


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the policy that it was given last."""

    loaded: LoadedPolicy
    sampler: Sampler
    pusher: Pusher
    score: Score

    def take(self, path: str, version: int) -> None:
        """Put the policy of a folder or hub name in the place of the one before; each gets a version of its own."""
        self.loaded.load(path)
        self.pusher.push(version)

    def evaluate(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> Evaluation:
        """Sample and score some of the prompts; `step` is written into the rows."""
        return evaluate(self.sampler, self.score, prompts, params, step)


@contextmanager
def open_evaluator(
    config: Config, prompts: PromptSets, tokenizer: PreTrainedTokenizerBase, first: str, folder: Path
) -> Iterator[Evaluator]:
    """Start what evaluates policies of one architecture and tokenizer, for the time of the block.

    Args:
        config: Says which engine, rewards and numbers.
        prompts: Held-out ones to evaluate on.
        tokenizer: Of the policies.
        first: One of the policies; servers start with the model that it is or belongs to.
        folder: Logs of servers go there.

    Raises:
        ValueError: A policy or reward cannot be had, or the engine samples with none of the weights.
    """
    with closing(build_bus(config, prompts.columns)) as bus, ExitStack() as stack:
        score = partial(score_together, bus, config=config.scoring, pause=lambda: None, stop=lambda: False)
        try:
            engine = open_engine(config, prompts, tokenizer, base_model(first), folder)
            stack.callback(engine.close)
            loaded = LoadedPolicy(config, first, tokenizer.eos_token_id)
            sampler = stack.enter_context(closing(engine.sampler(loaded)))
            pusher = Pusher(config, prompts.evaluation, len(tokenizer), loaded, sampler)
            yield Evaluator(loaded, sampler, pusher, score)
        except RolloutError as error:
            raise ValueError(f"{error} (--rollout.engine=transformers samples without servers)") from error
