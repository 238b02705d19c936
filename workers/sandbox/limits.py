"""Limits and privileges that the process gives up, by what POSIX and Linux offer."""

import ctypes
import os
import sys
from pathlib import Path

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63
OPEN_FILES = 1024
GIB = 2**30


def threads() -> int:
    """How many threads one child and what it starts may have; TensorFlow has a few per core."""
    return 256 + 16 * (os.cpu_count() or 1)


def processes() -> int:
    """How many threads the user may have in all, the worker's and other children's included. Not
    held against root."""
    return 4096 + 256 * (os.cpu_count() or 1)


def before_work() -> None:
    """Limits that hold whatever the work is. Raises OSError."""
    import resource

    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    _lower(resource.RLIMIT_NPROC, processes())
    if sys.platform == "linux":
        # Where the machine's memory runs out, this goes first.
        Path("/proc/self/oom_score_adj").write_text("1000")


def for_work(memory_bytes: int, file_bytes: int, seconds: float) -> None:
    """Limits of one piece of work: writable memory, one file's size, processor time on all cores.

    Resident memory is watched from outside, and ends the work with a message; these here are the
    wall behind it, so they are wider. What is only reserved, or mapped from a file, does not count.
    """
    import resource

    cores = os.cpu_count() or 1
    # Stacks and arenas of threads are mapped whole and used in part; below 4 GiB TensorFlow aborts.
    _lower(resource.RLIMIT_DATA, memory_bytes + 4 * GIB + cores * GIB // 8)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_CPU, int(seconds * cores) + 60, grace=5)


def _lower(kind: int, value: int, grace: int = 0) -> None:
    """Set the limit, and the hard one `grace` above it, to no more than what holds already."""
    import resource

    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    highest = value + grace if hard == resource.RLIM_INFINITY else min(value + grace, hard)
    resource.setrlimit(kind, (value, highest))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_privileges(user: int | None) -> None:
    """No privileges, and none to gain by starting a program; become `user` where one is given.

    Linux only. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(_LAST_CAPABILITY + 1):
        # Refused past the last one that there is, and to who has none.
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    none = (ctypes.c_uint32 * 6)()
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    for what, result in (
        ("capset", libc.capset(ctypes.byref(header), none)),
        ("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
        ("dumpable", libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)),
    ):
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
