"""Runs a native tool on a file of unknown origin: it may crash, hang, or write without end."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_CONFINED = Path(__file__).with_name("confined.py")
# What the tool may know of the environment.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
_READ_BYTES = 8 * 2**20  # of the log


@dataclass(frozen=True)
class Ended:
    """How a command ended. `status`: its exit status, negative for a signal; `log`: what it wrote
    to standard output and error."""

    status: int
    timed_out: bool
    log: str

    @property
    def signal_name(self) -> str | None:
        if self.status >= 0:
            return None
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"

    def last_line(self) -> str:
        """The last line that says something, at most 300 characters of it."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it wrote nothing"


def confined(file_bytes: int, what: str, *arguments: str) -> list[str]:
    """The command that runs a Python module or file, or with "exec" a program by its path: it dies
    with this process, and with the thread that calls this; SIGXFSZ ends it where a file that it
    writes would have more than `file_bytes`."""
    limits = [str(os.getpid()), str(file_bytes)]
    return [sys.executable, "-I", str(_CONFINED), *limits, what, *arguments]


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def run_python(
    what: str,
    arguments: list[str],
    directory: Path,
    log: Path,
    *,
    timeout_s: float,
    file_bytes: int,
) -> Ended:
    """Run a Python module (or a path ending in .py) of this environment in `directory`.

    It has a process group of its own, which is killed after `timeout_s` seconds; it dies with this
    process, and with the thread that calls this; each file that it writes, `log` too, has at most
    `file_bytes`. `-I` keeps the directory's files off its import path.
    """
    with log.open("wb") as written:
        process = subprocess.Popen(
            confined(file_bytes, what, *arguments),
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as read:
        text = read.read(_READ_BYTES).decode("utf-8", "replace")
    return Ended(process.returncode, timed_out, text)
