"""Processes that have imported everything already: forks of one that imports what a run imports, and then waits.

`python -m align.train` imports for ten seconds and trains for three. A `Fork` is a `subprocess.Popen` for commands of the
form `python -m MODULE ...` that leaves out the first part. It is a process of its own all the same, with the environment,
folder, files and signals that it would have. Tests of how processes start do without, and so do those that look at command
lines or at who is whose parent: each fork has those of the process that it comes from.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESS = "PARETUNE_TEST_FORKS"  # variable: the socket at which forks can be asked for
IMPORTED = (
    *("align.learner", "align.engine", "align.evaluate_policies", "align.evaluator", "align.report", "align.try_rewards"),
    *("accelerate.commands.launch", "torch.distributed.run", "transformers.models.qwen3.modeling_qwen3"),
    *("torch.distributed.fsdp", "rewards.local_model", "pyarrow.parquet", "aiohttp"),
)
_PACKET = 200_000  # bytes of a request, which has the whole environment


class Fork(subprocess.Popen):
    """Like `Popen(command, cwd=, env=, stdin=, stdout=, stderr=, text=, start_new_session=)`; other options do nothing."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, new_session, _ = rest
        files = [own if own != -1 else number for number, own in enumerate((p2cread, c2pwrite, errwrite))]
        request = [module_of(args), str(cwd or os.getcwd()), dict(os.environ if env is None else env), new_session]
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(_address())
        socket.send_fds(self._server, [json.dumps(request).encode()], files)
        self.pid = int(self._server.recv(100))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, flags):
        if flags & os.WNOHANG and not select.select([self._server], [], [], 0)[0]:
            return 0, 0
        status = int(self._server.recv(100))
        self._server.close()
        return self.pid, status

    def _internal_poll(self, *_, **__):
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run(command, ..., capture_output=True, text=True)` does, in a fork."""
    pipe = subprocess.PIPE
    with Fork(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def module_of(command: Sequence[str]) -> list[str]:
    """The module of `python [-u] -m MODULE ARGUMENTS` and its arguments."""
    words = [str(word) for word in command if word != "-u"]
    assert words[:2] == [sys.executable, "-m"], f"not of the form `python -m MODULE`: {words[:4]}"
    return words[2:]


def _address() -> str:
    """Where forks are to be had; starts the process that they come from when there is none, for this process's time."""
    if ADDRESS not in os.environ:
        folder = tempfile.mkdtemp(prefix="forks-", dir="/tmp")
        path = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen(64)
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(listener.fileno())],
                cwd=Path(__file__).parent.parent, pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
            )  # fmt: skip
        os.environ[ADDRESS] = path
        atexit.register(server.stdin.close)
    return os.environ[ADDRESS]


# --- the process that they come from ----------------------------------------------------------------------------------


def serve(listener: socket.socket, imported: dict[str, str]) -> list[str]:
    """Fork for whoever asks, and tell him how it ended. Returns in the forks only: the module to run and its arguments."""
    own = list(sys.path)
    waiting: dict[int, socket.socket] = {}  # who asked for a process, by its id
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    while True:
        ready = select.select([0, reader, listener], [], [])[0]
        if 0 in ready:  # nobody writes to it: whoever started this process has ended
            os._exit(0)
        if reader in ready:
            os.read(reader, 4096)
            _tell_of_the_dead(waiting)
        if listener not in ready:
            continue
        asker = listener.accept()[0]
        request, files, *_ = socket.recv_fds(asker, _PACKET, 3)
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for file in (reader, writer, listener, asker, *waiting.values()):
                file.close() if isinstance(file, socket.socket) else os.close(file)
            os.environ.clear()
            os.environ.update(imported)
            return _become(own, files, *json.loads(request))
        waiting[pid] = asker
        for file in files:
            os.close(file)
        asker.send(str(pid).encode())


def _tell_of_the_dead(waiting: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            asker = waiting.pop(ended[0])
            with contextlib.suppress(OSError):  # he may have ended himself
                asker.send(str(ended[1]).encode())
            asker.close()


def _become(
    path: list[str], files: Sequence[int], words: list[str], folder: str, environment: dict[str, str], new_session: bool
) -> list[str]:
    """Be as if this process had just been started."""
    import torch

    if new_session:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0)))
    more = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [folder, *more, *(entry for entry in path if entry not in ("", os.getcwd(), *more))]
    sys.modules.pop(words[0], None)  # it is imported under another name now
    sys.argv[1:] = words[1:]
    return words


def main() -> list[str]:
    """Import everything, then fork for ever."""

    import importlib

    import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as elastic

    before = set(os.environ)
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # it is an extra
        importlib.import_module("deepspeed")
    gc.freeze()
    gc.enable()
    elastic.Popen = Fork  # of the processes that torch's launcher starts
    imported = {name: value for name, value in os.environ.items() if name not in before}  # what imports have set
    return serve(socket.socket(fileno=int(sys.argv[1])), imported)


def run_to_its_end(words: Sequence[str]) -> None:
    """Run a module and end as Python does, but for taking down what was imported, which takes a second."""
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        status = end.code or 0
    except BaseException:
        gc.unfreeze()
        raise
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_to_its_end(main())
