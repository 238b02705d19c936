"""A process and its descendants: what they use, and stopping all of them."""

import contextlib
import os
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
    total, pending = 0, [os.fspath(directory)]
    while pending:
        # Folders come and go meanwhile, and may lie too deep to be named.
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def remove(directory: Path) -> None:
    """Remove what a process left that may have wanted it to stay: folders nested deeper than any
    path reaches, or closed to their owner. Raises OSError where something cannot be removed."""
    pending, moved = [directory], 0
    while pending:
        folder = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                # Beside the directory instead of below it, so that no path grows.
                moved += 1
                flat = directory.with_name(f"{directory.name}-{moved}")
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, flat)
                pending.append(flat)
        os.rmdir(folder)
