"""Batch arithmetic: how prompts, samples, processes and micro-batches fit together."""

from dataclasses import dataclass

from align.config import Config


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Args:
        processes: Learner processes.
        samples_per_batch: N = P * G, over all processes.
        samples_per_process: N / processes; whole groups.
        micro_batch_size: Samples per forward and backward pass and process.
        accumulation: Passes per optimiser step.
        passes_per_batch: Passes that one iteration over a batch takes: samples_per_process / micro_batch_size.
        batches: Batches sampled in the whole run.
        prompts: Prompts drawn in the whole run.
        steps_per_batch: Optimiser steps that train on one batch.
    """

    processes: int
    samples_per_batch: int
    samples_per_process: int
    micro_batch_size: int
    accumulation: int
    passes_per_batch: int
    batches: int
    prompts: int
    steps_per_batch: int

    def samples_by(self, step: int) -> int:
        """Samples drawn over all processes when `step` optimiser steps have been taken."""
        return -(-step // self.steps_per_batch) * self.samples_per_batch


@dataclass(frozen=True)
class Schedule:
    """When a run evaluates and saves, besides its first and last step."""

    steps: int
    evaluate_every: int
    save_every: int

    def evaluates_at(self, step: int) -> bool:
        """Whether the policy is evaluated after `step` optimiser steps."""
        return bool(self.evaluate_every) and (step % self.evaluate_every == 0 or step == self.steps)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` optimiser steps."""
        return step > 0 and (step % self.save_every == 0 or step == self.steps)


def make_plan(config: Config, processes: int) -> Plan:
    """The plan of a run. Raises ValueError that names the numbers that do not fit."""
    if config.rounds is not None:
        return _plan_of_rounds(config, processes)
    prompts, group, updates = (
        config.rollout.prompts_per_batch,
        config.rollout.samples_per_prompt,
        config.learner.updates_per_batch,
    )
    if prompts % processes:
        raise ValueError(
            f"rollout.prompts_per_batch={prompts} cannot be split over {processes} processes without breaking a sample "
            f"group: make it a multiple of {processes}"
        )
    per_process = prompts * group // processes
    micro = config.learner.micro_batch_size or per_process // updates
    if not micro or per_process % (micro * updates):
        key = f"learner.micro_batch_size={micro}" if config.learner.micro_batch_size else "one update"
        raise ValueError(
            f"{per_process} samples per process (rollout.prompts_per_batch={prompts} * samples_per_prompt={group} / "
            f"{processes} processes) are not divisible into learner.updates_per_batch={updates} updates of {key}: "
            f"choose numbers that divide"
        )
    steps_per_batch = updates * config.learner.iterations_per_batch
    batches = -(-config.steps // steps_per_batch)
    return Plan(
        processes=processes,
        samples_per_batch=prompts * group,
        samples_per_process=per_process,
        micro_batch_size=micro,
        accumulation=per_process // (micro * updates),
        passes_per_batch=per_process // micro,
        batches=batches,
        prompts=batches * prompts,
        steps_per_batch=steps_per_batch,
    )


def _plan_of_rounds(config: Config, processes: int) -> Plan:
    """A round in the place of a step, and of a batch of samples."""
    rounds, count = config.rounds, config.rounds.prompts * config.rollout.samples_per_prompt
    micro = config.learner.micro_batch_size or rounds.batch_size // processes
    if not micro or rounds.batch_size % (micro * processes):
        key = f" of learner.micro_batch_size={micro}" if config.learner.micro_batch_size else ""
        raise ValueError(
            f"rounds.batch_size={rounds.batch_size} cannot be split over {processes} process(es){key}: choose numbers that "
            "divide"
        )
    if rounds.method == "kto" and micro < 2:
        raise ValueError(
            f"rounds.method=kto compares samples within a micro-batch, and rounds.batch_size={rounds.batch_size} leaves "
            f"each of {processes} process(es) one: make it {2 * processes} at least"
        )
    if rounds.prompts < processes:
        raise ValueError(f"rounds.prompts={rounds.prompts} cannot be shared by {processes} processes: give one for each")
    return Plan(
        processes=processes,
        samples_per_batch=count,
        samples_per_process=-(-count // processes),
        micro_batch_size=micro,
        accumulation=rounds.batch_size // (micro * processes),
        passes_per_batch=rounds.batch_size // (micro * processes),
        batches=rounds.count,
        prompts=rounds.count * rounds.prompts,
        steps_per_batch=1,
    )
