"""Self-training: `accelerate launch -m align.rounds --config FILE [--key=value ...]`, or `paretune rounds` for one process.

open the run -> build what needs no weights -> for every round: sample, filter, weight, fine-tune, evaluate, save
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.build import build_bus, objectives_of
from align.checkpoint import read_state
from align.config import Config, describe_selftrain
from align.launch import fail, start
from align.plan import Plan
from align.runfolder import Run, open_run
from align.selftrain.sources import load_trusted, reader_of
from align.session import Ground, announce, conduct, lay_ground

if TYPE_CHECKING:
    from align.selftrain.round import Rounds
    from align.selftrain.rows import Pair
    from rewards.answers import Reader
    from rewards.bus import RewardBus


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m align.rounds`; returns the exit status."""
    return start("align.rounds", __doc__.split("\n")[0], rounds, arguments)


def rounds(config_path: str, resume: str, overrides: Sequence[str]) -> int:
    """Run all rounds that are left; returns the exit status. Problems that can be known are said first."""

    def opened() -> Run:
        run = open_run(config_path, resume, overrides)
        if run.config.rounds is None:
            raise ValueError("rounds: there is no such section in the configuration; see configs/rounds.yaml")
        return run

    return conduct(opened, build, _run)


@dataclass(frozen=True)
class Built:
    """The parts of a run that need no weights."""

    ground: Ground
    bus: "RewardBus"
    options: Mapping[str, Any]
    mixed_precision: str
    reader: "Reader | None"
    trusted: "dict[str, list[Pair]]"


def build(run: Run) -> Built:
    """Everything that can fail without weights. Raises ValueError."""
    config = run.config
    ground = lay_ground(config)
    trusted = load_trusted(config, ground.tokenizer, ground.tokenizer.eos_token_id, ground.context)
    bus = build_bus(config, ground.prompts.columns)
    from align.learner_args import check_sharding, tuner_arguments
    from align.selftrain.tuners import tuner_config  # imports TRL: seconds, so after what is quick to refuse

    options = tuner_arguments(config, ground.plan, run.folder / "checkpoints")
    tried = tuner_config(config.rounds.method, options)
    check_sharding(config, tried)
    precision = "bf16" if tried.bf16 else "fp16" if tried.fp16 else "no"
    return Built(ground, bus, options, precision, reader_of(config), trusted)


@contextmanager
def build_rounds(run: Run, built: Built) -> Iterator["Rounds"]:
    """Load the policy and put the run together; releases the sampler in the end.

    Raises:
        RolloutError: Of the sampler.
    """
    from accelerate import PartialState

    from align.archive import Archive
    from align.engine import open_engine
    from align.rollouts import Rollouts
    from align.runlog import RunFiles
    from align.selftrain.policy_copy import PolicyCopy
    from align.selftrain.round import RoundParts, Rounds

    config, ground, state = run.config, built.ground, PartialState()
    objectives, done = objectives_of(config), rounds_done(run)
    archive = Archive(run.folder / "archive.jsonl", objectives, config.evaluation.reference, writes=state.is_main_process)
    files = RunFiles(run.folder, state.process_index, list(config.objectives))
    if run.resumed:
        state.wait_for_everyone()  # everyone has read what the main process now cuts back
        files.resume(done if run.checkpoint else -1)
        archive.truncate(done if run.checkpoint else -1)
    policy = PolicyCopy(config, ground.tokenizer, ground.plan.micro_batch_size, built.mixed_precision)
    policy.load(run.checkpoint or ground.model)
    engine = open_engine(config, ground.prompts, ground.tokenizer, ground.model, run.folder)
    try:
        sampler = engine.sampler(policy)
    except BaseException:
        engine.close()
        raise
    given = (config, ground.plan, ground.prompts, built.bus, ground.tokenizer, ground.model, run.folder)
    parts = RoundParts(*given, files, archive, built.options, built.reader, built.trusted)
    rollouts = Rollouts(config, ground.plan, ground.prompts, sampler, policy, len(ground.tokenizer))
    try:
        yield Rounds(parts, policy, rollouts)
    finally:
        rollouts.close()


def rounds_done(run: Run) -> int:
    """Rounds that are behind a run."""
    return read_state(Path(run.checkpoint)).step if run.checkpoint else 0


def _run(run: Run, built: Built, go_on: str) -> int:
    from accelerate import PartialState

    from align.missing import MissingRewardError
    from align.selftrain.round import RoundError
    from rollout.sampler import RolloutError

    config, state = run.config, PartialState()
    announce(run, built.ground, _said(config, built.ground.plan))
    start, done = time.perf_counter(), rounds_done(run)
    try:
        with build_rounds(run, built) as all_rounds:
            if run.evaluates_first:
                all_rounds.evaluate(done)
            for number in range(done + 1, config.rounds.count + 1):
                all_rounds.run(number)
    except (RoundError, MissingRewardError, RolloutError) as error:
        return fail(error, f"Whole rounds are kept: mend it, then {go_on}")
    finally:
        built.bus.close()
    if state.is_main_process:
        from align.report import write_report

        print(f"{config.rounds.count - done} rounds in {time.perf_counter() - start:.0f} s")
        print(f"report     {write_report(run.folder)}")
    return 0


def _said(config: Config, plan: Plan) -> list[str]:
    section = config.rounds
    return [
        f"rounds     {section.count} of {section.prompts} prompts x {config.rollout.samples_per_prompt} samples",
        *(f"selftrain  {line}" for line in describe_selftrain(config)),
        f"tuning     {section.method}, {section.epochs} pass(es), {section.batch_size} per update: "
        f"{plan.processes} process(es) x {plan.accumulation} x {plan.micro_batch_size}",
    ]


if __name__ == "__main__":
    sys.exit(main())
