"""A service of the bench's own, and what the bench asks of it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.client import Client

LITESMITH = Path(sys.executable).parent / "litesmith"


@dataclass(frozen=True)
class Service:
    url: str
    data_dir: Path

    def api_pids(self) -> list[int]:
        """Process ids of the api part."""
        import psutil

        return [
            process.pid
            for process in psutil.process_iter(["cmdline", "environ"])
            if (process.info["cmdline"] or [])[-1:] == ["api"]
            and (process.info["environ"] or {}).get("LITESMITH_DATA_DIR") == str(self.data_dir)
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def service(**settings: str) -> Iterator[Service]:
    """A fresh embedded service, ready and with its spares started."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder).resolve() / "data"
        environment = os.environ | {f"LITESMITH_{k.upper()}": v for k, v in settings.items()}
        with (Path(folder) / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                [str(LITESMITH), "serve", "--port", str(port), "--data-dir", str(data_dir)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_ready(url, process)
            # A service that has just started is still importing TensorFlow into its spares.
            time.sleep(12)
            yield Service(url, data_dir)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError("the service ended at its start")
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the service was never ready")


def table(
    target: Service,
    model: Path,
    data: Path,
    variants: list[Any],
    *,
    tell: Callable[[dict[str, Any]], None] | None = None,
    **spec: Any,
) -> tuple[float, dict[str, Any]]:
    """Seconds from the first uploaded byte to the finished table, and the job as JSON; `tell` is
    given the job as it stands, about once a minute."""
    with Client(target.url) as client:
        started = time.perf_counter()
        uploaded = client.upload_model(model)
        dataset = client.upload_dataset(data)
        body = {"model": uploaded.id, "dataset": dataset.id, "variants": variants} | spec
        job = client.submit(body)
        while job.status in ("queued", "running"):
            job = client.job(job.id, wait=60)
            if tell is not None:
                tell(job.model_dump())
        seconds = time.perf_counter() - started
        answer = httpx.get(f"{target.url}/v1/jobs/{job.id}").json()
    return seconds, answer
