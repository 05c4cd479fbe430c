"""Runs a command that must not outlive the process that wanted it: `python -m rollout.keeper [--remove DIR] -- COMMAND`.

The keeper's standard input is a pipe that its owner holds open and never writes to. When the owner goes, however it goes,
the pipe ends; then the keeper stops COMMAND with everything that came of it, removes the folders, and exits. It lives in a
session of its own, so that Ctrl-C in the owner's terminal reaches neither. Without COMMAND it only removes the folders.
"""

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_PERIOD = 0.2  # seconds between looks at what sends no signal
_PATIENCE = 30.0  # seconds to wait for a killed process: one inside a driver may go late, or never
_SHARED = "/dev/shm"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def start_keeper(
    command: Sequence[str], remove: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int | None
) -> subprocess.Popen[bytes]:
    """Start a keeper that this process owns. Closing its `stdin`, or the end of this process, stops it.

    Args:
        command: What to run; nothing when empty.
        remove: Folders to remove at the end.
        environment: Of the keeper and of the command; its PYTHONPATH must lead to this package.
        output: Where both write to; as this process does when None.
    """
    folders = [word for folder in remove for word in ("--remove", folder)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rollout.keeper", *folders, "--", *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env=dict(environment),
        start_new_session=True,
    )


def stop_keeper(keeper: "subprocess.Popen[bytes]") -> None:
    """Let a keeper end what it keeps; it is gone a while later."""
    with contextlib.suppress(OSError):
        keeper.stdin.close()
    keeper.terminate()  # as well: a fork of this process may hold the pipe open


def main(arguments: Sequence[str]) -> int:
    """Run until the command or the owner ends.

    Returns:
        The command's exit status, 128 + N after signal N, 127 when it cannot be started, 0 when it was told to stop.
    """
    parser = argparse.ArgumentParser(prog="python -m rollout.keeper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--remove", metavar="DIR", action="append", default=[], help="folder to remove at the end")
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds from SIGTERM to SIGKILL (default: %(default)s)")
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    keeper = _Keeper(options.grace)
    try:
        return keeper.run(arguments[end + 1 :])
    finally:
        for folder in options.remove:
            shutil.rmtree(folder, ignore_errors=True)


class _Keeper:
    """One command, everything that descends from it, and the shared memory that they made."""

    def __init__(self, grace: float):
        self._grace = grace
        self._owner = os.getppid()
        self._command = 0  # process id
        self._told_to_stop = False
        self._memory = _SharedMemory()
        self._wakeup = _wake_on_signals(self._on_stop_signal)
        if sys.platform == "linux":  # orphans of the command become children of this process
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def run(self, command: Sequence[str]) -> int:
        """See `main`."""
        if command:
            try:
                self._start(command)
            except OSError as error:
                print(f"keeper: cannot start {command[0]!r}: {error}", file=sys.stderr, flush=True)
                return 127
        while True:
            readable, _, _ = select.select([0, self._wakeup], [], [], _PERIOD)
            if self._wakeup in readable:
                os.read(self._wakeup, 4096)
            status = self._reap()
            if status is not None:
                print(f"keeper: the command ended with status {status}", file=sys.stderr, flush=True)
                self._finish(0.0)
                return status
            # A fork of the owner may hold the pipe open, hence the second look, at who the parent is.
            if self._told_to_stop or (0 in readable and _at_end(0)) or os.getppid() != self._owner:
                self._finish(self._grace)
                return 0
            self._memory.look()

    def _start(self, command: Sequence[str]) -> None:
        keeper = os.getpid()

        def die_with_keeper() -> None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(1)

        before = die_with_keeper if sys.platform == "linux" else None
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=before)
        self._command = process.pid
        process.returncode = 0  # `_reap` waits for it, not Popen

    def _on_stop_signal(self) -> None:
        self._told_to_stop = True

    def _reap(self) -> int | None:
        """Take leave of the children that ended. Returns the command's exit status if it is among them."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._command:
                    code = os.waitstatus_to_exitcode(ended[1])
                    found = code if code >= 0 else 128 - code
        return found

    def _finish(self, grace: float) -> None:
        """End everything that is left: politely for `grace` seconds, then for certain."""
        self._memory.look(thorough=True)
        if grace:
            _signal_all(signal.SIGTERM)
            self._wait_for_all(grace)
            self._memory.look(thorough=True)
        deadline = time.monotonic() + _PATIENCE
        while _descendants() and time.monotonic() < deadline:  # again and again: some may be forking meanwhile
            _signal_all(signal.SIGKILL)
            self._wait_for_all(0.2)
        self._memory.remove()

    def _wait_for_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._reap()
        while _descendants() and time.monotonic() < deadline:
            time.sleep(0.05)
            self._reap()


class _SharedMemory:
    """The files right in /dev/shm that descendants made: nobody removes them for a process that was killed."""

    def __init__(self) -> None:
        self._before = self._seen = _shared_files()
        self._ours: set[tuple[str, int]] = set()
        self._looks = 0

    def look(self, thorough: bool = False) -> None:
        """Note which new files descendants have in use; cheap when there is none, unless it shall be thorough.

        A killed process can no longer be asked, so this is to be called again and again while they live.
        """
        files = _shared_files()
        if files - self._seen:
            self._looks = 3  # the one that made a file may not have it in use yet
        self._seen = files
        if not self._looks and not thorough:
            return
        self._looks -= bool(self._looks)
        used = set().union(*(_inodes_in_use(process.pid) for process in _descendants()))
        self._ours |= {(name, inode) for name, inode in files - self._before if inode in used}

    def remove(self) -> None:
        """Remove them."""
        for name, _ in self._ours & _shared_files():
            Path(_SHARED, name).unlink(missing_ok=True)


def _shared_files() -> set[tuple[str, int]]:
    """Names and inodes of the files right in /dev/shm; folders there are somebody's on purpose."""
    try:
        with os.scandir(_SHARED) as entries:
            return {(entry.name, entry.inode()) for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError:
        return set()


def _inodes_in_use(pid: int) -> set[int]:
    """Inodes of what a process has mapped or open in /dev/shm: a semaphore is mapped under the name it was made by."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if _SHARED in line:
                found.add(int(line.split()[4]))
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(_SHARED):
                    found.add(link.stat().st_ino)
    return found


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _signal_all(number: int) -> None:
    for process in _descendants():
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _wake_on_signals(stop: Callable[[], None]) -> int:
    """Make signals that end a process call `stop`, and Ctrl-C do nothing. Returns a file that is readable after any.

    They get handlers instead of being ignored, since the command would inherit that.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: stop())
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reader


def _at_end(file: int) -> bool:
    try:
        return not os.read(file, 4096)
    except OSError:
        return True


def _prctl(option: int, value: int) -> None:
    _LIBC.prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
