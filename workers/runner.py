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
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from app.domain.problems import WorkError
from app.domain.work import Event
from workers import usage
from workers.outcome import final, oom_kills, outcome
from workers.sandbox import Confinement, Grant, Mode
from workers.sandbox import limits as sandbox_limits

log = logging.getLogger(__name__)

Kind = Literal["light", "tensorflow"]
NICENESS = 10
TICK_S = 0.1
MEMORY_TICK_S = 0.5
# Files are counted this much more rarely than that takes.
DISK_TICK_S, DISK_SHARE = 2.0, 0.05
MAX_EVENT_BYTES = 16 * 2**20
# What a child may know of the environment: no database, no broker, no keys.
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class Stopped(Exception):
    """The work was ended from outside: cancelled, or its lease is lost."""


@dataclass(frozen=True)
class Limits:
    """Of one piece of work: resident memory of its processes, and bytes of all the files that it
    keeps at a time."""

    deadline_s: float
    memory_bytes: int
    disk_bytes: int = 64 * 2**30


@dataclass(frozen=True)
class Site:
    """Where children have their directories, and how they are confined (docs/sandbox.md).

    `readable`: files elsewhere that they may read and lock; `tools`: programs that work may be
    allowed to start; `user`: the number of the user that they become, where the worker is root.
    """

    work_dir: Path
    mode: Mode = "auto"
    readable: tuple[Path, ...] = ()
    tools: tuple[Path, ...] = ()
    user: int | None = None


def command(kind: Kind, event_fd: int, confinement: Confinement) -> list[str]:
    """What starts a child that writes its events to `event_fd`."""
    told = json.dumps(asdict(confinement))
    return [sys.executable, "-m", "workers.child", kind, str(event_fd), told]


def _give_way(pid: int) -> None:
    """Let what answers people go first where it shares the processors with the work: a process that
    has just started, in a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    # sched(7): with autogroups, niceness counts within a session only, and sessions have their own.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


class Child:
    """One started process, waiting for its one piece of work.

    Its work is laid out before in `directory`, and what the work reads in `inputs`, which is
    `directory / "in"` to the child: it may only read there.
    """

    def __init__(self, kind: Kind, site: Site, *, network: bool = False) -> None:
        self.kind = kind
        self.started = time.monotonic()
        self._home = Path(tempfile.mkdtemp(dir=site.work_dir))
        self.inputs, self.directory = self._home / "in", self._home / "work"
        self._lay_out(site.user)
        confinement = Confinement(
            directory=str(self.directory),
            inputs=str(self.inputs),
            mode=site.mode,
            readable=tuple(map(str, site.readable)),
            writable=(str(_keras_home()),) if network else (),
            tools=tuple(map(str, site.tools)),
            network=network,
            user=site.user,
        )
        read_end, write_end = os.pipe()
        self.process = subprocess.Popen(
            command(kind, write_end, confinement),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
            start_new_session=True,
            cwd=Path(__file__).resolve().parent.parent,
            env=self._environment(network),
        )
        os.close(write_end)
        _give_way(self.process.pid)
        self._events = os.fdopen(read_end, "rb", buffering=0)
        self._buffer = b""

    def _lay_out(self, user: int | None) -> None:
        self.inputs.mkdir()
        for path in (self.directory, self.directory / "out", self.directory / "tmp"):
            path.mkdir(mode=0o700)
        (self.directory / "in").symlink_to("../in")
        if user is not None:
            # It must get through here, and own what is its own.
            self._home.chmod(0o711)
            for path in (self.directory, *self.directory.iterdir()):
                os.chown(path, user, -1, follow_symlinks=False)

    def _environment(self, network: bool) -> dict[str, str]:
        scratch = str(self.directory / "tmp")
        return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
            "HOME": scratch,
            "TMPDIR": scratch,
            "KERAS_HOME": str(_keras_home()) if network else scratch,
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TF_USE_LEGACY_KERAS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
        }

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

    def give(self, grant: Grant) -> None:
        """Let it begin what lies in its directory."""
        stdin: IO[bytes] | None = self.process.stdin
        assert stdin is not None
        stdin.write(json.dumps(asdict(grant)).encode() + b"\n")
        stdin.flush()

    def kill(self) -> None:
        """End the process and all that it started. Safe to call twice."""
        # Those that left its process group too, as compilers do: its descendants while it is there.
        usage.end_family(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            # What a child that died early never read is flushed once more here.
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self._events.close()

    def close(self) -> None:
        """Kill it, and remove all its files."""
        self.kill()
        try:
            usage.remove(self._home)
        except FileNotFoundError:
            pass  # closed before
        except OSError:
            log.exception("cannot remove the files of a child")


def _keras_home() -> Path:
    """Where Keras keeps the weights that it downloads."""
    folder = Path.home() / ".keras"
    folder.mkdir(exist_ok=True)
    return folder


@dataclass(frozen=True)
class _Order:
    """A child to start: for who waits for the answer, else to be kept."""

    kind: Kind
    answer: "queue.Queue[Child] | None" = None
    network: bool = False


class Spares:
    """Keeps children of each kind ready. One thread starts all of them and lives as long as the
    pool: a child dies with the *thread* that started it (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(self, wanted: dict[Kind, int], site: Site) -> None:
        self._wanted = wanted
        self._site = site
        self._ready: dict[Kind, list[Child]] = {"light": [], "tensorflow": []}
        self._orders: queue.Queue[_Order | None] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._start_children, name="spares", daemon=True)
        self._thread.start()
        for kind, count in wanted.items():
            for _ in range(count):
                self._orders.put(_Order(kind))

    def take(self, kind: Kind, *, network: bool = False) -> Child:
        """A living child of that kind: the longest waiting spare, else a new one. One that may use
        the network is always new: spares are closed to it from their start."""
        child = None if network else self._pop(kind)
        if child is None:
            answer: queue.Queue[Child] = queue.Queue()
            self._orders.put(_Order(kind, answer, network))
            return answer.get()
        return child

    def refill(self) -> None:
        """Order what is missing. Called when a child has been taken and used, so that the import
        of its successor does not compete with its work."""
        for kind, count in self._wanted.items():
            with self._lock:
                ended = [c for c in self._ready[kind] if c.process.poll() is not None]
                self._ready[kind] = [c for c in self._ready[kind] if c not in ended]
                missing = count - len(self._ready[kind])
            for child in ended:
                child.close()
            for _ in range(missing):
                self._orders.put(_Order(kind))

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {kind: len(children) for kind, children in self._ready.items()}

    def close(self) -> None:
        self._closed = True
        self._orders.put(None)
        self._thread.join()
        for children in self._ready.values():
            for child in children:
                child.close()

    def _pop(self, kind: Kind) -> Child | None:
        with self._lock:
            while self._ready[kind]:
                child = self._ready[kind].pop(0)
                if child.process.poll() is None:
                    return child
                child.close()
        return None

    def _start_children(self) -> None:
        while (order := self._orders.get()) is not None:
            kind, answer, network = order.kind, order.answer, order.network
            if answer is not None:
                spare = None if network else self._pop(kind)
                answer.put(spare or Child(kind, self._site, network=network))
                continue
            with self._lock:
                full = len(self._ready[kind]) >= self._wanted[kind]
            if not full and not self._closed:
                child = Child(kind, self._site)
                with self._lock:
                    self._ready[kind].append(child)


def run(
    child: Child,
    limits: Limits,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
    *,
    tools: bool = False,
) -> dict[str, Any]:
    """Have `child` do the work laid out in its directory, and return its `result.json`.

    `tools`: the work may start the tools of its site. Raises WorkError with what the child said, or
    with what became of it: `deadline_exceeded`, `out_of_memory` (Killed, where somebody else may
    have killed it), `out_of_disk`, `too_many_processes`, `child_crashed`, `child_failed`. What the
    child said, and the deadline, are `final`. Raises Stopped when `should_stop` said so. The child
    is gone afterwards, whatever happened; its files are there until it is closed.
    """
    starved = oom_kills()
    try:
        with contextlib.suppress(BrokenPipeError):
            child.give(Grant(limits.memory_bytes, limits.disk_bytes, limits.deadline_s, tools))
            _watch(child, limits, on_event, should_stop)
        status = child.process.wait()
    finally:
        child.kill()
    return outcome(status, child.directory, starved)


def _watch(
    child: Child,
    limits: Limits,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> None:
    started = time.monotonic()
    next_memory, next_disk = started, started + DISK_TICK_S
    while child.process.poll() is None:
        for event in child.read_events(TICK_S):
            if event.stage != "ready":
                on_event(event)
        if should_stop():
            raise Stopped
        at = time.monotonic()
        if at - started > limits.deadline_s:
            raise final(
                "deadline_exceeded",
                f"The work was stopped after its deadline of {limits.deadline_s:g} s.",
                "Raise `limits.deadline_s`, use fewer samples, or a smaller model.",
            )
        if at >= next_memory:
            next_memory = at + MEMORY_TICK_S
            _check_usage(child, limits)
        if at >= next_disk:
            _check_disk(child, limits)
            next_disk = at + max(DISK_TICK_S, (time.monotonic() - at) / DISK_SHARE)
    for event in child.read_events(0):
        if event.stage != "ready":
            on_event(event)


def _check_usage(child: Child, limits: Limits) -> None:
    memory, threads = usage.memory_and_threads(child.process.pid)
    if memory > limits.memory_bytes:
        raise WorkError(
            "out_of_memory",
            f"The work was stopped: it used {memory >> 20} MiB,"
            f" the limit is {limits.memory_bytes >> 20} MiB.",
            "Use fewer calibration or evaluation samples, or ask the operator for a higher"
            " LITESMITH_VARIANT_MEMORY_BYTES.",
        )
    if threads > (most := sandbox_limits.threads()):
        raise final(
            "too_many_processes",
            f"The work was stopped: it ran {threads} threads, the limit is {most}.",
            "No model needs so many: the file may have taken the process over.",
        )


def _check_disk(child: Child, limits: Limits) -> None:
    if (used := usage.disk_bytes(child.directory)) > limits.disk_bytes:
        raise final(
            "out_of_disk",
            f"The work was stopped: its files took {used >> 20} MiB,"
            f" the limit is {limits.disk_bytes >> 20} MiB.",
            "Use a smaller dataset, or ask the operator for a higher LITESMITH_VARIANT_DISK_BYTES.",
        )
