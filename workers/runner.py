"""Starts, feeds, watches and kills the child processes that do the work.

Spares are started ahead of need: a fresh interpreter that has imported everything and waits. A
fork of a process that already uses TensorFlow hangs, and an import on the job's clock costs
seconds; a spare costs neither.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from app.domain.problems import Problem, WorkError
from app.domain.work import Event

log = logging.getLogger(__name__)

Kind = Literal["light", "tensorflow"]
NICENESS = 10
TICK_S = 0.1
MEMORY_TICK_S = 0.5
LOG_LINES = 30
MAX_EVENT_BYTES = 16 * 2**20
# What a child may know of the environment: no database, no broker, no keys.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class Killed(WorkError):
    """SIGKILL by somebody else, with no sign that it was for want of memory."""


class Stopped(Exception):
    """The work was ended from outside: cancelled, or its lease is lost."""


@dataclass(frozen=True)
class Limits:
    deadline_s: float
    memory_bytes: int


def command(kind: Kind, event_fd: int) -> list[str]:
    """What starts a child that writes its events to `event_fd`."""
    return [sys.executable, "-m", "workers.child", kind, str(event_fd)]


def _give_way(pid: int) -> None:
    """Let what answers people go first where it shares the processors with the work: a process that
    has just started, in a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    # sched(7): with autogroups, niceness counts within a session only, and sessions have their own.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


class Child:
    """One started process, waiting for its one piece of work."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.started = time.monotonic()
        read_end, write_end = os.pipe()
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.process = subprocess.Popen(
            command(kind, write_end),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
            start_new_session=True,
            cwd=Path(__file__).resolve().parent.parent,
            env=environment
            | {
                "PYTHONUNBUFFERED": "1",
                "TF_USE_LEGACY_KERAS": "1",
                "TF_CPP_MIN_LOG_LEVEL": "1",
                "CUDA_VISIBLE_DEVICES": "-1",
            },
        )
        os.close(write_end)
        _give_way(self.process.pid)
        self._events = os.fdopen(read_end, "rb", buffering=0)
        self._buffer = b""

    def read_events(self, timeout: float) -> list[Event]:
        """Events that came within `timeout` seconds; waits for the first only."""
        ready, _, _ = select.select([self._events], [], [], timeout)
        if not ready:
            return []
        chunk = os.read(self._events.fileno(), 65536)
        if not chunk:
            time.sleep(min(timeout, 0.02))
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        try:
            if len(self._buffer) > MAX_EVENT_BYTES:
                raise ValueError("it has no end")
            return [Event.model_validate_json(line) for line in lines if line]
        except ValueError as error:
            raise WorkError(
                "child_failed",
                f"The process sent an event that cannot be read: {error}",
                "The file may have taken the process over, or crashed it: export the model again.",
            ) from None

    def give(self, directory: Path) -> None:
        stdin: IO[bytes] | None = self.process.stdin
        assert stdin is not None
        stdin.write(f"{directory}\n".encode())
        stdin.flush()

    def kill(self) -> None:
        """End the process and all that it started. Safe to call twice."""
        # Compilers have process groups of their own.
        descendants = self._family()[1:]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            # What a child that died early never read is flushed once more here.
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self._events.close()

    def memory_bytes(self) -> int:
        """Resident memory of the process and its descendants."""
        total = 0
        for member in self._family():
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def _family(self) -> list[psutil.Process]:
        """The process and its descendants; none where it is gone."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Spares:
    """Keeps children of each kind ready. One thread starts all of them and lives as long as the
    pool: a child dies with the *thread* that started it (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(self, wanted: dict[Kind, int]) -> None:
        self._wanted = wanted
        self._ready: dict[Kind, list[Child]] = {"light": [], "tensorflow": []}
        self._orders: queue.Queue[tuple[Kind, queue.Queue[Child] | None] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._start_children, name="spares", daemon=True)
        self._thread.start()
        for kind, count in wanted.items():
            for _ in range(count):
                self._orders.put((kind, None))

    def take(self, kind: Kind) -> Child:
        """A living child of that kind: the longest waiting spare, else a new one."""
        child = self._pop(kind)
        if child is None:
            answer: queue.Queue[Child] = queue.Queue()
            self._orders.put((kind, answer))
            return answer.get()
        return child

    def refill(self) -> None:
        """Order what is missing. Called when a child has been taken and used, so that the import
        of its successor does not compete with its work."""
        for kind, count in self._wanted.items():
            with self._lock:
                self._ready[kind] = [c for c in self._ready[kind] if c.process.poll() is None]
                missing = count - len(self._ready[kind])
            for _ in range(missing):
                self._orders.put((kind, None))

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {kind: len(children) for kind, children in self._ready.items()}

    def close(self) -> None:
        self._closed = True
        self._orders.put(None)
        self._thread.join()
        for children in self._ready.values():
            for child in children:
                child.kill()

    def _pop(self, kind: Kind) -> Child | None:
        with self._lock:
            while self._ready[kind]:
                child = self._ready[kind].pop(0)
                if child.process.poll() is None:
                    return child
                child.kill()
        return None

    def _start_children(self) -> None:
        while (order := self._orders.get()) is not None:
            kind, answer = order
            if answer is not None:
                answer.put(self._pop(kind) or Child(kind))
                continue
            with self._lock:
                full = len(self._ready[kind]) >= self._wanted[kind]
            if not full and not self._closed:
                child = Child(kind)
                with self._lock:
                    self._ready[kind].append(child)


def run(
    child: Child,
    directory: Path,
    limits: Limits,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Have `child` do the work laid out in `directory`, and return its `result.json`.

    Raises WorkError with what the child said, or with what became of it: `deadline_exceeded`,
    `out_of_memory` (Killed, where somebody else may have killed it), `child_crashed`,
    `child_failed`. What the child said, and the deadline, are `final`. Raises Stopped when
    `should_stop` said so. The child is gone afterwards, whatever happened.
    """
    starved = oom_kills()
    try:
        with contextlib.suppress(BrokenPipeError):
            child.give(directory)
            _watch(child, limits, on_event, should_stop)
        return _outcome(child, directory, starved)
    finally:
        child.kill()


def _watch(
    child: Child,
    limits: Limits,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> None:
    started = time.monotonic()
    next_memory = started
    while child.process.poll() is None:
        for event in child.read_events(TICK_S):
            if event.stage != "ready":
                on_event(event)
        if should_stop():
            raise Stopped
        at = time.monotonic()
        if at - started > limits.deadline_s:
            raise _final(
                "deadline_exceeded",
                f"The work was stopped after its deadline of {limits.deadline_s:g} s.",
                "Raise `limits.deadline_s`, use fewer samples, or a smaller model.",
            )
        if at >= next_memory:
            next_memory = at + MEMORY_TICK_S
            if (used := child.memory_bytes()) > limits.memory_bytes:
                raise _out_of_memory(f"it used {used >> 20} MiB", limits)
    for event in child.read_events(0):
        if event.stage != "ready":
            on_event(event)


def _final(code: str, message: str, hint: str | None) -> WorkError:
    error = WorkError(code, message, hint)
    error.final = True
    return error


def _out_of_memory(how: str, limits: Limits) -> WorkError:
    return WorkError(
        "out_of_memory",
        f"The work was stopped: {how}, the limit is {limits.memory_bytes >> 20} MiB.",
        "Use fewer calibration or evaluation samples, or ask the operator for a higher"
        " LITESMITH_VARIANT_MEMORY_BYTES.",
    )


def oom_kills() -> int:
    """Processes that the system has killed for want of memory since its start, as far as it says;
    of the control group, where there is one, else of the machine."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _outcome(child: Child, directory: Path, starved: int) -> dict[str, Any]:
    status = child.process.wait()
    error, result = directory / "error.json", directory / "result.json"
    if status == 0 and error.exists():
        problem = Problem.model_validate_json(error.read_bytes())
        told = _final(problem.code, problem.message, problem.hint)
        told.log_tail = problem.log_tail
        raise told
    if status == 0 and result.exists():
        loaded: dict[str, Any] = json.loads(result.read_bytes())
        return loaded
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        # Python's own MemoryError ends it with a status; a signal may have come from anybody.
        known = status > 0 or oom_kills() > starved
        raise (WorkError if known else Killed)(
            "out_of_memory",
            "The process was killed by the system, most likely for want of memory.",
            "Use fewer samples or a smaller model, or run it on a machine with more memory.",
        )
    if status < 0:
        raise WorkError(
            "child_crashed",
            f"The process crashed with {signal.Signals(-status).name}.",
            "The file made the TensorFlow or LiteRT runtime crash: export the model again; the"
            " last log lines may name the operator.",
        )
    raise WorkError(
        "child_failed",
        f"The process ended with status {status} and no result.",
        "The last log lines say where; if they name no cause in your file, report it.",
    )


def log_tail(directory: Path) -> str | None:
    """The last lines that the child wrote."""
    path = directory / "log.txt"
    if not path.exists():
        return None
    lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(line[:500] for line in lines) or None
