"""vLLM servers on this machine: started, watched, started again, and stopped, each under a keeper of its own."""

import contextlib
import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from rollout.keeper import GRACE, start_keeper, stop_keeper
from rollout.sampler import RolloutError
from rollout.server import ServerOptions, child_environment, server_command, server_environment
from rollout.server_log import telling_lines

_STOP_TIMEOUT = GRACE + 35.0  # seconds; a keeper takes no longer, unless something cannot be killed
_SILENT, _REFUSED = 0, -1  # in place of a status, when a server does not answer, and when nobody listens
_POLL = 0.2  # seconds between looks at a server that starts
_TAIL = 400_000  # bytes of a log that an error is looked for in
_LONGEST_SOCKET_FOLDER = 60  # characters: a socket's path, with a UUID and more at its end, has 107 at most
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class WorkerError(RolloutError):
    """A vLLM server could not be started, or not be started again."""


@dataclass(slots=True, eq=False)
class _Worker:
    """One server; `keeper` is None until it is first started."""

    number: int
    port: socket.socket
    gpus: Sequence[int]
    log: Path
    keeper: subprocess.Popen[bytes] | None = None
    scratch: str = ""
    log_start: int = 0
    restarts: int = 0
    reported: bool = False
    tree: list[psutil.Process] = field(default_factory=list)


class LocalWorkers:
    """Several vLLM servers with the same model, for the main process of a trainer.

    They end with this process, whatever ends it. Their addresses stay the same when they are started again.

    Args:
        options: What each of them serves.
        count: Number of servers, at least 1.
        logs: Folder for worker-0.log, worker-1.log, ...; made when missing, and the logs are appended to.
        gpus: Devices of each server, counted among those visible here; none at all means that vLLM is its CPU build.
        host: Address to listen on, which must also be one to call.
        restarts: How often each of them may be started again.
        start_timeout: Seconds until a server must answer.

    Raises:
        ValueError: `count` is below 1, or does not match `gpus`, or `host` is none of this machine.
    """

    def __init__(
        self,
        options: ServerOptions,
        count: int,
        logs: Path,
        gpus: Sequence[Sequence[int]],
        host: str = "127.0.0.1",
        restarts: int = 3,
        start_timeout: float = 600.0,
    ):
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        if gpus and len(gpus) != count:
            raise ValueError(f"gpus={list(gpus)} must have one entry for each of the {count} workers")
        self.key = secrets.token_urlsafe(32)
        self._options, self._host = options, host
        self._restarts, self._start_timeout = restarts, start_timeout
        self._cpu = not any(gpus)
        self._threads = max(1, len(os.sched_getaffinity(0)) // count)
        logs.mkdir(parents=True, exist_ok=True)
        self._workers = [_Worker(i, _reserve(host), gpus[i] if gpus else (), logs / f"worker-{i}.log") for i in range(count)]
        name = f"[{host}]" if ":" in host else host
        self.urls = tuple(f"http://{name}:{worker.port.getsockname()[1]}" for worker in self._workers)

    def start(self) -> None:
        """Start all at once and wait until each of them answers.

        Raises:
            WorkerError: One of them ended, or was late; then none is left.
        """
        try:
            for worker in self._workers:
                self._launch(worker)
            self._wait_until_up(self._workers)
        except BaseException:
            self.close()
            raise

    def poll(self) -> list[int]:
        """Numbers of the workers that died since the last call.

        Also counts as dead: a server that no longer listens, or says that its engine is gone.
        """
        found = []
        for worker in self._workers:
            if worker.keeper is None or worker.reported:
                continue
            _note_tree(worker)
            if worker.keeper.poll() is not None or self._health(worker) in (_REFUSED, 503):
                worker.reported = True
                found.append(worker.number)
        return found

    def restart(self, index: int) -> None:
        """Start a worker again at its address, and wait until it answers. What is left of the old one is stopped.

        Raises:
            WorkerError: It was started again too often, or it ended, or it was late.
        """
        worker = self._workers[index]
        _stop([worker])
        if worker.restarts >= self._restarts:
            raise WorkerError(
                f"vLLM worker {index} ended again after {worker.restarts} restarts, and no more are allowed"
                f"{_told(worker)}\nIts log: {worker.log}"
            )
        worker.restarts += 1
        try:
            self._launch(worker)
            self._wait_until_up([worker])
        except BaseException:
            _stop([worker])
            raise

    def kill(self, index: int) -> None:
        """Kill a worker at once, as when it hangs. `poll` then reports it."""
        worker = self._workers[index]
        _note_tree(worker)
        _kill(worker.tree)
        if worker.keeper is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.keeper.wait(_STOP_TIMEOUT)

    def pids(self, index: int) -> list[int]:
        """Process ids of a worker: its server's, then those of the server's descendants; empty when it is gone."""
        return [process.pid for process in _tree(self._workers[index])]

    def close(self) -> None:
        """Stop all workers and wait until nothing is left of them. Once is enough, and more does no harm."""
        _stop(self._workers)
        for worker in self._workers:
            worker.keeper = None
            worker.port.close()
            if worker.scratch:
                shutil.rmtree(worker.scratch, ignore_errors=True)

    def _launch(self, worker: _Worker) -> None:
        worker.scratch = _scratch_folder()
        own = {"TMPDIR": worker.scratch, "VLLM_RPC_BASE_PATH": worker.scratch}  # sockets, which a killed server leaves
        needed = server_environment(self.key, self._cpu, self._threads, worker.gpus, self._options)
        command = server_command(self._options, self._host, worker.port.getsockname()[1], self._cpu)
        with worker.log.open("ab") as log:
            worker.log_start = log.seek(0, os.SEEK_END)
            worker.keeper = start_keeper(command, [worker.scratch], child_environment(os.environ, needed | own), log)
        worker.reported, worker.tree = False, []

    def _wait_until_up(self, workers: Sequence[_Worker]) -> None:
        deadline = time.monotonic() + self._start_timeout
        waiting = list(workers)
        name = f"vLLM worker {workers[0].number}" if len(workers) == 1 else f"{len(workers)} vLLM workers"
        if not sys.stderr.isatty():
            print(f"waiting for {name}", file=sys.stderr, flush=True)
        with tqdm(total=len(workers), desc=f"waiting for {name}", leave=False, disable=None) as progress:
            while waiting:
                for worker in list(waiting):
                    if worker.keeper.poll() is not None:
                        raise _failure(worker, f"ended while starting, with status {worker.keeper.returncode}")
                    if self._health(worker) == 200 and self._status(worker, "/v1/models") == 200:
                        _note_tree(worker)
                        waiting.remove(worker)
                        progress.update()
                if waiting and time.monotonic() > deadline:
                    raise _failure(waiting[0], f"does not answer after {self._start_timeout:g} seconds")
                progress.refresh()
                time.sleep(_POLL if waiting else 0)

    def _health(self, worker: _Worker) -> int:
        return self._status(worker, "/health")

    def _status(self, worker: _Worker, path: str) -> int:
        """Status of an answer; _REFUSED when nobody listens, _SILENT when there is no answer."""
        request = urllib.request.Request(self.urls[worker.number] + path, headers={"Authorization": f"Bearer {self.key}"})
        try:
            with _DIRECT.open(request, timeout=5.0) as response:
                return response.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except urllib.error.URLError as error:
            return _REFUSED if isinstance(error.reason, ConnectionRefusedError) else _SILENT
        except (OSError, http.client.HTTPException):
            return _SILENT


# --- processes ----------------------------------------------------------------------------------------------------------


def _stop(workers: Iterable[_Worker]) -> None:
    """Stop workers, all at the same time, and wait until they are gone."""
    running = [worker for worker in workers if worker.keeper is not None]
    for worker in running:
        _note_tree(worker)
        stop_keeper(worker.keeper)
    for worker in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.keeper.wait(_STOP_TIMEOUT)
        worker.keeper.kill()
        worker.keeper.wait()
        _kill(worker.tree)  # somebody may have killed the keeper
        shutil.rmtree(worker.scratch, ignore_errors=True)


def _tree(worker: _Worker) -> list[psutil.Process]:
    """The server, which is the keeper's oldest child, and all other descendants of the keeper."""
    if worker.keeper is None or worker.keeper.poll() is not None:
        return []
    with contextlib.suppress(psutil.NoSuchProcess):
        return sorted(psutil.Process(worker.keeper.pid).children(recursive=True), key=lambda child: child.create_time())
    return []


def _note_tree(worker: _Worker) -> None:
    """Remember who belongs to a worker: when its keeper is killed, nobody can tell any more."""
    worker.tree = [process for process in {*worker.tree, *_tree(worker)} if _runs(process)]


def _kill(processes: Sequence[psutil.Process]) -> None:
    """Kill processes and wait until they are dead; their parent may be another than this process."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + GRACE
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _reserve(host: str) -> socket.socket:
    """Take a free port and keep it: a server shares it by SO_REUSEPORT, as vLLM sets that too, and nobody else gets it.

    A socket that does not listen receives no connections.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        reserved.bind((host, 0))
    except OSError as error:
        reserved.close()
        raise ValueError(f"host={host!r} is no address of this machine that servers can listen on: {error}") from error
    return reserved


def _scratch_folder() -> str:
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="paretune-worker-", dir=base if len(base) < _LONGEST_SOCKET_FOLDER - 25 else "/tmp")


# --- logs ---------------------------------------------------------------------------------------------------------------


def _failure(worker: _Worker, what: str) -> WorkerError:
    return WorkerError(f"vLLM worker {worker.number} {what}{_told(worker)}\nIts log: {worker.log}")


def _told(worker: _Worker) -> str:
    """What a worker's log said since it was last started, for an error message."""
    try:
        with worker.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(worker.log_start, end - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "".join(f"\n  {line}" for line in telling_lines(text))
