"""`paretune` in a process that has imported everything, whose runs are forks of it: for tests of signals to a whole group.

Run by tests/test_sweep.py. Forks from elsewhere (tests/forks.py) would not be in the process group of the sweep.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import IO

from align import sweep
from align.cli import main
from tests import forks


class Child:
    """As much of `subprocess.Popen` as a sweep needs."""

    def __init__(self, command: Sequence[str], stdin: int, stdout: IO[bytes], stderr: int):
        words = forks.module_of(command)
        self._ended: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                sys.argv[1:] = words[1:]
                sys.modules.pop(words[0], None)
                forks.run_to_its_end(words)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        return self._ask(os.WNOHANG)

    def wait(self) -> int | None:
        return self._ask(0)

    def _ask(self, how: int) -> int | None:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, how)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended


if __name__ == "__main__":
    sweep.Popen = Child
    sys.exit(main())
