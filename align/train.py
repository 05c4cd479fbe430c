"""Train: `accelerate launch -m align.train --config FILE [--key=value ...]`, or `paretune train` for one process.

open the run -> build what needs no weights -> build the learner -> resume -> run -> close
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.build import build_bus, objectives_of
from align.checkpoint import read_state
from align.config import Config, describe, describe_domains, describe_selftrain
from align.config.lagrangian_rules import constraint_kinds
from align.launch import fail, start
from align.plan import Plan, Schedule
from align.runfolder import Run, open_run, processes
from align.selftrain.pool import refuse_other_pool
from align.selftrain.sources import Sources, load_sources
from align.session import Ground, announce, conduct, lay_ground

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from align.learner import GRPOConfig, Learner
    from rewards.bus import RewardBus


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m align.train`; returns the exit status."""
    return start("align.train", __doc__.split("\n")[0], train, arguments)


def train(config_path: str, resume: str, overrides: Sequence[str]) -> int:
    """Train to the end, or until stopped; returns the exit status. Problems that can be known are said first."""

    def opened() -> Run:
        run = open_run(config_path, resume, overrides)
        if run.config.rounds is not None:
            raise ValueError("rounds: this configuration is one of self-training rounds: start it by `paretune rounds`")
        return run

    return conduct(opened, build, _run)


# --- build ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """The parts of a run that need no weights."""

    ground: Ground
    bus: "RewardBus"
    sources: Sources
    trl: "GRPOConfig"


def build(run: Run) -> Built:
    """Everything that can fail without weights. Raises ValueError."""
    config = run.config
    ground = lay_ground(config)
    sources = load_sources(config, ground.tokenizer, ground.tokenizer.eos_token_id, ground.context)
    if run.checkpoint:
        state = read_state(Path(run.checkpoint))
        refuse_other_pool(run.folder, config, state.step, state.pooled)
    elif run.resumed:
        refuse_other_pool(run.folder, config, -1, 0)
    bus = build_bus(config, ground.prompts.columns)
    from align.learner import GRPOConfig  # imports TRL: seconds, so after what is quick to refuse
    from align.learner_args import check_sharding, trl_arguments

    trl = GRPOConfig(**trl_arguments(config, ground.plan, run.folder / "checkpoints", run.evaluates_first))
    check_sharding(config, trl)
    return Built(ground, bus, sources, trl)


def build_learner(
    run: Run,
    built: Built,
    schedule: Schedule,
    callbacks: Sequence["TrainerCallback"],
    stop: Callable[[], bool] = lambda: False,
) -> "Learner":
    """Load the policy and put the run together."""
    from accelerate import PartialState

    from align.archive import Archive
    from align.domains import domain_rules
    from align.engine import open_engine
    from align.learner import Learner
    from align.parts import Parts
    from align.runlog import RunFiles
    from align.step import StepRules
    from align.weighting import build_scheme

    config, ground, state = run.config, built.ground, PartialState()
    objectives = objectives_of(config)
    names = [objective.name for objective in objectives]
    archive = Archive(run.folder / "archive.jsonl", objectives, config.evaluation.reference, writes=state.is_main_process)
    files = RunFiles(run.folder, state.process_index, names)
    if run.resumed:
        state.wait_for_everyone()  # everyone has read what the main process now cuts back
        step = read_state(Path(run.checkpoint)).step if run.checkpoint else -1
        files.resume(step)
        archive.truncate(step)
    rules = StepRules(
        objectives,
        build_scheme(config.weighting),
        config.estimator,
        config.combination,
        config.rollout.samples_per_prompt,
        config.scoring.max_failed,
        domain_rules(config),
    )
    of_ground = (ground.prompts, built.bus, ground.tokenizer, ground.model)
    parts = Parts(config, ground.plan, schedule, rules, *of_ground, files, archive, built.sources, stop)
    engine = open_engine(config, ground.prompts, ground.tokenizer, ground.model, run.folder)
    try:
        return Learner(parts, built.trl, engine.sampler, callbacks)
    except BaseException:
        engine.close()
        raise


# --- run --------------------------------------------------------------------------------------------------------------


def _run(run: Run, built: Built, go_on: str) -> int:
    from accelerate import PartialState

    from align.callbacks import ProgressCallback, ScheduleCallback, StopSignal
    from align.control import ControlError
    from align.missing import MissingRewardError
    from align.probe import ProbeError
    from rollout.sampler import RolloutError

    config, state = run.config, PartialState()
    announce(run, built.ground, _said(config, built.ground.plan))
    schedule = Schedule(config.steps, config.evaluation.every, config.checkpoint.every)
    stop = StopSignal()
    on_schedule = ScheduleCallback(schedule, lambda: stop.requested)
    kinds = constraint_kinds(config)
    progress = ProgressCallback(list(config.objectives), config.steps, kinds)
    try:
        learner = build_learner(run, built, schedule, [on_schedule, progress], lambda: stop.requested)
    except (ProbeError, RolloutError) as error:  # seen only once the policy is loaded, or its servers are asked
        return fail(error, f"Nothing was trained yet; mend it, then {go_on}")
    stop.listen()
    start, done = time.perf_counter(), read_state(Path(run.checkpoint)).step if run.checkpoint else 0
    try:
        learner.train(resume_from_checkpoint=run.checkpoint or None)
    except (MissingRewardError, RolloutError) as error:
        learner.save_unless_saved()
        print(flush=True)  # below the progress bar
        return fail(error, f"Nothing is lost: mend it, then {go_on}")
    except ControlError as error:
        learner.save_unless_saved()
        print(flush=True)
        if learner.state.global_step:
            return fail(error, f"Nothing is lost: mend the reward, then {go_on}")
        return fail(error, "The target of a run is settled when it starts: begin another, with another --output")
    finally:
        learner.rollouts.close()
        built.bus.close()
    stopped = on_schedule.stopped and learner.state.global_step < config.steps
    if state.is_main_process:
        if stopped:
            print(f"stopped after step {learner.state.global_step}; go on with: {go_on}")
        else:
            print(f"trained {learner.state.global_step - done} steps in {time.perf_counter() - start:.0f} s")
            _finish(run, learner)
    return 128 + stop.number if stopped and processes() == 1 else 0  # launchers take anything else for a crash


def _said(config: Config, plan: Plan) -> list[str]:
    return [
        f"batch      {config.rollout.prompts_per_batch} prompts x {config.rollout.samples_per_prompt} samples, "
        f"{plan.processes} process(es) x {plan.accumulation} x {plan.micro_batch_size} per update",
        f"weighting  {describe(config)}",
        *(f"domains    {line}" for line in describe_domains(config)),
        *(f"selftrain  {line}" for line in describe_selftrain(config)),
        f"learner    {config.estimator.type}, {config.combination.type}, {config.steps} steps",
    ]


def _finish(run: Run, learner: "Learner") -> None:
    """Say what came out, and write the report."""
    from align.report import write_report

    archive = learner.parts.archive
    if archive.usable():
        first, last = archive.hypervolume(1), archive.hypervolume()
        print(
            f"archive    {len(archive.points)} policies, {len(archive.front())} on the front; "
            f"hypervolume {first:.3f} at the start, {last:.3f} of all"
        )
    thresholds = learner.weight_state.memory.get("threshold", {})
    for name, kind in constraint_kinds(run.config).items():
        if name in thresholds and archive.points:
            value, threshold = archive.points[-1].values[name], thresholds[name]
            met = {"at_least": value >= threshold, "at_most": value <= threshold}
            verdict = f": {'met' if met[kind] else 'NOT met'}" if kind in met else ""
            print(f"constraint {name} {kind.replace('_', ' ')} {threshold:.3g}, {value:.3g} held out at the end{verdict}")
    print(f"report     {write_report(run.folder)}")


if __name__ == "__main__":
    sys.exit(main())
