"""The seam to TRL: one subclass of GRPOTrainer serves every estimator, scheme and sampler.

TRL keeps its loss, its data loading, accelerate and DeepSpeed; this class hands generation to our sampler and scoring to
the reward bus, and replaces TRL's advantages by ours. No method body of TRL's is repeated here.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is marked experimental; the version is pinned

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers import ProgressCallback as TrainerProgress

from align.guard import hidden

with hidden("vllm"):  # TRL has its own use for it, we have not
    from trl import GRPOConfig, GRPOTrainer
    from trl.models import unwrap_model_for_generation
    from trl.trainer.utils import add_fused_lm_head

from align.archive import ParetoPoint
from align.checkpoint import STATE_FILE, RunState, checkpoint_name, complete_checkpoints, prune, read_state, write_state
from align.control import ControlError
from align.controlling import Controlling
from align.correction import correction_metrics, correction_sums
from align.evaluate import evaluate
from align.hacking import HackingWatch, Memory
from align.learner_args import peft_config
from align.missing import MissingRewardError, unmeasured
from align.parts import Parts
from align.policy import PolicyAccess
from align.probe import NO_GRAM, OBJECTIVE_ADVANTAGES, build_probe, replaced
from align.probing import Probing
from align.rollouts import Rollouts
from align.sampling import Place, evaluation_params
from align.scoring import score_together
from align.selftrain.training import SelfTraining
from align.step import take_step
from align.summary import summarize
from align.together import check_agreement
from align.weighting import Signal, WeightState
from align.weights import base_of
from rewards.types import RewardMatrix
from rollout.sampler import Sampler
from rollout.types import SampleGroup

TIMINGS = ("step_time", "time/")  # metrics that go to timings.jsonl
TRL_REWARD_METRICS = ("reward", "reward_std", "frac_reward_zero_std")  # TRL's, of its own weighted sum
AGREEMENT_EVERY = 10  # steps between comparisons of the weights across processes


class Learner(PolicyAccess, SelfTraining, Probing, Controlling, GRPOTrainer):
    """Trains the policy on the advantages that `take_step` gives.

    Args:
        parts: What it is made of.
        args: TRL's options, see `align.learner_args`.
        make_sampler: Builds the sampler around this learner.
        callbacks: Of transformers' Trainer.
    """

    def __init__(
        self,
        parts: Parts,
        args: GRPOConfig,
        make_sampler: Callable[["Learner"], Sampler],
        callbacks: Sequence[TrainerCallback],
    ):
        self.parts = parts
        self._checkpoints = Path(args.output_dir)
        texts = [prompt.text for prompt in parts.prompts.train]
        order = parts.prompts.order(parts.plan.prompts, parts.config.seed)
        super().__init__(
            model=parts.model,
            reward_funcs=[_column(objective.name) for objective in parts.rules.objectives],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": texts, "index": range(len(texts))}).select(order),
            processing_class=parts.tokenizer,
            callbacks=list(callbacks),
            peft_config=peft_config(parts.config),
            rollout_func=_roll_out,
        )
        self.remove_callback(TrainerProgress)  # ours shows the objectives
        self.remove_callback(PrinterCallback)
        self.weight_state = parts.rules.scheme.init(parts.rules.objectives)
        # TRL corrects, by ratios learner / sampler, only what it takes for its own vLLM's doing.
        self.use_vllm = parts.config.rollout.correction.type != "none"
        self.rollouts = Rollouts(parts.config, parts.plan, parts.prompts, make_sampler(self), self, len(parts.tokenizer))
        if parts.rules.probes:
            self._probe = build_probe(parts.config, self.model, parts.plan.micro_batch_size, self.aux_loss_enabled)
        self.begin_selftraining()
        self._watch = HackingWatch()
        self._told: set[str] = set()
        self._tokens_before = 0  # tokens seen before the batch being sampled
        self._prompt_indices: list[int] = []  # of the batch being sampled, one per sample of this process
        self._groups: list[SampleGroup] = []  # this process's samples of it
        self._scored: RewardMatrix  # their rewards
        self._gathered: RewardMatrix  # and those of all processes

    # --- generation and scoring, in the order in which TRL calls them -------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Let TRL run, then put our advantages in the place of its own."""
        self._prompt_indices = [row["index"] for row in inputs]
        step, self._tokens_before = self.state.global_step, self.state.num_input_tokens_seen
        self._last_loaded_step = step  # there is no vLLM of TRL's own to bring up to date
        output = super()._generate_and_score_completions(inputs)
        try:
            signals = self._signals(output)
            result = take_step(self.parts.rules, self.weight_state, self._gathered, step, signals)
        except (MissingRewardError, ControlError):
            self.state.num_input_tokens_seen = self._tokens_before  # the batch will be sampled again
            raise
        watched = self._watch_batch(step + 1, result.state)
        self._tell(result.state)
        self.weight_state = result.state
        if step % AGREEMENT_EVERY == 0:
            check_agreement(step, result.state.digest())
        if self.parts.rules.probes:
            self._probe.waiting_KK = NO_GRAM  # it has had its effect
            if self._probe.ordinary and self._probe_due(result.state, step + self.parts.plan.steps_per_batch):
                output[OBJECTIVE_ADVANTAGES] = self._advantages_alone(result.state, signals)
        local = slice(len(inputs) * self.accelerator.process_index, len(inputs) * (self.accelerator.process_index + 1))
        advantages_N = self.take_in(result.advantages_PG).reshape(-1)[local]
        self.parts.files.samples.write(step + 1, self._groups, self._scored, result.state.weights_K, advantages_N)
        self._log_batch({**result.metrics, **watched})
        if self.use_vllm:
            options = self.parts.config.rollout.correction
            sums = correction_sums(output["importance_sampling_ratio"], output["completion_mask"], options)
            self._add_metrics(correction_metrics(reduce(sums)))
        output["advantages"] = torch.tensor(advantages_N, dtype=torch.float32, device=self.accelerator.device)
        return output

    def roll_out(self) -> dict[str, Any]:
        """Sample this process's part of the batch; the answer to TRL's `rollout_func`."""
        indices = self._prompt_indices[:: self.parts.config.rollout.samples_per_prompt]
        self._groups = self._draw(indices)
        self._add_metrics(self.rollouts.take_metrics())
        samples = [(group.prompt, sample) for group in self._groups for sample in group.samples]
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt, _ in samples],
            "completion_ids": [list(sample.token_ids) for _, sample in samples],
            "logprobs": [list(sample.log_probs) for _, sample in samples] if self.use_vllm else None,
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Score this process's samples on the bus; every process gets the whole matrix (N, K)."""
        start = time.perf_counter()
        self._scored, self._gathered = self._score(self._groups, self._save_before_the_batch)
        self._metrics["train"]["time/scoring"].append(time.perf_counter() - start)
        self._add_metrics(self.parts.bus.timings())
        return torch.tensor(self._gathered.raw_NK, dtype=torch.float32, device=self.accelerator.device)

    def _score(self, groups: Sequence[SampleGroup], pause: Callable[[], None]) -> tuple[RewardMatrix, RewardMatrix]:
        return score_together(self.parts.bus, groups, self.parts.config.scoring, pause, self.parts.stop)

    # --- evaluation, logging, checkpoints -----------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the held-out prompts and add the point to the archive; takes the place of TRL's evaluation."""
        parts, step = self.parts, self.state.global_step
        self.rollouts.sync(step)
        params = evaluation_params(parts.config, Place(self.accelerator.process_index, parts.plan.processes))
        score = partial(self._score, pause=self.save_unless_saved)
        evaluation = evaluate(self.rollouts.sampler, score, parts.prompts.evaluation, params, step)
        summary = summarize(evaluation.raw_PGK, parts.rules.objectives, evaluation.domains)
        checkpoint = f"checkpoints/{checkpoint_name(step)}" if parts.schedule.saves_at(step) else ""
        parts.archive.append(
            ParetoPoint(
                step,
                **vars(summary),
                prompts=len(evaluation.raw_PGK),
                samples=parts.plan.samples_by(step),
                checkpoint=checkpoint,
            )
        )
        if self.accelerator.is_main_process:
            parts.files.write_evaluation(step, evaluation.rows)
        metrics = {f"eval_{name}": value for name, value in summary.values.items()}
        metrics |= {f"eval_{name}_missing": share for name, share in summary.missing.items()}
        metrics |= {f"eval_{d}/{name}": value for d, values in summary.domains.items() for name, value in values.items()}
        metrics["eval_hypervolume"] = parts.archive.hypervolume()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log through TRL, and write the rows of training steps to the run folder."""
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl holds it; checkpoints stay small
        if "loss" in logs and self.accelerator.is_main_process:
            timings = {key: value for key, value in logs.items() if key.startswith(TIMINGS)}
            metrics = {key: value for key, value in logs.items() if key not in timings}
            self.parts.files.metrics.append({"step": self.state.global_step, **metrics})
            self.parts.files.timings.append({"step": self.state.global_step, **timings})

    def save_unless_saved(self) -> None:
        """Write a checkpoint now, between two steps, unless this step has one (or nothing is trained yet)."""
        step = self.state.global_step
        if step and not (self._checkpoints / checkpoint_name(step) / STATE_FILE).exists():
            self._save_checkpoint(self.model, trial=None)

    def _save_before_the_batch(self) -> None:
        """Write a checkpoint from which the batch being scored will be sampled again."""
        with replaced(self.state, num_input_tokens_seen=self._tokens_before):
            self.save_unless_saved()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's checkpoint, then what it leaves out; complete once the last file is there."""
        super()._save_checkpoint(model, trial)
        checkpoint = self._checkpoints / checkpoint_name(self.state.global_step)
        if self._is_mid_batch(self._step):
            torch.save(self._buffered_inputs, checkpoint / self._batch_file())
        self.parts.files.samples.flush()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            plan, config = self.parts.plan, self.parts.config
            write_state(
                checkpoint,
                RunState(
                    self.state.global_step,
                    self._step,
                    plan.processes,
                    config.fingerprint(),
                    self.weight_state.to_json(),
                    self._probe.waiting_KK.tolist() if self.parts.rules.probes else [],
                    self._watch.memory.to_json(),
                    self.selftraining_duals(),
                    self.pooled,
                ),
            )
            front = {point.step for point in self.parts.archive.front()} if config.checkpoint.keep_front else set()
            prune(self._checkpoints, config.checkpoint.keep, front)
            self.cut_down_pool(complete_checkpoints(self._checkpoints)[-config.checkpoint.keep :][0][0])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """TRL's own loading, then what it leaves out."""
        _learn_places()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = read_state(Path(checkpoint))
            self._step = state.micro_step
            self.weight_state = WeightState.from_json(state.weighting)
            self._watch = HackingWatch(Memory.from_json(state.watch))
            self.resume_selftraining(state.duals, state.pooled)
            if state.gram:
                self._probe.waiting_KK = np.array(state.gram)
            if self._is_mid_batch(self._step):
                self._buffered_inputs = torch.load(Path(checkpoint) / self._batch_file(), weights_only=True)

    # --- small things -------------------------------------------------------------------------------------------------

    @contextmanager
    def policy(self) -> Iterator[PreTrainedModel]:
        """The model ready to generate: unwrapped, and gathered where it is sharded."""
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
        )
        with unwrapped as model, self._dist.summon_full_params(self.model_wrapped, recurse=False), self._proposed(model):
            yield model

    @contextmanager
    def at_temperature_one(self) -> Iterator[None]:
        """Let TRL's scoring be of the policy itself; it divides by the sampling temperature otherwise."""
        base = base_of(self.accelerator.unwrap_model(self.model))
        forward = base.forward
        if self.temperature != 1:
            add_fused_lm_head(base, 1.0, self.args.cast_lm_head_to_fp32)
        try:
            with self.accelerator.autocast():
                yield
        finally:
            base.forward = forward

    def _signals(self, output: Mapping[str, Any]) -> Mapping[Signal, np.ndarray]:
        """What scheme and estimator need and can be had by now, and nothing else; `output` is the batch as TRL made it."""
        needs = self.parts.rules.scheme.needs
        signals = {}
        if Signal.VALIDATION in needs and self.parts.archive.points:
            signals[Signal.VALIDATION] = self.parts.archive.every_vector_MK()
        if Signal.KL in needs:
            signals[Signal.KL] = self.log_ratios(output).reshape(-1, self.parts.rules.group_size)
        if self.parts.rules.estimator.type == "dpg":
            signals[Signal.LOG_PROBS] = self._sample_log_probs(output)
        if self.parts.prompts.shares:
            places = {name: place for place, name in enumerate(self.parts.prompts.shares)}
            signals[Signal.DOMAINS] = np.array(gather_object([places[group.prompt.domain] for group in self._groups]))
        if self.parts.rules.probes:
            if not self._probe.ordinary and self._probe_due(self.weight_state, self.state.global_step):
                self._probe_gradients(output, signals)
            signals |= self._gradient_signals()
        return signals

    def _watch_batch(self, step: int, state: WeightState) -> Mapping[str, float]:
        """Figures of the batch that tell of reward hacking; prints what is alarming."""
        lengths = gather_object([len(sample.token_ids) for group in self._groups for sample in group.samples])
        figures, alarms = self._watch.update(step, self._gathered, np.array(lengths), state.weights_K)
        for line in alarms if self.accelerator.is_main_process else ():
            tqdm.write(f"step {step:>5}  watch: {line}")
        return figures

    def _tell(self, state: WeightState) -> None:
        """Print, once each, what the scheme says and which objectives nobody could measure."""
        news = {line: f"weighting: {line}" for line in state.remarks if line not in self.weight_state.remarks}
        news |= {name: line for name, line in unmeasured(self._gathered).items() if name not in self._told}
        self._told.update(news)
        for line in news.values() if self.accelerator.is_main_process else ():
            tqdm.write(f"step {self.state.global_step:>5}  {line}")

    def _log_batch(self, metrics: Mapping[str, float]) -> None:
        """Put our metrics of a batch where TRL logs from, in the place of its own on rewards."""
        logged = self._metrics["train"]
        for key in [k for k in logged if k in TRL_REWARD_METRICS or k.startswith("rewards/")]:
            del logged[key]
        self._add_metrics(metrics)

    def _add_metrics(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)

    def _is_mid_batch(self, micro_step: int) -> bool:
        return micro_step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _batch_file(self) -> str:
        return f"batch_{self.accelerator.process_index}.pt"


@cache
def _learn_places() -> None:
    """With several CPU processes transformers loads to "cpu:0", "cpu:1", ..., places that torch does not know."""
    torch.serialization.register_package(9, lambda _: None, lambda storage, to: storage if to[:4] == "cpu:" else None)


def _roll_out(prompts: list[str], learner: Learner) -> dict[str, Any]:
    return learner.roll_out()


def _column(name: str) -> Callable[..., Any]:
    """A stand-in that gives TRL the name of a column of the reward matrix; the bus fills the column."""

    def column(**kwargs: Any) -> list[float]:
        raise AssertionError("the reward bus scores; TRL never calls this")

    column.__name__ = name
    return column
