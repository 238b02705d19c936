"""Landlock: which files the process may still reach, and whether it may use TCP.

https://docs.kernel.org/userspace-api/landlock.html; the numbers are those of linux/landlock.h.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# The same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_PATH_BENEATH = 1
_O_PATH = 0o10000000

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_SYM, _REFER, _TRUNCATE = 1 << 12, 1 << 13, 1 << 14
# What rights there are from which version of the interface on.
_FILE_RIGHTS = {2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP_RIGHTS, _TCP_SINCE = 0b11, 4
_SCOPES, _SCOPES_SINCE = 0b11, 6  # abstract Unix sockets, signals
# The first has no way to let a file move between directories, as TensorFlow does when it saves.
LEAST_ABI = 2

READ = _READ_FILE | _READ_DIR
WRITE = (
    READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER
    | _TRUNCATE
)  # fmt: skip
EXECUTE = _EXECUTE | _READ_FILE
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE


@dataclass(frozen=True)
class Rules:
    """Paths, and all that lies below them, that may be read, changed, or started. Those that are
    not there are passed over."""

    read: Iterable[str] = ()
    write: Iterable[str] = ()
    execute: Iterable[str] = ()
    tcp: bool = False


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result


def abi() -> int:
    """The version of the kernel's interface; 0 where it has none, or it is switched off."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except (OSError, AttributeError):
        return 0


def restrict(rules: Rules) -> None:
    """Hold this thread, and all that it starts from now on, to the rules.

    Threads that run already stay free: so it comes before the libraries that start some. Needs
    no_new_privs. Raises OSError where the kernel cannot.
    """
    version = abi()
    if version < LEAST_ABI:
        raise OSError(errno.ENOSYS, f"Landlock: the kernel has version {version} of it")
    handled = _FILE_RIGHTS[max(least for least in _FILE_RIGHTS if least <= version)]
    tcp = _TCP_RIGHTS if version >= _TCP_SINCE and not rules.tcp else 0
    scopes = _SCOPES if version >= _SCOPES_SINCE else 0
    told = ctypes.create_string_buffer(struct.pack("=QQQ", handled, tcp, scopes), 24)
    size = 24 if version >= _SCOPES_SINCE else 16 if version >= _TCP_SINCE else 8
    ruleset = _call(_CREATE_RULESET, told, ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for paths, rights in (
            (rules.read, READ), (rules.write, WRITE), (rules.execute, EXECUTE),
        ):  # fmt: skip
            for path in paths:
                _allow(ruleset, path, rights & handled)
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, _O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return
    try:
        if not Path(path).is_dir():
            rights &= _OF_A_FILE
        told = ctypes.create_string_buffer(struct.pack("=Qi", rights, opened), 12)
        _call(
            _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), told, ctypes.c_uint32(0)
        )
    finally:
        os.close(opened)
