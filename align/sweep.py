"""`paretune sweep`: a grid of runs over keys of a configuration and seeds, one after another or printed. No torch."""

import hashlib
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, run

from tqdm.auto import tqdm

from align.config import Config
from align.launch import script
from align.load import load_config
from align.runfolder import different_keys, is_finished

NEW, STOPPED, COMPLETE = "new", "stopped", "complete"
LONGEST = 80  # characters of a folder's name that stand for the values of a point; a hash follows where there are more
POLL = 0.2  # seconds between looks at a run


@dataclass(frozen=True)
class Point:
    """One run of the grid.

    Args:
        folder: The run folder.
        config: Its configuration.
        overrides: What makes it out of the file, as on the command line.
        standing: `new`, `stopped` or `complete`.
    """

    folder: Path
    config: Config
    overrides: Sequence[str]
    standing: str

    @property
    def log(self) -> Path:
        """Where the output of the run goes."""
        return self.folder.with_name(self.folder.name + ".log")

    def command(self, launcher: Sequence[str], config: str) -> list[str]:
        """The command line that starts the run, or goes on with it."""
        name = "train" if self.config.rounds is None else "rounds"
        start = [*launcher, "-m", f"align.{name}"] if launcher else [*shlex.split(script("paretune")), name]
        resume = [f"--resume={self.folder}"] if self.standing == STOPPED else []
        return [*start, f"--config={config}", *self.overrides, *resume]


@dataclass(frozen=True)
class Sweep:
    """What is asked for on the command line.

    Args:
        config: A configuration file.
        grid: Texts such as `weighting.type=fixed,gradient`.
        seeds: One run of every point for each.
        output: The runs are made in it.
        processes: Learner processes of a run.
        launch: Command line of a launcher that takes `-m MODULE`; "" for the usual one.
        prints: Print the commands, and run nothing.
        front: End with `paretune front`.
    """

    config: str
    grid: Sequence[str]
    seeds: Sequence[int]
    output: Path
    processes: int
    launch: str
    prints: bool
    front: bool


def sweep(asked: Sweep, overrides: Sequence[str]) -> int:
    """Run or print what is not complete yet; the exit status is 1 where a run failed. Raises ValueError before the first."""
    points = grid_points(asked, overrides)
    launcher = _launcher(asked)
    todo = [point for point in points if point.standing != COMPLETE]
    if asked.prints:
        for point in todo:
            print(shlex.join(point.command(launcher, asked.config)))
        if len(todo) < len(points):
            print(f"{len(points) - len(todo)} of {len(points)} runs are complete and not printed", file=sys.stderr)
        return 0
    print(f"{len(points)} runs in {asked.output}, {len(points) - len(todo)} of them complete already")
    asked.output.mkdir(parents=True, exist_ok=True)
    try:
        failed = _run_all(todo, launcher, asked.config)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for point in failed:
        print(f"failed: {point.folder} ({point.log}: {last_line(point.log)})", file=sys.stderr)
    drawn = not asked.front or _draw_front([point.folder for point in points if point not in failed], asked.output / "front")
    return 0 if drawn and not failed else 1


# --- the grid ---------------------------------------------------------------------------------------------------------


def grid_points(asked: Sweep, overrides: Sequence[str]) -> list[Point]:
    """Every point of the grid with every seed, seeds last.

    Raises:
        ValueError: The grid or one of its configurations is not valid, two runs would have one folder, or a folder holds
            something else.
    """
    keys = [_parse_grid(text) for text in asked.grid]
    points: dict[Path, Point] = {}
    for values in product(*(values for _, values in keys)):
        chosen = [(key, value) for (key, _), value in zip(keys, values, strict=True)]
        for seed in asked.seeds:
            folder = asked.output / f"{folder_name(chosen)}seed{seed}"
            more = [*overrides, *(f"--{key}={value}" for key, value in chosen), f"--seed={seed}", f"--output={folder}"]
            config = load_config(asked.config, more)
            if folder in points:
                raise ValueError(f"two runs of the sweep would have the folder {folder}: is a value or a seed given twice?")
            points[folder] = Point(folder, config, more, _standing(config, folder))
    return list(points.values())


def _parse_grid(text: str) -> tuple[str, list[str]]:
    """Key and values of `key=value,value` or `key=value|value`."""
    key, separator, values = text.removeprefix("--").partition("=")
    if not separator or not key:
        raise ValueError(f"--grid {text}: write key=value,value as in weighting.type=fixed,gradient")
    if key in ("seed", "output"):
        raise ValueError(f"--grid {text}: give --{key}{'s' if key == 'seed' else ''} in its place")
    return key, split_values(values)


def split_values(text: str) -> list[str]:
    """Parts between the commas, or bars, that lie outside of brackets and quotes. Raises ValueError for an empty one."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "([{") - (character in ")]}") if not quote else 0
        if character in ",|" and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if not all(parts) or depth or quote:
        raise ValueError(f"--grid: cannot tell the values {text!r} apart: put commas or bars between them, close brackets")
    return parts


def folder_name(chosen: Sequence[tuple[str, str]]) -> str:
    """What stands for the values of a point in the name of its folder, with a dash at the end; "" for no values."""
    parts = []
    for key, value in chosen:
        is_table = value[0] in "{["
        words = re.sub(r"\b(type|weights)\b", "", value) if is_table else value
        said = re.sub(r"[^A-Za-z0-9.+-]+", "-", words).strip("-")
        names_itself = is_table or (value[0].isalpha() and value not in ("true", "false", "null"))
        parts.append(said if names_itself else f"{key.rpartition('.')[2]}-{said}")
    name = "-".join(parts)
    if len(name) > LONGEST:
        name = f"{name[:LONGEST].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"{name}-" if name else ""


def _standing(config: Config, folder: Path) -> str:
    """How far the run of a point is. Raises ValueError when its folder holds something else."""
    own = folder / "config.json"
    if not own.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is no run folder: choose another --output")
        return NEW
    different = different_keys(load_config(str(own)), config)
    if different:
        raise ValueError(
            f"{folder} is a run with another configuration (differs in {', '.join(different[:5])}): choose another --output"
        )
    return COMPLETE if is_finished(config, folder) else STOPPED


# --- running ----------------------------------------------------------------------------------------------------------


def _launcher(asked: Sweep) -> list[str]:
    """Words before `-m MODULE`; none where one process is started plainly."""
    if words := shlex.split(asked.launch):
        own = shlex.split(script("accelerate")) if words[0] == "accelerate" else words[:1]
        if not shutil.which(own[0]):
            raise ValueError(f"--launch {asked.launch}: there is no program {words[0]!r}")
        return [*own, *words[1:]]
    if asked.processes < 1:
        raise ValueError(f"--processes {asked.processes}: give 1 or more")
    if asked.processes == 1:
        return []
    import torch

    cpu = [] if torch.accelerator.is_available() else ["--cpu"]
    return [*shlex.split(script("accelerate")), "launch", *cpu, "--num_processes", str(asked.processes)]


def _run_all(points: Sequence[Point], launcher: Sequence[str], config: str) -> list[Point]:
    """Run the points one after another; those that failed."""
    failed = []
    bar = tqdm(total=sum(point.config.steps for point in points), unit="step", disable=None)
    for number, point in enumerate(points, 1):
        before, start = bar.n, time.perf_counter()
        bar.set_description(f"{number}/{len(points)} {point.folder.name}")
        with point.log.open("ab") as log:
            for steps in _steps_of(point.command(launcher, config), log, point.folder):
                bar.update(before + min(steps, point.config.steps) - bar.n)
        # Not the exit status: DeepSpeed's threads may abort when the interpreter of a complete run ends.
        done = (point.folder / "config.json").is_file() and is_finished(point.config, point.folder)
        bar.update(before + point.config.steps - bar.n)
        how = "complete" if done else "FAILED"
        bar.write(f"{how:<9} {point.folder}  {time.perf_counter() - start:.0f} s")
        failed += [] if done else [point]
    bar.close()
    return failed


def _steps_of(command: Sequence[str], log, folder: Path) -> Iterator[int]:
    """Runs a command to its end, and tells now and then how many steps its run has made.

    Ctrl-C reaches the run too, which saves and stops; that is waited for.
    """
    process = Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT)
    try:
        while process.poll() is None:
            time.sleep(POLL)
            yield steps_done(folder)
    finally:
        process.wait()


def steps_done(folder: Path) -> int:
    """Step of the last whole line of a run's metrics; 0 before the first."""
    line = last_line(folder / "metrics.jsonl", whole=True)
    try:
        return int(json.loads(line)["step"]) if line else 0
    except (ValueError, KeyError, TypeError):
        return 0


def last_line(path: Path, whole: bool = False) -> str:
    """The last line of a file that has anything in it; with `whole` only one that has its end."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 2**16, 0))
        text = file.read().decode(errors="replace")
    lines = [line for line in (text.rpartition("\n")[0] if whole else text).split("\n") if line.strip()]
    return lines[-1].rpartition("\r")[2].strip() if lines else ""


def _draw_front(folders: Sequence[Path], output: Path) -> bool:
    """Compare the runs on one front; whether that went well."""
    command = [sys.executable, "-m", "align.cli", "front", *map(str, folders), f"--output={output}"]
    if folders and run(command, stdin=DEVNULL, check=False).returncode == 0:
        return True
    why = f"could not be drawn: {shlex.join(['paretune', *command[3:]])}" if folders else "has no complete run to show"
    print(f"the front {why}", file=sys.stderr)
    return False
