"""Local vLLM servers: started, watched, started again, stopped. Most tests run a stand-in for vLLM, the last ones vLLM."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from align.load import load_config
from rollout.workers import LocalWorkers, WorkerError
from tests.conftest import QUICKSTART, ROOT, SERVER

MODEL = str(ROOT / "align" / "policies" / "arithmetic")
OPTIONS = replace(SERVER, model=MODEL)
STAND_IN = """
    # Answers as vLLM does, with a child for its engine. The model's name says what goes wrong.
    import argparse, http.server, os, socket, subprocess, sys, tempfile, time

    parser = argparse.ArgumentParser()
    for name in ("--model", "--host"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    if options.model.endswith("broken"):
        print("(APIServer pid=7) INFO 11-21 10:56:31 [api.py:3] An error: not one", flush=True)
        raise OSError("no weights in 'broken'")
    if options.model.endswith("late"):
        time.sleep(600)
    tempfile.mkstemp()
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
            status = (503 if engine.poll() else 200) if self.path == "/health" else 200 if allowed else 401
            body = b'{"data": [{"max_model_len": 128}]}' if status == 200 and self.path == "/v1/models" else b""
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(http.server.HTTPServer):
        def server_bind(self):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            super().server_bind()

    Server((options.host, options.port), Handler).serve_forever()
"""
TRAINER = """
    # Starts workers as a trainer does, says who they are, and waits to be killed.
    import json, sys, time
    from pathlib import Path
    from rollout.server import ServerOptions
    from rollout.workers import LocalWorkers

    options, count, logs = json.loads(sys.argv[1])
    workers = LocalWorkers(ServerOptions(**options), count, Path(logs), [])
    workers.start()
    print(json.dumps([workers.urls, [pid for i in range(count) for pid in workers.pids(i)]]), flush=True)
    time.sleep(600)
"""
vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: scripts/setup vllm")


@pytest.fixture
def scratch(monkeypatch) -> Iterator[Path]:
    """Where servers' temporary folders go; short, since sockets are in them."""
    with tempfile.TemporaryDirectory(prefix="scratch-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def stand_in(tmp_path, scratch, monkeypatch) -> Path:
    """Puts the stand-in where servers look for vLLM."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(textwrap.dedent(STAND_IN))
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    return tmp_path


@pytest.fixture
def make(stand_in):
    """Makes workers on the stand-in; closed at the end."""
    made = []

    def workers(count: int = 1, model: str = "policy", **more) -> LocalWorkers:
        made.append(LocalWorkers(replace(OPTIONS, model=model), count, stand_in / "logs", [[]] * count, **more))
        return made[-1]

    yield workers
    for one in made:
        one.close()


def _status(url: str, path: str, key: str = "", method: str = "GET") -> int:
    request = urllib.request.Request(url + path, method=method, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:
        return 0


def _alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.05)


def _polled(workers: LocalWorkers, seconds: float) -> list[int]:
    found: list[int] = []
    _until(lambda: found or found.extend(workers.poll()), seconds)
    return found


def _free(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind((host, int(port)))
            return True
    return False


def _shared() -> set[tuple[str, int]]:
    """The files in /dev/shm: names and inodes."""
    return {(path.name, path.stat().st_ino) for path in Path("/dev/shm").iterdir() if path.is_file()}


def _memory(pids: list[int]) -> set[tuple[str, int]]:
    """Those of them that processes have mapped."""
    maps = [
        line.split() for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line
    ]
    return {file for file in _shared() if str(file[1]) in {fields[4] for fields in maps}}


def _trainer(model: str, count: int, logs: Path) -> tuple[subprocess.Popen, list[str], list[int]]:
    options = {name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | {"model": model}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER), json.dumps([options, count, str(logs)])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    urls, pids = json.loads(process.stdout.readline())
    return process, urls, pids


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _paretune_worker(stand_in: Path, *more: str, model: str = "builtin:arithmetic") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{stand_in / 'fake'}:{ROOT}"}
    command = [sys.executable, "-m", "align.cli", "worker", model, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


# --- with the stand-in --------------------------------------------------------------------------------------------------


def test_two_workers_have_a_key_and_leave_nothing(make, scratch):
    workers = make(2)
    workers.start()
    pids = [pid for i in range(2) for pid in workers.pids(i)]
    assert len(set(workers.urls)) == 2
    assert len(pids) == 4
    assert [len(os.listdir(folder)) for folder in scratch.iterdir()] == [1, 1]
    assert [_status(url, "/v1/models", workers.key) for url in workers.urls] == [200, 200]
    assert [_status(url, "/v1/models") for url in workers.urls] == [401, 401]
    assert workers.poll() == []
    assert not any(map(_free, workers.urls))
    workers.close()
    workers.close()
    assert not _alive(pids)
    assert not os.listdir(scratch)
    assert all(map(_free, workers.urls))


def test_workers_are_closed_even_when_a_fork_holds_their_pipes(make):
    workers = make()
    workers.start()
    pids = workers.pids(0)
    fork = os.fork()
    if not fork:
        time.sleep(60)
        os._exit(0)
    try:
        workers.close()
        assert not _alive(pids)
        assert _alive([fork])
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)


def test_workers_that_were_never_started_can_be_closed(make):
    workers = make()
    assert workers.poll() == []
    workers.close()


def test_a_worker_is_restarted_at_its_address_until_it_has_been_too_often(make, stand_in):
    workers = make(2, restarts=1)
    workers.start()
    other = workers.pids(0)
    old = workers.pids(1)
    os.kill(old[0], signal.SIGKILL)
    assert _polled(workers, 5) == [1]
    assert workers.poll() == []
    workers.restart(1)
    assert not _alive(old)
    assert _status(workers.urls[1], "/v1/models", workers.key) == 200
    assert workers.pids(0) == other
    workers.kill(1)
    assert workers.poll() == [1]
    with pytest.raises(WorkerError, match=r"worker 1 ended again after 1 restarts[\s\S]*worker-1\.log"):
        workers.restart(1)
    assert workers.poll() == []


def test_a_server_whose_engine_is_gone_counts_as_dead(make):
    workers = make()
    workers.start()
    os.kill(workers.pids(0)[1], signal.SIGKILL)
    assert _polled(workers, 5) == [0]


def test_a_stopped_worker_can_be_killed(make):
    workers = make()
    workers.start()
    pids = workers.pids(0)
    os.kill(pids[0], signal.SIGSTOP)
    workers.kill(0)
    assert not _alive(pids)
    assert workers.poll() == [0]


def test_a_killed_keeper_is_noticed_and_nothing_is_left(make):
    workers = make()
    workers.start()
    pids = workers.pids(0)
    workers.poll()
    psutil.Process(pids[0]).parent().kill()
    assert _polled(workers, 5) == [0]
    workers.close()
    assert not _alive(pids)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("broken", r"worker 0 ended while starting, with status 1\n  OSError: no weights in 'broken'[\s\S]*worker-0\.log"),
        ("late", r"worker 0 does not answer after 2 seconds[\s\S]*worker-0\.log"),
    ],
)
def test_a_worker_that_does_not_start_says_why(make, scratch, model, message):
    workers = make(model=model, start_timeout=2.0 if model == "late" else 30.0)
    with pytest.raises(WorkerError, match=message):
        workers.start()
    assert not os.listdir(scratch)


def test_a_killed_trainer_leaves_nothing(stand_in, scratch):
    trainer, urls, pids = _trainer("policy", 2, stand_in / "logs")
    assert len(_alive(pids)) == 4
    trainer.kill()
    trainer.wait()
    _until(lambda: not _alive(pids) and not os.listdir(scratch) and all(map(_free, urls)), 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_paretune_worker_serves_with_a_key_and_takes_its_server_along(stand_in, number):
    port = _free_port()
    with _paretune_worker(stand_in, "--port", str(port)) as worker:
        lines = [worker.stdout.readline() for _ in range(5)]
        url, key = f"http://127.0.0.1:{port}", lines[1].strip().partition("=")[2]
        assert lines[2] == f"ready on {url} (builtin:arithmetic, 128 tokens of context; key in PARETUNE_VLLM_KEY). " + (
            "Start the trainer with\n"
        )
        assert lines[3] == lines[1] == f"export PARETUNE_VLLM_KEY={key}\n"  # shown again, below what vLLM has to say
        assert lines[4] == f"paretune train ... --rollout.engine='{{type: vllm, urls: [\"{url}\"]}}'\n"
        assert load_config(QUICKSTART, shlex.split(lines[4])[3:]).rollout.engine.urls == [url]
        assert _status(url, "/v1/models", key) == 200
        tree = psutil.Process(worker.pid).children(recursive=True)
        assert any("vllm.entrypoints.openai.api_server" in process.cmdline() for process in tree)
        assert not any(key in word for process in tree for word in process.cmdline())
        worker.send_signal(number)
        try:
            _until(lambda: not _alive([process.pid for process in tree]), 20)
        finally:
            worker.kill()


def test_paretune_worker_names_this_machine_and_no_key_of_the_users(stand_in, monkeypatch):
    monkeypatch.setenv("PARETUNE_VLLM_KEY", "the-users-own")
    port = _free_port()
    with _paretune_worker(stand_in, "--port", str(port), "--host", "0.0.0.0", "--sync", "transfer") as worker:
        told = worker.stdout.readline() + worker.stdout.readline()
        worker.terminate()
        told += worker.stdout.read()
    assert told.startswith(f"ready on http://{socket.gethostname()}:{port} (")
    assert f'urls: ["http://{socket.gethostname()}:{port}"], sync: transfer}}' in told
    assert "the-users-own" not in told


@pytest.mark.parametrize("model", ["broken", "late"])
def test_paretune_worker_whose_server_ends_early_ends_too_and_says_nothing_of_ready(stand_in, model):
    with _paretune_worker(stand_in, "--port", str(_free_port()), model=f"someone/{model}") as worker:
        worker.stdout.readline()
        if model == "late":
            time.sleep(3.0)  # it looks for an answer meanwhile
            worker.terminate()
        assert "ready" not in worker.stdout.read()
        assert worker.wait(30) == (0 if model == "late" else 1)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "Address already in use; give another --port, or --host"),
        ("192.0.2.1", "Cannot assign requested address"),  # of documents, and of no machine
    ],
)
def test_paretune_worker_says_at_once_where_it_cannot_listen(launch, monkeypatch, host, words):
    """Also where the other one would share its port, as vLLM does: half of all requests would go astray."""
    monkeypatch.setenv("PARETUNE_VLLM_KEY", "key")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = launch("align.cli", "worker", "builtin:arithmetic", "--host", host, "--port", str(port), timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot listen on {host}:{port}: {words}")
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_paretune_worker_listens_elsewhere_with_a_key_only(launch, monkeypatch):
    monkeypatch.delenv("PARETUNE_VLLM_KEY", raising=False)
    result = launch("align.cli", "worker", "builtin:arithmetic", "--host", "0.0.0.0")
    assert result.returncode == 2
    assert "set PARETUNE_VLLM_KEY" in result.stderr


# --- with vLLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """One real server, shared by the tests below in their order."""
    made = LocalWorkers(OPTIONS, 1, tmp_path_factory.mktemp("vllm") / "logs", [[]])
    made.start()
    yield made
    made.close()


@vllm
@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/update_weights", "/pause", "/v1/completions", "/weight_info", "/tokenize"]
)
def test_vllm_does_nothing_without_the_key(workers, path):
    url, key = workers.urls[0], workers.key
    for method in ("GET", "POST"):
        assert _status(url, path, method=method) == 401
        assert _status(url, path, "wrong", method=method) == 401
        assert _status(url, path, key, method=method) not in (0, 401)
    assert _status(url, "/health") == 200
    assert _status(url, "/resume", key, method="POST") == 200


@vllm
def test_vllm_killed_is_noticed_leaves_nothing_and_starts_again(workers):
    url, pids = workers.urls[0], workers.pids(0)
    memory = _memory(pids)
    assert len(memory) > 2
    os.kill(pids[0], signal.SIGKILL)
    assert _polled(workers, 20) == [0]
    workers.restart(0)
    assert not _alive(pids)
    assert not memory & _shared()
    assert workers.urls[0] == url
    assert _status(url, "/v1/models", workers.key) == 200


@vllm
def test_vllm_without_its_engine_is_noticed_and_leaves_nothing(workers):
    pids = workers.pids(0)
    memory = _memory(pids)
    os.kill(next(pid for pid in pids if "VLLM::EngineCore" in psutil.Process(pid).cmdline()), signal.SIGKILL)
    assert _polled(workers, 20) == [0]
    workers.close()
    assert not _alive(pids)
    assert not memory & _shared()
    assert _free(workers.urls[0])


@vllm
def test_vllm_with_its_trainer_killed_leaves_nothing(tmp_path, scratch):
    trainer, urls, pids = _trainer(MODEL, 1, tmp_path)
    assert len(_alive(pids)) > 2
    memory = _memory(pids)
    trainer.kill()
    trainer.wait()
    _until(lambda: not _alive(pids) and not os.listdir(scratch) and _free(urls[0]), 15)
    assert not memory & _shared()


@vllm
def test_vllm_without_its_model_says_so(tmp_path):
    broken = LocalWorkers(replace(OPTIONS, model="/no/such/model"), 1, tmp_path, [])
    with pytest.raises(WorkerError, match=r"worker 0 ended while starting[\s\S]*/no/such/model") as caught:
        broken.start()
    assert len(str(caught.value).splitlines()) <= 20
