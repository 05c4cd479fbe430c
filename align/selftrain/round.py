"""One round of self-training as a page: sample, score, filter, choose, weigh, fine-tune, evaluate.

Every process holds all samples of a round, so that all choose, weigh and order them alike.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from align.archive import Archive, ParetoPoint
from align.build import PromptSets, objectives_of
from align.checkpoint import RunState, checkpoint_name, prune, write_state
from align.config import Config
from align.evaluate import evaluate
from align.learner_args import peft_config
from align.missing import apply_missing, refuse_missing
from align.plan import Plan
from align.rollouts import Rollouts
from align.runlog import RunFiles
from align.sampling import Place, evaluation_params, round_seed, training_params
from align.scoring import score_together
from align.selftrain.choose import Answers, Chosen, choose_pairs, choose_samples
from align.selftrain.filters import Passed, passing
from align.selftrain.policy_copy import PolicyCopy
from align.selftrain.rows import Batches, Pair, Row, dpo_rows, kto_rows, pairs_of, sft_rows
from align.selftrain.tuners import TunedLosses, fine_tune, tuner_config
from align.selftrain.weigh import Material, weigh
from align.selftrain.weights import Weights, answer_entropy
from align.step import objective_metrics
from align.summary import summarize
from align.together import together
from rewards.answers import Reader
from rewards.bus import RewardBus
from rollout.types import SampleGroup

_CHOICE, _WEIGHTS, _ORDER, _TUNING = range(4)  # what is drawn at random; the last is for new adapters and dropout


class RoundError(RuntimeError):
    """A round has nothing to train on; the message says why and what helps."""


@dataclass(frozen=True)
class RoundParts:
    """What the rounds of a run are made of.

    Args:
        config: The resolved configuration.
        plan: Batch arithmetic; a step of it is a round.
        prompts: To train on, and held out.
        bus: Scores samples.
        tokenizer: The policy's.
        model: Folder or hub name of the policy of round 0.
        folder: The run's.
        files: Where this process writes.
        archive: Evaluated points.
        options: Of TRL's configuration.
        reader: Finds the answer of a completion; None where no reward reads any.
        trusted: Tokens of trusted samples, by file.
    """

    config: Config
    plan: Plan
    prompts: PromptSets
    bus: RewardBus
    tokenizer: Any
    model: str
    folder: Path
    files: RunFiles
    archive: Archive
    options: Mapping[str, Any]
    reader: Reader | None
    trusted: dict[str, list[Pair]]


@dataclass(frozen=True)
class Batch:
    """The samples of a round, in the order of its prompts, the same in every process.

    Args:
        groups: P of them.
        raw_PGK: Values in raw units; NaN, all of them, for a sample that is left out.
        answers_PG: What each sample answers, None where it states nothing or is left out; with rewards that read no
            answers, each sample is an answer of its own.
    """

    groups: Sequence[SampleGroup]
    raw_PGK: np.ndarray
    answers_PG: Answers

    @property
    def left_out_PG(self) -> np.ndarray:
        """Mask of the samples that the missing-value policies leave out."""
        return np.isnan(self.raw_PGK).any(axis=2)

    def kept_answers(self, p: int) -> list[str | None]:
        """Of the samples of a prompt that are not left out."""
        return [answer for answer, out in zip(self.answers_PG[p], self.left_out_PG[p], strict=True) if not out]


class Rounds:
    """Goes through the rounds of a run; all processes call everything together.

    Args:
        parts: What they are made of.
        policy: Holds the weights of the round before, or of the start.
        rollouts: Samples with them.
    """

    def __init__(self, parts: RoundParts, policy: PolicyCopy, rollouts: Rollouts):
        self.parts = parts
        self._policy = policy
        self._rollouts = rollouts
        self._place = Place(PartialState().process_index, parts.plan.processes)
        self._score = partial(score_together, parts.bus, config=parts.config.scoring, pause=lambda: None, stop=lambda: False)
        self._timings: dict[str, float] = {}
        self._said: set[str] = set()

    def run(self, number: int) -> None:
        """One round, from the weights of the one before to evaluated ones of its own.

        Raises:
            RoundError: Nothing to train on.
            MissingRewardError, RolloutError: As in training.
        """
        start = time.perf_counter()
        batch, metrics = self._sample(number)
        chosen, figures = self._choose(number, batch)
        weights, more = self._weigh(number, batch, chosen)
        rows, batches = self._rows(number, batch, chosen, weights)
        losses = self._fine_tune(number, rows, batches)
        metrics |= figures | more | _loss_metrics(losses)
        _say(
            f"round {number:>4}  {metrics['rounds/kept']:.1%} of {batch.raw_PGK[..., 0].size} samples pass; {losses.steps} "
            f"steps on {len(chosen)}, effective share {weights.ess:.2f}; loss {losses.weighted:.4f}, unweighted "
            f"{losses.unweighted:.4f}"
        )
        self._save(number, metrics, time.perf_counter() - start)
        self.take(number)
        self.evaluate(number)

    # --- samples ------------------------------------------------------------------------------------------------------

    def _sample(self, number: int) -> tuple[Batch, dict[str, float]]:
        """Samples of this round's prompts and their values, and what is to be logged of them."""
        config, processes, start = self.parts.config, self._place.processes, time.perf_counter()
        size, objectives = config.rounds.prompts, objectives_of(config)
        order = self.parts.prompts.order(number * size, config.seed)[-size:]
        share = [self.parts.prompts.train[i] for i in order[self._place.process :: processes]]
        params = training_params(config, number - 1, self._place)
        params = replace(params, first=self._place.process, stride=processes, log_probs=False)
        self._rollouts.sync(number - 1)
        groups = together(lambda: self._rollouts.sampler.sample(share, params))
        self._timings["time/sampling"] = time.perf_counter() - start
        local, gathered = self._score(groups)
        self._timings["time/scoring"] = time.perf_counter() - start - self._timings["time/sampling"]
        refuse_missing(gathered, config.scoring.max_failed)
        self.parts.files.samples.write(number, groups, local, (), ())
        places = np.argsort(np.concatenate([np.arange(p, size, processes) for p in range(processes)]))
        everywhere = gather_object(groups)
        raw_PGK = gathered.raw_NK.reshape(size, params.samples_per_prompt, len(objectives))[places]
        raw_PGK = apply_missing(raw_PGK, objectives)
        answers = gather_object([_answers(self.parts.reader, group) for group in groups])
        answers_PG = [_of_kept(answers[i], raw_GK) for i, raw_GK in zip(places, raw_PGK, strict=True)]
        batch = Batch([everywhere[i] for i in places], raw_PGK, answers_PG)
        return batch, objective_metrics(gathered) | self._take_rollout_metrics()

    def _take_rollout_metrics(self) -> dict[str, float]:
        """How the weights reached the sampler, where they had to be sent; times go with the others."""
        figures = self._rollouts.take_metrics()
        self._timings |= {key: value for key, value in figures.items() if key.startswith("time/")}
        return {key: value for key, value in figures.items() if not key.startswith("time/")}

    # --- what is trained on, and how much each counts -----------------------------------------------------------------

    def _choose(self, number: int, batch: Batch) -> tuple[Chosen, dict[str, float]]:
        """What this round trains on. Raises RoundError when that is nothing."""
        config, rounds = self.parts.config, self.parts.config.rounds
        passed = _passed(config, batch)
        rng = np.random.default_rng(round_seed(config, number, _CHOICE))
        if rounds.method == "sft":
            chosen = choose_samples(passed.right_PG, rounds.mixed_only, rounds.per_prompt, rng)
        else:
            chosen = choose_pairs(passed.right_PG, batch.answers_PG, rng)
        if not len(chosen):
            raise RoundError(f"round {number}: {_why_nothing(rounds.method, passed)}")
        share = len(set(chosen.prompts)) / len(batch.groups)
        figures = {"kept": passed.right_PG.mean(), "prompts": share, "chosen": len(chosen)}
        if self.parts.reader is not None:
            figures["clusters"] = np.mean([len(set(batch.kept_answers(p))) for p in range(len(batch.groups))])
        return chosen, {f"rounds/{name}": float(value) for name, value in figures.items()}

    def _weigh(self, number: int, batch: Batch, chosen: Chosen) -> tuple[Weights, dict[str, float]]:
        """How much each of them counts: by its right sample and its prompt. Raises RoundError when that cannot be said."""
        config, where = self.parts.config, (list(chosen.prompts), list(chosen.right))
        entropies_n = np.array([answer_entropy(batch.kept_answers(p)) for p in chosen.prompts])
        pairs = pairs_of(batch.groups, chosen.prompts, chosen.right)
        everything, ones_n = np.arange(len(chosen)), np.ones(len(chosen))
        material = Material(
            objectives_of(config),
            batch.raw_PGK[where],
            everything,
            ones_n,
            entropies_n,
            self._losses,
            pairs,
            self.parts.trusted,
        )
        try:
            weighed = weigh(config.selftrain, material, number, round_seed(config, number, _WEIGHTS))
        except ValueError as error:
            raise RoundError(f"round {number}: {error}") from error
        weights = weighed.weights
        if weights.collapsed:
            _say(f"round {number:>4}  weights collapsed (effective share {weights.ess:.3f}): they are equal in this round")
        for name, line in weighed.missed.items():
            if name not in self._said:
                _say(f"round {number:>4}  {line}")
        self._said |= weighed.missed.keys()
        figures = {"ess": weights.ess, "collapsed": float(weights.collapsed)}
        figures |= {f"tilt/{name}": reached for name, reached in weighed.reached.items()}
        figures |= {"weight_mean": weights.values_n.mean(), "weight_max": weights.values_n.max()}
        if self.parts.reader is not None:
            figures["entropy"] = entropies_n.mean()
        return weights, {f"rounds/{name}": float(value) for name, value in figures.items()}

    def _log_probs(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Of whole completions under the policy as it is (S,), nats; every process scores its share."""
        place = self._place
        share = together(lambda: self._policy.completion_log_probs(pairs[place.process :: place.processes]))
        values = np.empty(len(pairs))
        for process, part in enumerate(gather_object([share])):
            values[process :: place.processes] = part
        return values

    def _losses(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Mean nats per completion token (S,)."""
        return -self._log_probs(pairs) / np.array([len(completion) for _, completion in pairs])

    def _rows(self, number: int, batch: Batch, chosen: Chosen, weights: Weights) -> tuple[list[Row], Batches]:
        """What the trainer gets."""
        rounds, seed = self.parts.config.rounds, round_seed(self.parts.config, number, _ORDER)
        batches = Batches(rounds.batch_size, self.parts.plan.micro_batch_size, rounds.epochs, seed)
        given = (batch.groups, chosen, weights.values_n, batches)
        if rounds.method == "sft":
            return sft_rows(*given), batches
        make = {"dpo": dpo_rows, "kto": kto_rows}[rounds.method]
        return make(*given, self._log_probs), batches

    # --- fine-tuning, checkpoints, evaluation -------------------------------------------------------------------------

    def _fine_tune(self, number: int, rows: Sequence[Row], batches: Batches) -> TunedLosses:
        """From the weights of the round before to those of this one, in its checkpoint."""
        start, config, folder = time.perf_counter(), self.parts.config, self._checkpoint(number)
        self._policy.release()
        if PartialState().is_main_process and folder.exists():  # of a round that was cut off
            shutil.rmtree(folder)
        PartialState().wait_for_everyone()
        own = {"max_steps": len(rows) // batches.batch_size, "seed": round_seed(config, number, _TUNING)}
        arguments = tuner_config(config.rounds.method, {**self.parts.options, **own})
        before = self._path(number - 1)
        adapts = config.policy.lora is not None
        losses = fine_tune(
            config.rounds.method,
            arguments,
            self.parts.model if adapts else before,
            before if adapts and number > 1 else "",
            peft_config(config),
            rows,
            self.parts.tokenizer,
            folder,
        )
        self._timings["time/tuning"] = time.perf_counter() - start
        return losses

    def _save(self, number: int, metrics: dict[str, float], seconds: float) -> None:
        """Write what this round leaves; its checkpoint is complete with the last file."""
        parts, main = self.parts, PartialState().is_main_process
        parts.files.samples.flush()
        if main:
            parts.files.metrics.append({"step": number, **metrics})
            parts.files.timings.append({"step": number, "step_time": seconds, **self._timings})
        PartialState().wait_for_everyone()
        if main:
            checkpoint = self._checkpoint(number)
            assert any(checkpoint.glob("*.safetensors")), f"{checkpoint} has no weights to go on from"
            write_state(checkpoint, RunState(number, 0, parts.plan.processes, parts.config.fingerprint(), {}))
        PartialState().wait_for_everyone()

    def take(self, number: int) -> None:
        """Hold the weights of a round."""
        self._policy.load(self._path(number))

    def evaluate(self, number: int) -> None:
        """Evaluate on the held-out prompts, add the point to the archive, and drop checkpoints that are kept no longer."""
        parts, config = self.parts, self.parts.config
        if config.evaluation.every:
            self._rollouts.sync(number)
            params = evaluation_params(config, self._place)
            evaluation = evaluate(self._rollouts.sampler, self._score, parts.prompts.evaluation, params, number)
            summary = summarize(evaluation.raw_PGK, objectives_of(config), evaluation.domains)
            parts.archive.append(
                ParetoPoint(
                    number,
                    **vars(summary),
                    prompts=len(evaluation.raw_PGK),
                    samples=parts.plan.samples_by(number),
                    checkpoint=f"checkpoints/{checkpoint_name(number)}" if number else "",
                )
            )
            values = "  ".join(f"{name} {value:.3f}" for name, value in summary.values.items())
            _say(f"round {number:>4}  held-out: {values}  hypervolume {parts.archive.hypervolume():.3f}")
            if PartialState().is_main_process:
                parts.files.write_evaluation(number, evaluation.rows)
        if PartialState().is_main_process:
            front = {point.step for point in parts.archive.front()} if config.checkpoint.keep_front else set()
            prune(parts.folder / "checkpoints", config.checkpoint.keep, front)

    def _path(self, number: int) -> str:
        return str(self._checkpoint(number)) if number else self.parts.model

    def _checkpoint(self, number: int) -> Path:
        return self.parts.folder / "checkpoints" / checkpoint_name(number)


def _answers(reader: Reader | None, group: SampleGroup) -> list[str | None]:
    texts = [sample.text for sample in group.samples]
    return [reader(text) for text in texts] if reader else [str(g) for g in range(len(texts))]


def _of_kept(answers: Sequence[str | None], raw_GK: np.ndarray) -> list[str | None]:
    """Answers of a group, None of samples that are left out: they have no vote, and are in no pair."""
    return [None if out else answer for answer, out in zip(answers, np.isnan(raw_GK).any(axis=1), strict=True)]


def _passed(config: Config, batch: Batch) -> Passed:
    """What passes the filter."""
    tokens_PG = np.array([[len(sample.token_ids) for sample in group.samples] for group in batch.groups])
    objectives, rules = objectives_of(config), config.selftrain.filter
    return passing(rules, objectives, batch.raw_PGK, batch.left_out_PG, batch.answers_PG, tokens_PG)


def _why_nothing(method: str, passed: Passed) -> str:
    """Why there is nothing to train on, and what helps."""
    right_PG, samples = passed.right_PG, passed.right_PG.size
    if not right_PG.any():
        reasons = ", ".join(f"{count} fail {name}" for name, count in passed.failed.items() if count)
        return (
            f"none of {samples} samples passes the filter ({reasons}): ease selftrain.filter, sample more (rounds.prompts, "
            "rollout.samples_per_prompt), or begin with a policy that gets some right"
        )
    if method == "sft":
        return (
            "of every prompt all samples pass, or none does, and rounds.mixed_only leaves such prompts out: set it to "
            "false, or ask more by selftrain.filter"
        )
    mixed = int((right_PG.any(axis=1) & ~right_PG.all(axis=1)).sum())
    return (
        f"no pairs for rounds.method={method}: {int(right_PG.sum())} of {samples} samples pass, and of {len(right_PG)} "
        f"prompts {mixed} have samples that pass and others, none of which states a wrong answer: sample more per prompt, "
        "or take rounds.method=sft"
    )


def _loss_metrics(losses: TunedLosses) -> dict[str, float]:
    return {"loss": losses.weighted, "rounds/unweighted_loss": losses.unweighted, "rounds/steps": losses.steps}


def _say(line: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(line)
