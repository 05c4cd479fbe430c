"""How processes start: as many as were asked for, and on terms with whatever else the machine does.

Without MPI, `accelerate launch --cpu --num_processes N` starts one process and says nothing (accelerate 1.15). It leaves
a trace: MASTER_ADDR is set although there is no rank. Then this process replaces itself by torch's own launcher with N.
"""

import argparse
import gc
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PATIENT = ("--shutdown_timeout", "600")  # seconds to finish the step and save it after Ctrl-C, before SIGKILL
_LAUNCHERS = (("accelerate", "launch"), ("accelerate-launch",), ("-m", "accelerate.commands.launch"))
_OURS = ("align.train", "align.rounds")
_RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # somebody did launch


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training; anything else of the form --key=value overrides a key of the configuration."""
    parser.add_argument("--config", metavar="FILE", default="", help="configuration (YAML); not needed with --resume")
    parser.add_argument("--resume", metavar="RUN", default="", help="go on with the run in this folder")


def start(module: str, text: str, act: Callable[[str, str, Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    """Entry of `python -m MODULE`: what `act` makes of configuration, run to resume, and overrides; the exit status."""
    parser = argparse.ArgumentParser(prog=module, description=text, allow_abbrev=False)
    add_train_arguments(parser)
    share_cores()
    relaunch_on_cpu(module, sys.argv[1:] if arguments is None else arguments)
    known, overrides = parser.parse_known_args(arguments)
    return act(known.config, known.resume, overrides)


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait. To be called before torch is imported.

    By default they spin, which stalls a CPU whose cores are shared with another busy program.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector: it takes a fifth of the time, to find nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet() -> None:
    """One progress bar is enough, and warnings about what we do on purpose are none."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls


def relaunch_on_cpu(module: str, arguments: Sequence[str]) -> None:
    """Return when nothing is to be done; else replace this process by N processes that run `module`."""
    if not asked_for_several(os.environ):
        return
    import psutil

    processes = processes_of(psutil.Process(os.getppid()).cmdline())
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *_PATIENT]
        os.execv(sys.executable, [sys.executable, *launcher, "-m", module, *arguments])


def told_to_use_cpu(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher or the user asked for the CPU."""
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def asked_for_several(environment: Mapping[str, str]) -> bool:
    """Whether the launcher meant several CPU processes and started one."""
    return told_to_use_cpu(environment) and "MASTER_ADDR" in environment and not any(rank in environment for rank in _RANKS)


def processes_of(command: Sequence[str]) -> int:
    """The --num_processes of an `accelerate launch` command line; 1 when it names none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(list(command))[0].num_processes


def launchers() -> list[Sequence[str]]:
    """Command lines of the processes above this one, the nearest first."""
    import psutil

    found = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            with suppress(psutil.Error):  # of another user, or just gone
                found.append(process.cmdline())
    return found


def launcher_options(commands: Sequence[Sequence[str]]) -> str | None:
    """The options of the nearest `accelerate launch -m` of ours, quoted, after a space; None where there is none."""
    for command in commands:
        words = [Path(word).name if Path(word).name.startswith("accelerate") else word for word in command]
        modules = [n for n in range(1, len(words)) if words[n] in _OURS and words[n - 1] in ("-m", "--module")]
        for start in range(len(words)) if modules else ():
            for launcher in _LAUNCHERS:
                if tuple(words[start : start + len(launcher)]) == launcher:
                    options = command[start + len(launcher) : modules[0] - 1]
                    return f" {shlex.join(options)}" if options else ""
    return None


def script(name: str) -> str:
    """How a shell here starts a program of this environment: by its name, where that finds no other."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    return name if found and Path(found) == own else shlex.quote(os.path.relpath(own))


def fail(error: BaseException, advice: str = "", status: int = 2) -> int:
    """Print an error for the user, once for all processes; the exit status."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}" + (f"\n{advice}" if advice else ""), file=sys.stderr)
    return status
