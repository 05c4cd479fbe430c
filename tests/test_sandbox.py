"""Code under test and the machine: what it cannot do to it. Every attack is made for real."""

import asyncio
import os
import sys
import tempfile
import threading
import time

import psutil
import pytest

from rewards import code as code_module
from rewards import confine
from rewards.code import CodeTests
from rewards.sandbox import clear
from tests.code_judge import REFUSED, SQUARE, attack
from tests.conftest import ROOT

pytest_plugins = ["tests.code_judge"]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not confine.landlock_version(), reason="needs Linux with Landlock"
)


@pytest.mark.parametrize(
    "statement",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.create_connection(('127.0.0.1', 9))",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), 0)",
        "os.kill(0, 9)",
        "os.kill(-1, 9)",
        "os.killpg(os.getpgrp(), 9)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(0, fcntl.F_SETSIG, 9)",
        "fcntl.ioctl(0, 0x8901, b'\\1\\0\\0\\0')",  # FIOSETOWN
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.setsid()",
        "os.memfd_create('a')",
        "os.chroot('.')",
        "os.chmod('.', 0o777)",
        "os.fchmod(os.open(os.__file__, 0), 0o777)",
        "os.chown('.', 0, 0)",
        "os.utime(os.__file__)",
        "os.setxattr('.', 'user.a', b'b')",
        "os.truncate(os.__file__, 0)",
        "os.mkfifo('a')",
        "os.mknod('a')",
        "os.link(os.__file__, 'a')",
        "os.setuid(0) if os.getuid() else open('/')",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "open('/proc/self/environ')",
        "open(f'/proc/{os.getppid()}/environ')",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "os.listdir('/proc')",
        "os.listdir('/')",
        "os.listdir('..')",
        "open('/etc/passwd')",
        "open('/dev/tty')",
        "open('/dev/shm/a', 'w')",
        "open('/tmp/a', 'w')",
        "open(os.__file__, 'a')",
        "os.rename('/etc/hostname', 'a')",
        "os.symlink('/etc/passwd', 'a'); open('a')",
    ],
)
def test_what_the_system_refuses(judge, statement):
    assert judge(attack(statement), REFUSED) == 1


@pytest.mark.parametrize("number", [435, 425, 323, 321, 298, 29, 240, 101, 310, 157, 272])
def test_calls_that_python_does_not_make_are_refused_too(judge, number):
    """clone3, io_uring_setup, userfaultfd, bpf, perf_event_open, shmget,
    mq_open, ptrace, process_vm_readv, prctl, unshare. Of x86-64."""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = libc.syscall({number}, 38, 1, 0, 0, 0, 0)"
    assert judge(f"{code}\nwhy = ctypes.get_errno()", "assert result == -1 and why in (1, 38)") == 1


def test_files_of_the_user_stay_as_they_are(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "kept").write_text("secret")
    before = (folder / "kept").stat()
    kept = str(folder / "kept")
    things = (
        "open(kept)", "open(kept, 'w')", "os.remove(kept)", "os.truncate(kept, 0)", "os.chmod(kept, 0)",
        "os.utime(kept, (0, 0))",
        "os.rename(kept, 'a')", "os.listdir(mine)", "os.rmdir(mine)", "open(mine + '/other', 'w')", "os.link(kept, 'a')",
        "os.symlink('a', mine + '/link')", "os.chdir(mine); open('b', 'w')",
    )  # fmt: skip
    assert judge(f"mine, kept = {str(folder)!r}, {kept!r}\n" + attack(*things), REFUSED) == 1
    after = (folder / "kept").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_secrets_of_the_environment_do_not_arrive(judge, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = (
        "import os, ctypes, gc\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
        "seen = [*os.environ, libc.getenv(b'HF_TOKEN')]\n"
    )
    assert judge(code, "assert seen == ['HOME', 'TMPDIR', None]") == 1
    assert code_module._started()["env"].keys() <= {"LD_LIBRARY_PATH", "PYTHONHASHSEED"}


def test_open_files_of_the_trainer_do_not_arrive(judge, tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "open"
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\ndef is_open(n):\n    try: return bool(os.fstat(n))\n    except OSError: return False\n"
        assert judge(code, "assert sum(map(is_open, range(3, 1024))) == 2") == 1  # to and from the keeper


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import signal\nfor n in {*signal.Signals} - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        "while True: print('x' * 10 ** 6, flush=True)",
        "import sys\nsys.stderr.write('x' * 10 ** 8)\nwhile True: sys.stderr.write('x')",
        "int('9' * 4000) ** 10 ** 9",
        "import re\nre.match('(a+)+b', 'a' * 64)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    ],
)
def test_what_never_ends_is_ended(judge, code):
    start = time.perf_counter()
    assert judge(code, "assert True", "assert True", by=CodeTests(seconds=1)) == 0
    assert time.perf_counter() - start < 5


def test_threads_that_go_on_are_ended(judge):
    code = "import threading\nfor _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    assert judge(code, "assert True", "assert True") == 1


def test_a_test_that_takes_long_leaves_time_for_the_others(judge):
    """4 s: half for the first, and the second comes after it."""
    code = "def f(x):\n    while x: pass\n    return 1"
    start = time.perf_counter()
    assert judge(code, "assert f(1) == 1", "assert f(0) == 1") == 0.5
    assert 1.9 < time.perf_counter() - start < 4


def test_processor_time_is_limited_too(judge):
    """By the system, in whole seconds: int(4 / 2) + 1 for the first of two tests, int(3.9...) + 1 for the other."""
    code = "import resource\nlimit = resource.getrlimit(resource.RLIMIT_CPU)"
    assert judge(code, "assert limit == (3, 3)", "assert limit == (4, 4)") == 1


@pytest.mark.parametrize(
    "statement",
    ["bytearray(10 << 30)", "[0] * (10 << 30)", "'x' * (10 << 30)", "[bytearray(1 << 20) for _ in range(10 << 10)]"],
)
def test_memory_is_limited(judge, statement):
    code = f"try:\n    x = {statement}\n    refused = False\nexcept MemoryError:\n    refused = True"
    assert judge(code, REFUSED) == 1


def test_memory_is_limited_as_told(judge):
    code = "try: x = len(bytearray(100 << 20))\nexcept MemoryError: x = 0"
    assert judge(code, "assert x", by=CodeTests(seconds=4, memory_mib=256)) == 1
    assert judge(code, "assert x == 0", by=CodeTests(seconds=4, memory_mib=96)) == 1


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def f(): return f()\ntry: f()\nexcept RecursionError: pass", 1),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return [*map(lambda _: f(), [1])]\nf()", 0),
        ("import ctypes\nctypes.string_at(0)", 0),  # a crash
        ("x = eval('(' * 90 + ')' * 90)", 1),
        ("exec('-' * 10 ** 6 + '1')", 0),
    ],
)
def test_deep_recursion_and_crashes_cost_their_own_sample(judge, code, value):
    assert judge(code, "assert True") == value


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor n in range(10 ** 6): os.mkdir(str(n))",
        "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
        "import os\nwhile True: os.mkdir('d' * 250); os.chdir('d' * 250); open('f' * 250, 'w').write('x' * 10 ** 6)",
        "import os\nfor n in range(10 ** 4): open(str(n), 'w').write('x' * (10 << 20))",
        "import os\nos.mkdir('d'); os.mkdir('d/shut', 0)\nopen('d/shut2', 'w'); os.symlink('/', 'd/link')\nwhile True: pass",
        "import threading\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=lambda: input or 0).start()",
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    ],
)
def test_what_fills_the_machine_is_stopped_and_deleted(judge, code):
    start, free = time.perf_counter(), psutil.disk_usage(tempfile.gettempdir()).free
    assert judge(code, "assert True", by=CodeTests(seconds=2)) == 0
    assert time.perf_counter() - start < 8
    assert psutil.disk_usage(tempfile.gettempdir()).free > free - (1 << 30)


def test_what_is_made_at_once_is_the_codes_doing(judge, monkeypatch):
    """Also when the keeper, here a slow one, has not yet read that the code may run."""
    slow = (
        "import rewards.sandbox as s, time; quick = s._Child.__init__\n"
        "s._Child.__init__ = lambda *arguments: (quick(*arguments), time.sleep(0.3))[0]\n"
    )
    monkeypatch.setattr(code_module, "PROGRAM", code_module.PROGRAM.replace("main()", slow + "main()"))
    assert judge("import os\nos.mkdir('d', 0)", "assert True") == 0
    assert judge("import os\nos._exit(0)", "assert True") == 0


def test_a_file_is_limited_in_size(judge):
    code = "try: print(open('a', 'wb').write(bytes(20 << 20)))\nexcept OSError as error: why = error.errno"
    assert judge(code, "assert why == 27") == 1  # EFBIG


def test_a_folder_is_deleted_whatever_is_in_it(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.mkdir()
    (kept / "file").touch()
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(30):  # 6000 characters, which is longer than a path may be
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    os.symlink(kept, folder / "link")
    os.symlink(kept / "file", folder / "link to a file")
    (folder / "shut").mkdir(mode=0)
    clear(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_a_cancelled_call_leaves_nothing(judge, reward):
    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await reward("import os\nopen('a', 'w')\nwhile True: pass", "assert True")

    asyncio.run(cancel())


def test_nothing_outlives_a_killed_trainer(tmp_path):
    code = (
        "import asyncio, tempfile\nfrom rewards.code import CodeTests\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "asyncio.run(CodeTests(seconds=60)('while True: pass', 'assert True'))"
    )
    trainer = psutil.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(300):
        below = trainer.children(recursive=True)
        if len(below) == 2 and below[1].cpu_times().user > 0.2:
            break
        time.sleep(0.05)
    assert len(below) == 2
    trainer.kill()
    trainer.wait()
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_many_at_once_from_a_process_with_threads(reward):
    """As in the trainer: threads that work while the event loop of another thread starts processes."""
    stop = threading.Event()
    threads = [threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, True)]) for _ in range(2)]
    for thread in threads:
        thread.start()

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(reward(SQUARE, [f"assert f(3) == {9 + n % 2}", "assert f(1) == 1"]) for n in range(8)))

    try:
        assert asyncio.run(all_of_them()) == [1, 0.5] * 4
    finally:
        stop.set()
