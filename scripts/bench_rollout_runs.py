"""The parts of `bench_rollout.py` that train: what a push of weights costs, what lookahead gains, what memory is taken."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
from pyarrow.parquet import read_table
from safetensors.torch import load_file
from transformers import TrainerCallback

from rollout.server import SERVERS_KEY
from rollout.server_log import telling_lines
from scripts.bench_probe import start
from scripts.bench_rollout_common import CACHE_GIB, GROUP, ROOT, Setting, in_turn, ratios, say, serve, spread

STEPS = 4  # of a run, the first one not counted
HALF = 4  # steps of half a run that is stopped and resumed


def overrides(setting: Setting, samples: int, micro: int) -> list[str]:
    """What a training run on vLLM changes in the quickstart."""
    trl = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "disable_tqdm": True}
    names = ("accuracy", "brevity", "clarity")
    return [
        f"--policy.model={setting.policy}", "--rollout.engine.type=vllm", f"--rollout.prompts_per_batch={samples // GROUP}",
        f"--rollout.samples_per_prompt={GROUP}", f"--rollout.max_tokens={setting.tokens}",
        f"--learner.micro_batch_size={micro}", f"--rollout.engine.cpu_cache_gib={CACHE_GIB}", f"--trl={json.dumps(trl)}",
        f"--weighting={json.dumps({'type': 'fixed', 'weights': dict.fromkeys(names, 1.0)})}",
    ]  # fmt: skip


def train_here(setting: Setting, name: str, steps: int, changes: Sequence[str], delay: float) -> tuple[list[float], Path]:
    """Seconds of every step of a run, from end to end, without the first; and its folder."""
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Lets the training sleep, and takes the time."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(delay)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    folder = setting.folder / name
    folder.mkdir()
    learner = start(folder, steps, changes, [Clock()])
    sample = learner.rollouts.sampler.sample
    learner.rollouts.sampler.sample = lambda *args: (time.sleep(delay), sample(*args))[1]
    try:
        learner.train()
    finally:
        learner.rollouts.close()
    return np.diff(ends).tolist(), folder / "run"


def sync(setting: Setting) -> dict[str, Any]:
    """Push and verification as a share of a step."""
    figures: dict[str, Any] = {}
    for model in dict.fromkeys((setting.model, "shipped")):
        one = replace(setting, model=model)
        changes, steps = overrides(one, setting.samples, min(32, setting.samples)), max(STEPS, setting.rounds + 1)
        step_s, run = train_here(one, f"sync-{model}", steps, changes, 0.0)
        rows = [json.loads(line) for line in (run / "timings.jsonl").read_text(encoding="utf-8").splitlines()][1:]
        pushes = [row["time/sync"] for row in rows]
        figures[model] = {
            "batch": [setting.samples, setting.tokens],
            "sync_s": spread(pushes),
            "step_s": spread(step_s),
            "sync_share": ratios(pushes, step_s),
            "sampling_share": ratios([row["time/sampling"] for row in rows], step_s),
            "trl_step_time_s": spread([row["step_time"] for row in rows]),
        }
    return figures


def lookahead(setting: Setting) -> dict[str, Any]:
    """Step times with and without lookahead where sampling and training take equally long, and no processor."""
    small = replace(setting, model="shipped", tokens=min(16, setting.tokens))
    seconds: dict[str, list[float]] = {"0": [], "1": []}
    with serve(small, 1) as workers, patch.dict(os.environ, {SERVERS_KEY: workers.key}):
        changes = [*overrides(small, 2 * GROUP, 2 * GROUP), f"--rollout.engine.urls={json.dumps(workers.urls)}"]
        for i in range(setting.rounds):
            for ahead in in_turn(list(seconds), i):
                more = [*changes, f"--rollout.lookahead={ahead}"]
                step_s = train_here(small, f"lookahead-{ahead}-{i}", STEPS, more, setting.delay)[0]
                seconds[ahead].append(statistics.median(step_s))
                say(f"round {i}, lookahead {ahead}: {seconds[ahead][-1]:.2f} s")
    step_s = {f"step_s_{name}": spread(values) for name, values in seconds.items()}
    return {"delay_s": setting.delay, **step_s, "ratio": ratios(seconds["1"], seconds["0"])}


def memory(setting: Setting) -> dict[str, Any]:
    """Peaks of the processes of three ways to train, in MiB."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    files = ROOT / "configs" / "accelerate"
    ways = {
        "one": [sys.executable],
        "zero2": [*accelerate, str(files / "zero2.yaml"), "--num_processes", "2", "--mixed_precision", "no"],
        "zero3": [*accelerate, str(files / "zero3_cpu.yaml")],
    }
    samples = min(64, setting.samples)
    changes = [*overrides(setting, samples, min(8, samples // 2)), f"--steps={STEPS}", "--evaluation.every=0"]
    figures: dict[str, Any] = {"batch": [samples, setting.tokens]}
    for name, launcher in ways.items():
        run = setting.folder / f"memory-{name}"
        module = ["-m", "align.train", "--config", str(ROOT / "configs" / "quickstart.yaml"), f"--output={run}"]
        figures[name] = peaks([*launcher, *module, *changes], run, {} if name == "one" else {"OMP_NUM_THREADS": "1"})
        say(f"{name}: {figures[name]}")
    return figures


def peaks(command: Sequence[str], run: Path, more: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Largest resident memory by process, in MiB: until the last step is logged, and of the whole run with its saving."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    environment.pop("ACCELERATE_USE_CPU", None)  # it leaves no room for DeepSpeed
    found: dict[str, dict[str, float]] = {"training": {}, "whole": {}}
    with (run.with_suffix(".log")).open("w+b") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                metrics = run / "metrics.jsonl"
                done = metrics.exists() and metrics.read_bytes().count(b"\n") >= STEPS
                for name, peak in resident(process.pid).items():
                    for kind in ("whole",) if done else ("whole", "training"):
                        found[kind][name] = max(peak, found[kind].get(name, 0.0))
                time.sleep(0.2)
        finally:
            end_tree(process.pid)
        log.seek(0)
        text = log.read().decode(errors="replace")
    if f"trained {STEPS} steps" not in text:  # DeepSpeed may abort after it, when the interpreter ends
        raise RuntimeError("\n  ".join(["the run failed:", *telling_lines(text)]))
    return found


def resident(pid: int) -> dict[str, float]:
    """Largest resident memory so far of a process and its descendants, in MiB, by what they are."""
    found: dict[str, float] = {}
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            line, rank = " ".join(process.cmdline()), process.environ().get("RANK", "0")
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").split()
            peak = int(status[status.index("VmHWM:") + 1]) / 1024
        except (psutil.Error, OSError, ValueError):
            continue  # it has just ended
        kinds = {"accelerate.commands": "launcher", "rollout.keeper": "keeper", "api_server": "server"}
        kinds |= {"VLLM::Worker": "server's model", "VLLM::": "server's engine", "align.train": f"learner {rank}"}
        for name in [kind for word, kind in kinds.items() if word in line][:1]:
            found[name] = max(peak, found.get(name, 0.0))
    return found


def end_tree(pid: int) -> None:
    """End a process and what it started."""
    try:
        processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        process.terminate()
    for process in psutil.wait_procs(processes, 20)[1]:
        process.kill()


def resume(setting: Setting) -> dict[str, Any]:
    """How far a run lies from the same run a second time, and from the same stopped half-way and resumed."""
    small, quickstart = replace(setting, model="shipped"), str(ROOT / "configs" / "quickstart.yaml")
    schedule = [f"--steps={2 * HALF}", f"--evaluation.every={HALF}", f"--checkpoint.every={HALF}"]
    with serve(small, 1) as workers, patch.dict(os.environ, {SERVERS_KEY: workers.key}):
        servers = ["--rollout.engine.type=vllm", f"--rollout.engine.urls={json.dumps(workers.urls)}"]
        for name, more in {"whole": [], "again": [], "parts": [f"--steps={HALF}"]}.items():
            output = f"--output={setting.folder / name}"
            train_apart(["--config", quickstart, output, *servers, *schedule, *more])
        train_apart(["--resume", str(setting.folder / "parts"), f"--steps={2 * HALF}"])
    whole = setting.folder / "whole"
    return {name: differences_of(whole, setting.folder / name) for name in ("again", "parts")}


def train_apart(arguments: Sequence[str]) -> None:
    """Train in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "align.train", *arguments], cwd=ROOT, env=environment, check=True, stdout=sys.stderr
    )


def differences_of(first: Path, second: Path) -> dict[str, Any]:
    """Two runs: whether data and versions are the same, share of other samples, largest differences of the rest."""
    tables = [read_table(run / "samples").to_pylist() for run in (first, second)]
    pairs = list(zip(*tables, strict=True))
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (first, second)]
    points = [[json.loads(line)["values"] for line in (run / "archive.jsonl").open()] for run in (first, second)]
    last = f"checkpoints/checkpoint-{2 * HALF}/model.safetensors"
    weights = [load_file(run / last) for run in (first, second)]
    return {
        "same_prompts_and_versions": all(a[k] == b[k] for a, b in pairs for k in ("prompt", "policy_version")),
        "other_samples": statistics.mean(a["text"] != b["text"] for a, b in pairs),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "largest_held_out_difference": max(abs(a[k] - b[k]) for a, b in zip(*points, strict=True) for k in a),
        "largest_weight_difference": max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]),
    }
