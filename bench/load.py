"""Load: 50 clients while jobs run, and lists of many jobs against lists of few. `make load`

python -m bench.load [--seconds 40] [--jobs 100000] [--database FEW MANY]

Everything is on this machine, over loopback. `--database` names two empty PostgreSQL databases;
without it SQLite is measured. The clients wait between requests, as dashboards and scripts do: the
figure is how long an answer takes, not how many there could be.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from app.config import Settings
from app.db import Database, migrate
from bench.filling import fill
from bench.service import LITESMITH, free_port, service

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = {"poll": 20, "list": 15, "events": 10, "upload": 5}
THINK_S = (0.5, 1.5)
UPLOAD_BYTES = 200_000
JOBS_AT_ONCE = 2
ROUNDS = 200
FEW = 100
READS = {
    "newest": "/v1/jobs?limit=20",
    "a page of 50": "/v1/jobs?limit=50",
    "by status": "/v1/jobs?limit=5&status=failed",
    "by a status that none has": "/v1/jobs?limit=20&status=running",
    "the last page": "/v1/jobs?limit=20&cursor={oldest}",
    "one": "/v1/jobs/{oldest}",
    "models": "/v1/models?limit=20",
}


class Measured:
    """Milliseconds of each answer by kind, and what went wrong."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()

    async def timed(self, kind: str, call: Callable[[], Awaitable[httpx.Response]]) -> None:
        started = time.perf_counter()
        try:
            answer = await call()
        except httpx.HTTPError as error:
            self.errors[f"{kind}: {type(error).__name__}"] += 1
            return
        self.times[kind].append((time.perf_counter() - started) * 1000)
        if answer.status_code >= 400:
            self.errors[f"{kind}: {answer.status_code}"] += 1

    def told(self) -> dict[str, dict[str, float]]:
        return {kind: quantiles(times) for kind, times in sorted(self.times.items())}


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    return {"answers": len(ordered), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1)}


class Crowd:
    """The clients, over the jobs that are kept going for them."""

    def __init__(self, url: str, spec: dict[str, str], seconds: float) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)
        )
        self._spec = spec
        self._until = time.monotonic() + seconds
        self._newest: list[str] = []
        self.measured = Measured()
        self.jobs = 0

    async def run(self) -> None:
        parts = {"poll": self._poll, "list": self._list, "events": self._events}
        parts["upload"] = self._upload
        async with self._http:
            await self._submit()
            keeping = [asyncio.create_task(self._keep_jobs()) for _ in range(JOBS_AT_ONCE)]
            clients = [self._client(parts[kind]) for kind, n in CLIENTS.items() for _ in range(n)]
            await asyncio.gather(*clients)
            await asyncio.gather(*keeping)

    def _open(self) -> bool:
        return time.monotonic() < self._until

    async def _client(self, act: Callable[[], Awaitable[None]]) -> None:
        while self._open():
            await asyncio.sleep(random.uniform(*THINK_S))
            await act()

    async def _submit(self) -> str:
        # A pattern that matches no layer makes the recipe new: nothing is taken from the cache.
        recipe = [{"technique": "dynamic_range", "exclude": [f"none-{time.time_ns()}"]}]
        variants = ["int8", {"name": "new", "recipe": recipe}]
        body = self._spec | {"variants": variants, "seed": self.jobs}
        answer = await self._http.post("/v1/jobs", json=body)
        answer.raise_for_status()
        self.jobs += 1
        id_: str = answer.json()["id"]
        self._newest = [*self._newest[-4:], id_]
        return id_

    async def _keep_jobs(self) -> None:
        while self._open():
            id_ = await self._submit()
            ended = (await self._http.get(f"/v1/jobs/{id_}", params={"wait": 50})).json()
            if ended["status"] not in ("succeeded", "running", "queued"):
                self.measured.errors[f"job: {ended['status']}"] += 1

    async def _poll(self) -> None:
        path = f"/v1/jobs/{random.choice(self._newest)}"
        await self.measured.timed("poll a job", lambda: self._http.get(path))

    async def _list(self) -> None:
        path = random.choice(["/v1/jobs?limit=20", "/v1/jobs?status=running", "/v1/models"])
        await self.measured.timed("list", lambda: self._http.get(path))

    async def _upload(self) -> None:
        # An npz of noise, as another client might send: each is new.
        content = _npz(os.urandom(UPLOAD_BYTES))
        await self.measured.timed(
            "upload 200 kB", lambda: self._http.post("/v1/datasets", content=content)
        )

    async def _events(self) -> None:
        """Until the job's end, or the load's: the first event is timed, a broken stream told."""
        started, first = time.perf_counter(), True
        path = f"/v1/jobs/{self._newest[-1]}/events"
        try:
            async with self._http.stream("GET", path) as answer:
                async for line in answer.aiter_lines():
                    if first and line.startswith("event:"):
                        first = False
                        taken = (time.perf_counter() - started) * 1000
                        self.measured.times["first event"].append(taken)
                    if not self._open():
                        return
        except httpx.HTTPError as error:
            self.measured.errors[f"events: {type(error).__name__}"] += 1


def _npz(noise: bytes) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, x=np.frombuffer(noise, np.uint8).reshape(-1, 8, 8, 1))
    return buffer.getvalue()


def crowd(database: str, files: Path, seconds: float) -> dict[str, Any]:
    """50 clients over a service on that database, which holds many jobs already."""
    with service(database_url=database) as target:
        spec = {}
        for kind, name in (("model", "digits.keras"), ("dataset", "digits.npz")):
            with (files / name).open("rb") as file:
                row = httpx.post(f"{target.url}/v1/{kind}s", content=file, timeout=60).json()
            spec[kind] = row["id"]
            while httpx.get(f"{target.url}/v1/{kind}s/{row['id']}").json()["status"] != "ready":
                time.sleep(0.2)
        load_before = os.getloadavg()[0]
        clients = Crowd(target.url, spec, seconds)
        # The clients' own pauses for garbage would count as the service's.
        gc.freeze()
        asyncio.run(clients.run())
        return {
            "clients": CLIENTS,
            "jobs_run_meanwhile": clients.jobs,
            "load_average_before": round(load_before, 2),
            "load_average_after": round(os.getloadavg()[0], 2),
            "errors": dict(clients.measured.errors),
            "answers": clients.measured.told(),
        }


@contextmanager
def api(database: str, folder: Path) -> Iterator[httpx.Client]:
    """An api alone on that database."""
    port = free_port()
    env = os.environ | {
        "LITESMITH_DATABASE_URL": database,
        "LITESMITH_DATA_DIR": str(folder),
        "LITESMITH_PORT": str(port),
    }
    process = subprocess.Popen([str(LITESMITH), "api"], env=env, stderr=subprocess.DEVNULL)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        try:
            for _ in range(600):
                try:
                    http.get("/healthz").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield http
        finally:
            process.terminate()
            process.wait(30)


def lists(few: str, many: str, work: Path) -> dict[str, Any]:
    """Each read of both databases, in turns; the ratio is what disturbs both alike."""
    oldest = {url: _oldest(url) for url in (few, many)}
    found: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}
    with api(few, work / "few") as small, api(many, work / "many") as big:
        for name, path in READS.items():
            times: dict[str, list[float]] = {few: [], many: []}
            for _ in range(ROUNDS):
                for url, http in ((few, small), (many, big)):
                    started = time.perf_counter()
                    http.get(path.format(oldest=oldest[url])).raise_for_status()
                    times[url].append((time.perf_counter() - started) * 1000)
            medians = [median(times[url]) for url in (few, many)]
            found[name] = {
                "few_ms": round(medians[0], 2),
                "many_ms": round(medians[1], 2),
                "ratio": round(medians[1] / medians[0], 2),
            }
    return found


def _oldest(url: str) -> str:
    """A job of the tenant near the end of its list."""
    from sqlalchemy import select

    from app.tables import JobRow

    database = Database(url)
    with database.read() as session:
        ids = select(JobRow.id).where(JobRow.tenant_id == "default").order_by(JobRow.id)
        found = session.scalars(ids.offset(50).limit(1)).one()
    database.close()
    return found


def _filled(url: str, jobs: int) -> str:
    migrate(Settings(database_url=url))
    database = Database(url)
    fill(database, jobs)
    database.close()
    return url


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--database", nargs=2, metavar=("FEW", "MANY"), help="two empty databases")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subprocess.run(
            [sys.executable, str(ROOT / "demo" / "digits.py"), name], check=True, stdout=sys.stderr
        )
        few, many = asked.database or [f"sqlite:///{work / one}.db" for one in ("few", "many")]
        _filled(few, FEW)
        started = time.monotonic()
        _filled(many, asked.jobs)
        print(f"filled in {time.monotonic() - started:.0f} s", file=sys.stderr)
        found = {
            "processors": os.cpu_count(),
            "database": many.split(":")[0],
            "jobs": {"few": FEW, "many": asked.jobs},
            "lists": lists(few, many, work),
            "crowd": crowd(many, work, asked.seconds),
        }
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
