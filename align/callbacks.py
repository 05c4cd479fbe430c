"""Callbacks of transformers' Trainer: when to evaluate and save, the progress bar, and stopping on a signal."""

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.plan import Schedule


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self.number = 0  # of the signal

    def listen(self) -> None:
        """From now on; before, a signal stops at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.number = True, number
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.SIG_DFL)
        if PartialState().is_main_process:
            tqdm.write("stopping after this step, with a checkpoint (once more: at once, without)")


class ScheduleCallback(TrainerCallback):
    """Evaluates and saves when the schedule says so, and saves and stops when asked to; all processes together.

    Args:
        schedule: When.
        stop: Whether this process was asked to stop.
    """

    def __init__(self, schedule: Schedule, stop: Callable[[], bool]):
        self._schedule = schedule
        self._stop = stop
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Set the flags that the Trainer acts on next."""
        self.stopped = self._stop_requested(args.device)
        control.should_evaluate = self._schedule.evaluates_at(state.global_step)
        control.should_save = self.stopped or self._schedule.saves_at(state.global_step)
        control.should_training_stop = control.should_training_stop or self.stopped
        return control

    def _stop_requested(self, device: torch.device) -> bool:
        """Whether any process was asked to stop: the signal may reach them within different steps."""
        return bool(gather(torch.tensor([self._stop()], device=device)).any())


def _share(logs: dict[str, Any], name: str) -> str:
    """Says when a held-out mean is not that of all samples."""
    missing = logs[f"eval_{name}_missing"]
    return f" ({missing:.1%} missing)" if missing else ""


def _number(mean: float | None) -> str:
    return "missing" if mean is None or math.isnan(mean) else f"{mean:.2f}"


class ProgressCallback(TrainerCallback):
    """A progress bar with the mean of every objective, and a line per evaluation.

    Args:
        objectives: Their names.
        steps: Of the whole run.
        constraints: Kind of the constraint, by objective, where the scheme holds any.
    """

    def __init__(self, objectives: Sequence[str], steps: int, constraints: Mapping[str, str]):
        self._objectives = objectives
        self._steps = steps
        self._constraints = constraints
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(
            total=self._steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=args.disable_tqdm or not state.is_world_process_zero,
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Move the bar, or print an evaluation."""
        if self._bar is None or not state.is_world_process_zero:
            return
        if "eval_hypervolume" in logs:
            values = "  ".join(f"{name} {logs[f'eval_{name}']:.3f}{_share(logs, name)}" for name in self._objectives)
            tqdm.write(f"step {state.global_step:>5}  held-out: {values}  hypervolume {logs['eval_hypervolume']:.3f}")
        elif "loss" in logs:
            means = {name: logs.get(f"objectives/{name}/mean") for name in self._objectives}
            shown = {n: f"{_number(mean)}{self._constraint(logs, n)}" for n, mean in means.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def _constraint(self, logs: dict[str, Any], name: str) -> str:
        """The constraint on an objective, with a mark where it is violated (a value is never quite `equal`)."""
        threshold, violation = (logs.get(f"weighting/{key}/{name}") for key in ("threshold", "violation"))
        if name not in self._constraints or threshold is None:
            return ""
        kind = self._constraints[name]
        violated = kind != "equal" and violation is not None and violation > 0
        return f" ({kind.replace('_', ' ')} {threshold:.2f}{'!' if violated else ''})"

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
