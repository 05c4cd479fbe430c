"""Takes away from a process, for good, what untrusted code must not have. Linux on x86-64 and arm64; needs no privileges.

Three layers, which nothing that runs below them can take off again:

* **seccomp** lists the system calls that may be made; any other fails. No new process and no other program (threads are
  allowed), no socket (but a pair of them within the process), no signal to another process, no change of a file's mode,
  owner or times, no shared memory and no message queue that would outlive the process.
* **Landlock** (Linux 5.13 and newer) lists the files that may be opened: Python's own and the system's libraries to read,
  one folder to read and write. /proc, /etc, /home and the rest stay shut.
* **Limits** of address space, processor time, number and size of open files; root gives up its capabilities as well.

Namespaces are left out on purpose: containers and many systems forbid them, and where they are allowed, making and ending
a network namespace costs more than all of this. What stays visible: that a file exists, its size and times (Landlock does
not cover `stat`), the machine's name and its clock. Faults of the kernel are not guarded against.

Numbers of system calls are those of asm/unistd.h; other constants those of linux/{audit,capability,filter,landlock,prctl}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys

# typing takes longer to import than everything else that runs before the code does
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables below, name in audit.h
SHARED = 424  # system calls from here on have one number everywhere; all are refused as if the kernel did not know them

# Calls that read, compute, wait, or act on what is open already: name, number on x86-64, on arm64.
HARMLESS = """
read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; preadv 295 69; pwritev 296 70;
lseek 8 62; close 3 57; dup 32 23; dup2 33 -; dup3 292 24; stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79;
statx 332 291; access 21 -; faccessat 269 48; readlink 89 -; readlinkat 267 78; getdents 78 -; getdents64 217 61;
getcwd 79 17; chdir 80 49; fchdir 81 50; ftruncate 77 46; fsync 74 82; fdatasync 75 83; umask 95 166; sendfile 40 71;
copy_file_range 326 285; pipe 22 -; pipe2 293 59; poll 7 -; ppoll 271 73; select 23 -; pselect6 270 72;
epoll_create 213 -; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22; eventfd2 290 19;
mmap 9 222; munmap 11 215; mprotect 10 226; mremap 25 216; madvise 28 233; brk 12 214; futex 202 98;
set_robust_list 273 99; rseq 334 293; gettid 186 178; getpid 39 172; getppid 110 173; getuid 102 174; geteuid 107 175;
getgid 104 176; getegid 108 177; getgroups 115 158; getpgrp 111 -; rt_sigaction 13 134; rt_sigprocmask 14 135;
rt_sigreturn 15 139; rt_sigsuspend 130 133; rt_sigpending 127 136; rt_sigtimedwait 128 137; sigaltstack 131 132;
restart_syscall 219 128; pause 34 -; alarm 37 -; setitimer 38 103; getitimer 36 102; nanosleep 35 101;
clock_nanosleep 230 115; clock_gettime 228 113; clock_getres 229 114; gettimeofday 96 169; time 201 -; times 100 153;
getrusage 98 165; sysinfo 99 179; uname 63 160; getrlimit 97 163; sched_yield 24 124; sched_getaffinity 204 123;
getpriority 140 141; getcpu 309 168; getrandom 318 278; membarrier 324 283; exit 60 93; exit_group 231 94; wait4 61 260;
waitid 247 95; arch_prctl 158 -; sendto 44 206; recvfrom 45 207; sendmsg 46 211; recvmsg 47 212; shutdown 48 210;
getsockopt 55 209; setsockopt 54 208; getsockname 51 204; getpeername 52 205; statfs 137 43; fstatfs 138 44
"""
# Calls that change a folder: Landlock says which, and without it they are refused.
CHANGING = """
creat 85 -; mkdir 83 -; mkdirat 258 34; rmdir 84 -; unlink 87 -; unlinkat 263 35; rename 82 -; renameat 264 38;
renameat2 316 276; symlink 88 -; symlinkat 266 36
"""
# Calls that depend on their arguments.
CONDITIONAL = """
open 2 -; openat 257 56; clone 56 220; kill 62 129; tgkill 234 131; prlimit64 302 261; fcntl 72 25; ioctl 16 29;
socketpair 53 199; prctl 157 167
"""

CLONE_THREAD = 0x10000
ALL_BITS = 0xFFFFFFFF
TO_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # duplicates, flags, locks; not: who is sent signals
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, bytes to read, blocking, close on exec
LOAD, AND, EQUAL, AT_LEAST, ANSWER = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of linux/filter.h
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NAME, SET_SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 15, 22, 38  # of prctl

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
DEVICES = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # run a program, make a device, socket or named pipe
READABLE = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/nix/store")
READABLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")

OPEN_FILES, FILE_BYTES = 32, 16 << 20
THREADS = 64
USERS = (61184, 65520)  # ids that systemd keeps for users that exist only for a while

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Of Landlock in this kernel; 0 where there is none, or where it may not be used."""
    return max(0, _libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def without_privileges(folder: str) -> None:
    """Make this process a user without rights: root becomes a user of its own, where that one can read Python's library.

    Where it cannot (Python lies in /root), it stays root without capabilities: what protects then is the rest.

    Args:
        folder: Given to that user.
    """
    if os.geteuid() == 0:
        library = os.path.dirname(os.__file__)
        user = USERS[0] + os.getpid() % (USERS[1] - USERS[0])
        if _open_to_all(library) and _open_to_all(os.path.dirname(folder)):
            os.chown(folder, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            resource.setrlimit(resource.RLIMIT_NPROC, (2 * THREADS, 2 * THREADS))  # binds a user, but never root
        header = struct.pack("=Ii", 0x20080522, 0)
        _check("capset", _libc.capset(header, bytes(24)))
    _prctl(NO_NEW_PRIVILEGES, 1)
    _prctl(SET_DUMPABLE, 0)  # processes of the same user cannot look into this one


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it has ended."""
    _prctl(SET_DEATH_SIGNAL, 9)


def limit(memory: int, cpu_seconds: int) -> None:
    """Set limits that cannot be lifted again.

    Args:
        memory: Bytes of address space.
        cpu_seconds: Of processor time.
    """
    for which, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def confine(folder: str, landlock: bool) -> None:
    """Confine this process, which must have one thread only, and all that it starts.

    Args:
        folder: May be read and written.
        landlock: Whether to use it; without it every file can be read that the user can, and none written at all.

    Raises:
        OSError: The kernel refuses.
    """
    if landlock:
        _restrict_files(folder)
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _filter(os.uname().machine, landlock))
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _prctl(SET_SECCOMP, 2, header)


def _restrict_files(folder: str) -> None:
    version = landlock_version()
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # as many rights as this one knows
    attributes = struct.pack("=QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]  # and TCP, signals
    ruleset = _check("Landlock", _libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    python = (
        os.path.dirname(os.__file__),
        os.path.join(sys.base_prefix, "lib"),
        os.path.join(sys.base_exec_prefix, "lib64"),
    )
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    rights = dict.fromkeys((*READABLE, *python, *filter(os.path.isabs, libraries)), READ_FILE | READ_FOLDER)
    rights |= dict.fromkeys(READABLE_FILES, READ_FILE) | {os.devnull: READ_FILE | WRITE_FILE, folder: handled & ~DEVICES}
    for path, right in rights.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = struct.pack("=Qi", right & handled, place)
        _check("Landlock", _libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(place)
    _check("Landlock", _libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _filter(machine: str, landlock: bool) -> Iterator[tuple[int, int, int, int]]:
    """Instructions (code, steps on if true, steps on if false, operand) that decide about a system call."""
    if machine not in MACHINES or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"no list of system calls for this machine ({machine})")
    column, audit = MACHINES[machine]
    yield LOAD, 0, 0, 4
    yield from ((EQUAL, 1, 0, audit), (ANSWER, 0, 0, KILL))
    yield LOAD, 0, 0, 0
    yield from ((AT_LEAST, 0, 1, SHARED), (ANSWER, 0, 0, FAIL | errno.ENOSYS))
    for number, conditions in _conditions(_numbers(CONDITIONAL, column), landlock).items():
        block = [step for condition in conditions for step in _holds(*condition)]
        yield EQUAL, 0, len(block) + 1, number
        yield from (*block, (ANSWER, 0, 0, ALLOW))
    for number in (_numbers(HARMLESS, column) | (_numbers(CHANGING, column) if landlock else {})).values():
        yield from ((EQUAL, 0, 1, number), (ANSWER, 0, 0, ALLOW))
    yield ANSWER, 0, 0, FAIL | errno.EPERM


def _conditions(numbers: Mapping[str, int], landlock: bool) -> dict[int, list[tuple[int, int, Sequence[int]]]]:
    """For a call's number: which argument, which bits of it, and the values that these may have."""
    here = (os.getpid(),)
    changes = 0 if landlock else TO_CHANGE
    conditions = {
        "open": [(1, changes, (0,))],
        "openat": [(2, changes, (0,))],
        "clone": [(0, CLONE_THREAD, (CLONE_THREAD,))],
        "kill": [(0, ALL_BITS, here)],
        "tgkill": [(0, ALL_BITS, here)],
        "prlimit64": [(0, ALL_BITS, (0,))],
        "fcntl": [(1, ALL_BITS, FCNTL)],
        "ioctl": [(1, ALL_BITS, IOCTL)],
        "socketpair": [(0, ALL_BITS, (1,)), (1, 0xF, (1,))],  # of Unix streams: datagrams can be sent to others
        "prctl": [(0, ALL_BITS, (SET_NAME,))],
    }
    return {numbers[name]: those for name, those in conditions.items() if name in numbers}


def _holds(argument: int, bits: int, values: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Go on after these if the bits of an argument have one of the values, else fail."""
    tests = [(EQUAL, len(values) - n, 0, value) for n, value in enumerate(values)]
    return [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, bits), *tests, (ANSWER, 0, 0, FAIL | errno.EPERM)]


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = (row.split() for row in table.split(";"))
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def _open_to_all(path: str) -> bool:
    """Whether any user can come to a folder, going by the modes of those above it."""
    while os.stat(path).st_mode & 1:
        if path == os.path.dirname(path):
            return True
        path = os.path.dirname(path)
    return False


def _prctl(option: int, argument: int, pointer: bytes = b"") -> None:
    nothing = ctypes.c_ulong(0)
    _check("prctl", _libc.prctl(option, ctypes.c_ulong(argument), pointer or nothing, nothing, nothing))


def _check(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
