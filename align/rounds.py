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

from align.advice import advise, advise_on_prompts
from align.build import PromptSets, build_bus, check_shares, load_prompts, load_tokenizer, locate_policy, objectives_of
from align.checkpoint import read_state
from align.config import describe_sampling
from align.engine import check_engine
from align.guard import check_imports
from align.launch import fail, quiet, start, uncollected
from align.plan import Plan, make_plan
from align.runfolder import Run, open_run, processes, resume_command, write_folder
from align.selftrain.sources import load_trusted, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.selftrain.round import Rounds
    from align.selftrain.rows import Pair
    from rewards.answers import Reader
    from rewards.bus import RewardBus


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m align.rounds`; returns the exit status."""
    return start("align.rounds", __doc__.split("\n")[0], rounds, arguments)


def rounds(config_path: str, resume: str, overrides: Sequence[str]) -> int:
    """Run all rounds that are left; returns the exit status. Problems that can be known are said first."""
    try:
        check_imports()
        run = open_run(config_path, resume, overrides)
        if run.config.rounds is None:
            raise ValueError("rounds: there is no such section in the configuration; see configs/rounds.yaml")
        if run.finished:
            print(f"{run.folder} is complete: {run.config.steps} rounds (a larger --rounds.count goes on)")
            return 0
        with uncollected():
            built = build(run)
    except ValueError as error:
        return fail(error)
    from accelerate import PartialState

    try:
        status = _run(run, built)
    except KeyboardInterrupt:
        return fail(KeyboardInterrupt("interrupted"), f"The round begins anew by {resume_command(run)}", status=130)
    PartialState().wait_for_everyone()  # launchers end all processes when the first one is gone
    PartialState().destroy_process_group()
    return status


@dataclass(frozen=True)
class Built:
    """The parts of a run that need no weights."""

    model: str
    tokenizer: "PreTrainedTokenizerBase"
    prompts: PromptSets
    bus: "RewardBus"
    plan: Plan
    options: Mapping[str, Any]
    mixed_precision: str
    reader: "Reader | None"
    trusted: "dict[str, list[Pair]]"


def build(run: Run) -> Built:
    """Everything that can fail without weights. Raises ValueError."""
    config = run.config
    plan = make_plan(config, processes())
    model = locate_policy(config)
    tokenizer, context = load_tokenizer(model, config)
    prompts = load_prompts(config, tokenizer, context)
    check_shares(prompts, plan.processes)
    check_engine(config)
    reader, trusted = reader_of(config), load_trusted(config, tokenizer, tokenizer.eos_token_id, context)
    bus = build_bus(config, prompts.columns)
    from align.learner_args import check_sharding, tuner_arguments
    from align.selftrain.tuners import tuner_config  # imports TRL: seconds, so after what is quick to refuse

    options = tuner_arguments(config, plan, run.folder / "checkpoints")
    tried = tuner_config(config.rounds.method, options)
    check_sharding(config, tried)
    precision = "bf16" if tried.bf16 else "fp16" if tried.fp16 else "no"
    return Built(model, tokenizer, prompts, bus, plan, options, precision, reader, trusted)


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

    config, state = run.config, PartialState()
    objectives, done = objectives_of(config), rounds_done(run)
    archive = Archive(run.folder / "archive.jsonl", objectives, config.evaluation.reference, writes=state.is_main_process)
    files = RunFiles(run.folder, state.process_index, list(config.objectives))
    if run.resumed:
        state.wait_for_everyone()  # everyone has read what the main process now cuts back
        files.resume(done if run.checkpoint else -1)
        archive.truncate(done if run.checkpoint else -1)
    policy = PolicyCopy(config, built.tokenizer, built.plan.micro_batch_size, built.mixed_precision)
    policy.load(run.checkpoint or built.model)
    engine = open_engine(config, built.prompts, built.tokenizer, built.model, run.folder)
    try:
        sampler = engine.sampler(policy)
    except BaseException:
        engine.close()
        raise
    given = (config, built.plan, built.prompts, built.bus, built.tokenizer, built.model, run.folder)
    parts = RoundParts(*given, files, archive, built.options, built.reader, built.trusted)
    rollouts = Rollouts(config, built.plan, built.prompts, sampler, policy, len(built.tokenizer))
    try:
        yield Rounds(parts, policy, rollouts)
    finally:
        rollouts.close()


def rounds_done(run: Run) -> int:
    """Rounds that are behind a run."""
    return read_state(Path(run.checkpoint)).step if run.checkpoint else 0


def _run(run: Run, built: Built) -> int:
    from accelerate import PartialState

    from align.missing import MissingRewardError
    from align.selftrain.round import RoundError
    from rollout.sampler import RolloutError

    config, state = run.config, PartialState()
    quiet()
    state.wait_for_everyone()  # nobody writes before everybody has checked
    if state.is_main_process:
        write_folder(run)
        print(_summary(run, built), flush=True)
    state.wait_for_everyone()
    start, done = time.perf_counter(), rounds_done(run)
    try:
        with build_rounds(run, built) as all_rounds:
            if run.evaluates_first:
                all_rounds.evaluate(done)
            for number in range(done + 1, config.rounds.count + 1):
                all_rounds.run(number)
    except (RoundError, MissingRewardError, RolloutError) as error:
        return fail(error, f"Whole rounds are kept: mend it, then {resume_command(run)}")
    finally:
        built.bus.close()
    if state.is_main_process:
        from align.report import write_report

        print(f"{config.rounds.count - done} rounds in {time.perf_counter() - start:.0f} s")
        print(f"report     {write_report(run.folder)}")
    return 0


def _summary(run: Run, built: Built) -> str:
    config, plan, section = run.config, built.plan, run.config.rounds
    lines = [
        f"run        {run.folder}" + (f" (from {run.checkpoint or 'the start'})" if run.resumed else ""),
        f"policy     {config.policy.model}",
        f"prompts    {len(built.prompts.train)} to train on, {len(built.prompts.evaluation)} held out",
        f"rounds     {section.count} of {section.prompts} prompts x {config.rollout.samples_per_prompt} samples",
        f"sampling   {describe_sampling(config.rollout)}",
        f"tuning     {section.method}, {section.epochs} pass(es), {section.batch_size} per update: "
        f"{plan.processes} process(es) x {plan.accumulation} x {plan.micro_batch_size}",
    ]
    warnings = [*advise(config), *advise_on_prompts(config, built.prompts)]
    return "\n".join([*lines, *(f"warning    {warning}" for warning in warnings)])


if __name__ == "__main__":
    sys.exit(main())
