"""How a run of either kind, training or rounds of self-training, begins and ends. Imports no TRL.

open the run -> build what needs no weights -> announce -> act -> leave together
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from align.advice import advise, advise_on_prompts
from align.build import PromptSets, check_shares, load_prompts, load_tokenizer, locate_policy
from align.config import Config, describe_sampling
from align.engine import check_engine
from align.guard import check_imports
from align.launch import fail, quiet, uncollected
from align.plan import Plan, make_plan
from align.runfolder import Run, processes, resume_command, write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Built = TypeVar("Built")


@dataclass(frozen=True)
class Ground:
    """What every run stands on.

    Args:
        model: Folder or hub name of the policy.
        tokenizer: The policy's.
        context: Tokens that the policy can read.
        prompts: To train on, and held out.
        plan: How the processes share a batch.
    """

    model: str
    tokenizer: "PreTrainedTokenizerBase"
    context: int
    prompts: PromptSets
    plan: Plan


def lay_ground(config: Config) -> Ground:
    """Everything of a configuration that both kinds of run read, without weights. Raises ValueError."""
    plan = make_plan(config, processes())
    model = locate_policy(config)
    tokenizer, context = load_tokenizer(model, config)
    prompts = load_prompts(config, tokenizer, context)
    check_shares(prompts, plan.processes)
    check_engine(config)
    return Ground(model, tokenizer, context, prompts, plan)


def conduct(opened: Callable[[], Run], build: Callable[[Run], Built], act: Callable[[Run, Built, str], int]) -> int:
    """Take a run from its configuration to its end; problems that can be known are said before weights are loaded.

    Args:
        opened: Finds the run; raises ValueError.
        build: Makes what needs no weights; raises ValueError.
        act: Loads the weights and runs; is given the command that goes on with the run, and gives the exit status.

    Returns:
        The exit status.
    """
    try:
        check_imports()
        run = opened()
        if run.finished:
            unit, key = ("steps", "--steps") if run.config.rounds is None else ("rounds", "--rounds.count")
            print(f"{run.folder} is complete: {run.config.steps} {unit} (a larger {key} goes on)")
            return 0
        with uncollected():
            built = build(run)
    except ValueError as error:
        return fail(error)
    from accelerate import PartialState

    go_on = resume_command(run)  # now: Ctrl-C ends the launcher before us
    try:
        status = act(run, built, go_on)
    except KeyboardInterrupt:
        return fail(KeyboardInterrupt("interrupted"), f"It goes on by {go_on}", status=130)
    PartialState().wait_for_everyone()  # launchers end all processes when the first one is gone
    PartialState().destroy_process_group()
    return status


def announce(run: Run, ground: Ground, lines: Sequence[str]) -> None:
    """Write the run folder, and print what begins: `lines`, and what is odd about it."""
    from accelerate import PartialState

    state, config = PartialState(), run.config
    quiet()
    state.wait_for_everyone()  # nobody writes before everybody has checked
    if state.is_main_process:
        write_folder(run)
        header = (
            f"run        {run.folder}" + (f" (from {run.checkpoint or 'the start'})" if run.resumed else ""),
            f"policy     {config.policy.model}",
            f"prompts    {len(ground.prompts.train)} to train on, {len(ground.prompts.evaluation)} held out",
            f"sampling   {describe_sampling(config.rollout)}",
        )
        warnings = [f"warning    {text}" for text in (*advise(config), *advise_on_prompts(config, ground.prompts))]
        print("\n".join([*header, *lines, *warnings]), flush=True)
    state.wait_for_everyone()
