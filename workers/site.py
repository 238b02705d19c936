"""Where a worker's children do their work, and what they may reach from there."""

import contextlib
import fcntl
import os
import shutil
import sys
from pathlib import Path
from typing import IO

from app.config import Settings
from workers import compilers
from workers.runner import Site


def claim_work_dir(directory: Path) -> IO[bytes]:
    """Make a worker's own directory, locked while it lives; remove those of killed workers."""
    directory.mkdir(parents=True)
    with (directory.parent / "lock").open("wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        lock = (directory / "lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in directory.parent.glob("*/lock"):
            with contextlib.suppress(OSError), other.open("rb") as its_lock:
                fcntl.flock(its_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other.parent, ignore_errors=True)
    return lock


def site_of(settings: Settings, work_dir: Path) -> Site:
    compiler = compilers.find_edgetpu(settings.edgetpu_compiler)
    # It must be there to be opened to children.
    settings.latency_lock.touch()
    if settings.sandbox_user is not None:
        os.chown(settings.latency_lock, settings.sandbox_user, -1)
    return Site(
        work_dir=work_dir,
        mode=settings.sandbox,
        readable=(settings.latency_lock,),
        tools=(Path(sys.executable), *([Path(compiler)] if compiler else [])),
        user=settings.sandbox_user,
    )
