"""What a child left behind, read as what it is: the word of a process that a file may have taken
over. No path is followed out of its directory, nothing large is read, and nothing that blocks."""

import contextlib
import json
import os
import signal
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from app.domain.problems import Problem, WorkError
from app.domain.work import NO_ROOM_STATUS

LOG_LINES = 30
LOG_BYTES = 64 * 2**10
MAX_OUTCOME_BYTES = 64 * 2**20


class Killed(WorkError):
    """SIGKILL by somebody else, with no sign that it was for want of memory."""


def final(code: str, message: str, hint: str | None) -> WorkError:
    """An error that another attempt would end in as well."""
    error = WorkError(code, message, hint)
    error.final = True
    return error


def oom_kills() -> int:
    """Processes that the system has killed for want of memory since its start, as far as it says;
    of the control group, where there is one, else of the machine."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def outcome(status: int, directory: Path, starved: int) -> dict[str, Any]:
    """The `result.json` of a child that ended with `status`; `starved`: `oom_kills()` before its
    work. Raises WorkError with what it said, or with what became of it."""
    if status == 0 and (told := _read(directory, "error.json")) is not None:
        try:
            problem = Problem.model_validate_json(told)
        except ValidationError:
            raise _unreadable("error.json") from None
        told_so = final(problem.code, problem.message, problem.hint)
        told_so.log_tail = problem.log_tail
        raise told_so
    if status == 0 and (told := _read(directory, "result.json")) is not None:
        try:
            loaded = json.loads(told)
        except (ValueError, RecursionError):
            raise _unreadable("result.json") from None
        if not isinstance(loaded, dict):
            raise _unreadable("result.json")
        return loaded
    raise _ended(status, starved)


def _ended(status: int, starved: int) -> WorkError:
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        # Python's own MemoryError ends it with a status; a signal may have come from anybody.
        known = status > 0 or oom_kills() > starved
        return (WorkError if known else Killed)(
            "out_of_memory",
            "The process was killed by the system, most likely for want of memory.",
            "Use fewer samples or a smaller model, or run it on a machine with more memory.",
        )
    if status == -signal.SIGXCPU:
        return final(
            "deadline_exceeded",
            "The process used all the processor time that its deadline allows.",
            "Raise `limits.deadline_s`, use fewer samples, or a smaller model.",
        )
    if status == NO_ROOM_STATUS:
        return WorkError(
            "insufficient_storage",
            "There was no room left on the worker's disk for the files of the work.",
            "Tell the operator; when there is room again, retry the job.",
        )
    if status < 0:
        return WorkError(
            "child_crashed",
            f"The process crashed with {signal.Signals(-status).name}.",
            "The file made the TensorFlow or LiteRT runtime crash: export the model again; the"
            " last log lines may name the operator.",
        )
    return WorkError(
        "child_failed",
        f"The process ended with status {status} and no result.",
        "The last log lines say where; if they name no cause in your file, report it.",
    )


def _unreadable(name: str) -> WorkError:
    return WorkError(
        "child_failed",
        f"The process left a {name} that cannot be read.",
        "The file may have taken the process over, or crashed it: export the model again.",
    )


def _read(directory: Path, name: str) -> bytes | None:
    """The whole of a small file; None where there is none."""
    try:
        path = made_file(directory, name)
    except FileNotFoundError:
        return None
    if path.stat().st_size > MAX_OUTCOME_BYTES:
        raise _unreadable(name)
    return path.read_bytes()


def made_file(directory: Path, name: str) -> Path:
    """A regular file below `directory` that no link leads out of.

    For a child that is gone: nothing can change the path after the look. Raises WorkError
    `child_failed`, and FileNotFoundError.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
        raise _astray(name)
    path = directory
    for number, part in enumerate(parts, 1):
        path = path / part
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) if number == len(parts) else stat.S_ISDIR(mode)):
            raise _astray(name)
    if not os.access(path, os.R_OK):
        raise _astray(name)
    return path


def _astray(name: str) -> WorkError:
    return WorkError(
        "child_failed",
        f"The process named {name[:100]!r} as its result, which is no file of its own directory.",
        "The file may have taken the process over: export the model again.",
    )


def log_tail(directory: Path) -> str | None:
    """The last lines that the child wrote."""
    try:
        path = made_file(directory, "log.txt")
    except (FileNotFoundError, WorkError):
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        lines = file.read(LOG_BYTES).decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    return "\n".join(line[:500] for line in lines) or None
