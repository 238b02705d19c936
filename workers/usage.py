"""A process and its descendants: what they use, and stopping all of them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

STOP_ROUNDS = 50


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants, itself first; none where it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_family(pid: int) -> None:
    """Kill the process and its descendants. They are stopped before, one after the other until no
    new one turns up: who is stopped starts no other."""
    stopped: dict[psutil.Process, None] = {}
    for _ in range(STOP_ROUNDS):
        fresh = [member for member in family(pid) if member not in stopped]
        if not fresh:
            break
        for member in fresh:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
            stopped[member] = None
    for member in reversed(stopped):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def memory_and_threads(pid: int) -> tuple[int, int]:
    """Resident memory in bytes, and threads, of the process and its descendants."""
    memory = threads = 0
    for member in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory += member.memory_info().rss
            threads += member.num_threads()
    return memory, threads


def disk_bytes(directory: Path) -> int:
    """What the files below a directory take on the disk; no link is followed."""
    return sum(_taken(directory))


def _taken(directory: Path) -> Iterator[int]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        yield from _taken(Path(entry.path))
                    else:
                        yield entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return
