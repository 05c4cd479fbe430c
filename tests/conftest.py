"""Shared fixtures. The tests are flat, and real models run in them: tiny ones."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from align.guard import check_imports
from align.launch import share_cores
from rollout.server import ServerOptions
from tests import forks

ROOT = Path(__file__).resolve().parent.parent
START = str(ROOT / "tests" / "start")  # what processes do first
check_imports()
share_cores()
settings.register_profile("paretune", deadline=None, derandomize=True)  # a busy machine fails no test, and nor does chance
settings.load_profile("paretune")
pytest.register_assert_rewrite("tests.code_judge", "tests.judge_service")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub
os.environ["PYTHONPATH"] = os.pathsep.join([START, *filter(None, [os.environ.get("PYTHONPATH")])])
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are deaf to it, and so are their children

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
WEIGHTS = {"accuracy": 0.5, "brevity": 0.3, "clarity": 0.2}
FIXED = f"--weighting={json.dumps({'type': 'fixed', 'weights': WEIGHTS})}"
SMALL = (  # overrides that make the quickstart a matter of seconds
    "--steps=4",
    FIXED,
    "--rollout.prompts_per_batch=4",
    "--rollout.samples_per_prompt=4",
    "--prompts.train.args.count=32",
    "--prompts.evaluation.args.count=16",
    "--evaluation.every=2",
    "--checkpoint.every=2",
)


SERVER = ServerOptions(
    model="policy",
    revision="",
    dtype="float32",
    max_concurrent=16,
    max_model_len=128,
    tensor_parallel=1,
    gpu_memory=0.9,
    cpu_cache_gib=0.1,
    trust_remote_code=False,
    sync="directory",
    args={},
)


@pytest.fixture
def launch() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m MODULE ARGUMENTS` (several by torch's launcher) without importing, and captures the output."""

    def run(module: str, *arguments: str, processes: int = 1, cwd: Path = ROOT, timeout: int = 240):
        return forks.run(
            torchrun(module, *arguments, processes=processes), cwd=cwd, env=environment(processes), timeout=timeout
        )

    return run


def torchrun(module: str, *arguments: str, processes: int) -> list[str]:
    """What `command` comes to in the end: accelerate's launcher and ours replace themselves by torch's."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    return [sys.executable, *several, "-m", module, *arguments]


def command(module: str, *arguments: str, processes: int = 1) -> list[str]:
    """The command line that runs one of our modules."""
    if processes == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    return [*launcher, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", module, *arguments]


def environment(processes: int) -> dict[str, str]:
    """Environment of a child process; with several, each gets one thread so that they do not fight for the cores."""
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), START]), "ACCELERATE_USE_CPU": "true", **threads}


def refused_in_a_thread(act: Callable[[], object]) -> list[str]:
    """What a RuntimeError says that `act` raises where it is not in the main thread."""
    reasons = []

    def ask():
        try:
            act()
        except RuntimeError as error:
            reasons.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return reasons


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def overrides(output: Path, *more: str) -> Sequence[str]:
    """Arguments of a small training run into a folder."""
    return ["--config", QUICKSTART, f"--output={output}", *SMALL, *more]


@contextmanager
def serve(model: str, logs: Path, count: int = 1):
    """Real vLLM servers of a model, for the time of the block; skips where vLLM is not installed."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (scripts/setup vllm)")
    from rollout.workers import LocalWorkers

    options = replace(SERVER, model=model, max_concurrent=64, cpu_cache_gib=0.25)
    workers = LocalWorkers(options, count, logs, [[]] * count)
    workers.start()
    try:
        yield workers
    finally:
        workers.close()


@pytest.fixture(scope="session")
def vllm_workers(tmp_path_factory):
    """One server with the policy that ships; shared, so whoever changes its weights puts them back."""
    with serve(str(ROOT / "align" / "policies" / "arithmetic"), tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.fixture
def make_learner(tmp_path: Path):
    """Builds a learner in this process, as `align.train` does, ready for `learner.train()`."""

    def make(*more: str, name: str = "run"):
        from align.callbacks import ScheduleCallback
        from align.plan import Schedule
        from align.runfolder import open_run
        from align.train import build, build_learner

        run = open_run(QUICKSTART, "", [*SMALL, f"--output={tmp_path / name}", *more])
        run.folder.mkdir(parents=True)
        schedule = Schedule(run.config.steps, run.config.evaluation.every, run.config.checkpoint.every)
        return build_learner(run, build(run), schedule, [ScheduleCallback(schedule, lambda: False)])

    return make
