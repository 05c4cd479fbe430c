"""The keeper: whatever dies, and however, nothing of the command is left. Commands are small Python programs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rollout.keeper import start_keeper
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are only kept track of on Linux")

FAMILY = """
    # A child, a grandchild whose parent is gone, and a block of shared memory. Deaf to SIGTERM when told so; uses a block of
    # somebody else's when its name is given.
    import json, os, signal, subprocess, sys, time
    from multiprocessing import resource_tracker, shared_memory

    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep)
    code = f"import subprocess; print(subprocess.Popen({sleep!r}, stdout=subprocess.DEVNULL, start_new_session=True).pid)"
    orphan = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout)
    memory = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(memory._name, "shared_memory")  # so that nobody cleans up after a SIGKILL
    if sys.argv[2:] not in ([], ["deaf"]):
        other = shared_memory.SharedMemory(sys.argv[2])
        resource_tracker.unregister(other._name, "shared_memory")
    facts = {"pids": [os.getpid(), child.pid, orphan], "memory": memory.name, "stdin": os.path.realpath("/proc/self/fd/0")}
    with open(sys.argv[1] + ".part", "w") as file:
        json.dump(facts, file)
    os.rename(sys.argv[1] + ".part", sys.argv[1])
    time.sleep(600)
"""
OWNER = """
    # Starts a keeper as a trainer does, and sleeps; a fork of its own keeps the pipe open when told so.
    import json, os, subprocess, sys, time
    from rollout.keeper import start_keeper

    command, remove, forks = json.loads(sys.argv[1])
    keeper = start_keeper(command, remove, {**os.environ, "PYTHONPATH": os.getcwd()}, subprocess.DEVNULL)
    if forks:
        fork = os.fork()
        if not fork:
            time.sleep(600)
        print(fork, flush=True)
    print(keeper.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def started():
    """Keepers and owners that a test started; stopped at its end even when it fails."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        family = _tree(process.pid)
        process.terminate()
        process.wait(15)
        _, left = psutil.wait_procs(family, timeout=10)
        for victim in left:
            victim.kill()


@pytest.fixture
def family(tmp_path) -> Callable[..., list[str]]:
    """The command line of a family; what it says of itself appears in `facts`."""
    script = tmp_path / "family.py"
    script.write_text(textwrap.dedent(FAMILY))
    return lambda *more: [sys.executable, str(script), str(tmp_path / "facts"), *more]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder for the keeper to remove."""
    (tmp_path / "scratch" / "deep").mkdir(parents=True)
    (tmp_path / "scratch" / "deep" / "file").write_text("x")
    return tmp_path / "scratch"


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _keep(started, command, remove=()) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started.append(start_keeper(command, [str(folder) for folder in remove], environment, subprocess.DEVNULL))
    return started[-1]


def _own(started, command, remove=(), forks: bool = False) -> subprocess.Popen:
    arguments = json.dumps([command, [str(folder) for folder in remove], forks])
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(owner)
    return owner


def _facts(tmp_path) -> dict:
    _until(lambda: (tmp_path / "facts").exists(), 10)
    return json.loads((tmp_path / "facts").read_text())


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)


def _gone(facts: dict) -> bool:
    return not any(map(_lives, facts["pids"])) and not Path("/dev/shm", facts["memory"]).exists()


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_killed_owner_leaves_nothing(started, family, folder, tmp_path):
    owner = _own(started, family(), [folder])
    facts = _facts(tmp_path)
    assert all(map(_lives, facts["pids"]))
    owner.kill()
    _until(lambda: _gone(facts) and not folder.exists(), 5)


def test_an_owner_whose_fork_holds_the_pipe_leaves_nothing(started, family, tmp_path):
    owner = _own(started, family(), forks=True)
    fork, facts = int(owner.stdout.readline()), _facts(tmp_path)
    owner.kill()
    try:
        _until(lambda: _gone(facts), 5)
        assert _lives(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_the_deaf_are_killed_after_the_grace(started, family, folder, tmp_path):
    keeper = _keep(started, family("deaf"), [folder])
    facts = _facts(tmp_path)
    start = time.monotonic()
    keeper.stdin.close()
    assert keeper.wait(15) == 0
    assert 4 < time.monotonic() - start < 9
    assert _gone(facts)
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_keeper_told_to_stop_stops(started, family, folder, tmp_path, number):
    keeper = _keep(started, family(), [folder])
    facts = _facts(tmp_path)
    keeper.send_signal(number)
    assert keeper.wait(5) == 0
    assert _gone(facts)
    assert not folder.exists()


def test_a_killed_command_takes_the_rest_along(started, family, folder, tmp_path):
    keeper = _keep(started, family("deaf"), [folder])
    facts = _facts(tmp_path)
    time.sleep(0.7)  # the keeper looks five times a second
    os.kill(facts["pids"][0], signal.SIGKILL)
    assert keeper.wait(5) == 128 + signal.SIGKILL
    assert _gone(facts)
    assert not folder.exists()


def test_everything_killed_at_once_leaves_no_shared_memory(started, family, tmp_path):
    keeper = _keep(started, family())
    facts = _facts(tmp_path)
    time.sleep(0.7)  # the keeper looks five times a second
    for pid in facts["pids"]:
        os.kill(pid, signal.SIGKILL)
    keeper.wait(5)
    assert _gone(facts)


def test_a_killed_keeper_takes_the_command_along(started, family, tmp_path):
    keeper = _keep(started, family())
    facts = _facts(tmp_path)
    keeper.kill()
    try:
        _until(lambda: not _lives(facts["pids"][0]), 5)
    finally:
        for pid in facts["pids"][1:]:
            os.kill(pid, signal.SIGKILL)
        Path("/dev/shm", facts["memory"]).unlink(missing_ok=True)


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(3)", 3)])
def test_the_exit_status_is_the_commands(started, folder, code, status):
    assert _keep(started, [sys.executable, "-c", code], [folder]).wait(5) == status
    assert not folder.exists()


def test_a_command_that_cannot_start_is_told_apart(started, folder):
    assert _keep(started, ["/no/such/program"], [folder]).wait(5) == 127
    assert not folder.exists()


def test_ctrl_c_in_the_owners_terminal_reaches_nobody(started, family, tmp_path):
    owner = _own(started, family())
    keeper, facts = int(owner.stdout.readline()), _facts(tmp_path)
    os.killpg(owner.pid, signal.SIGINT)
    owner.wait(5)  # the owner does end by it, and only that ends the command
    assert owner.returncode != 0
    _until(lambda: _gone(facts) and not _lives(keeper), 5)


def test_ctrl_c_alone_ends_nothing(started, family, tmp_path):
    deaf = textwrap.dedent(OWNER).replace("import json,", "import signal; signal.signal(2, lambda *_: None)\nimport json,")
    arguments = json.dumps([family(), [], False])
    owner = subprocess.Popen(
        [sys.executable, "-c", deaf, arguments], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    started.append(owner)
    keeper, facts = int(owner.stdout.readline()), _facts(tmp_path)
    os.killpg(owner.pid, signal.SIGINT)
    os.kill(keeper, signal.SIGINT)
    time.sleep(1)
    assert all(map(_lives, [owner.pid, keeper, *facts["pids"]]))
    owner.kill()
    _until(lambda: _gone(facts), 5)


def test_the_command_reads_nothing_and_inherits_no_pipe(started, family, tmp_path):
    keeper = _keep(started, family())
    facts = _facts(tmp_path)
    assert facts["stdin"] == "/dev/null"
    pipe = os.readlink(f"/proc/{os.getpid()}/fd/{keeper.stdin.fileno()}")
    for pid in facts["pids"]:
        assert pipe not in [os.path.realpath(link).rpartition("/")[2] for link in Path(f"/proc/{pid}/fd").iterdir()]


def test_the_shared_memory_of_others_stays(started, family, tmp_path):
    from multiprocessing import shared_memory

    before = shared_memory.SharedMemory(create=True, size=64)
    keeper = _keep(started, family(before.name))
    facts = _facts(tmp_path)
    after = shared_memory.SharedMemory(create=True, size=64)
    time.sleep(0.7)
    try:
        keeper.stdin.close()
        keeper.wait(10)
        assert _gone(facts)
        assert Path("/dev/shm", before.name).exists()
        assert Path("/dev/shm", after.name).exists()
    finally:
        for memory in (before, after):
            memory.close()
            memory.unlink()


def test_a_keeper_without_a_command_is_a_janitor(started, folder):
    keeper = _keep(started, [], [folder])
    time.sleep(0.5)
    assert folder.exists()
    keeper.stdin.close()
    keeper.wait(5)
    assert not folder.exists()
