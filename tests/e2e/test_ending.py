"""Processes that are asked to end: what they run is ended, or given back at once."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from running import Files, Service, environment, parts, redis_server, start, stop, unique, until

# No lease ends within a test: what goes on was given back.
SETTINGS = {"lease_s": 600, "light_spares": 1, "tensorflow_spares": 0, "fast_slots": 1}


class Crew:
    """Api and beat, and workers that the tests employ one by one; every job is one new variant,
    so that its work is one child's."""

    def __init__(self, service: Service, settings: dict[str, Any], spec: dict[str, str]) -> None:
        self.service = service
        self.employed: list[subprocess.Popen[bytes]] = []
        self.settings = settings
        self._spec = spec
        self._made = 0

    def employ(self, drain_s: float = 0) -> subprocess.Popen[bytes]:
        """Start a worker, which `Service.worker` is from now on."""
        log = self.service.data_dir / "worker.log"
        env = environment(**self.settings, drain_s=drain_s)
        worker = start(["worker", "--queues", "fast,train"], log, env)
        self.employed.append(worker)
        self.service.processes["worker"] = worker
        return worker

    def employed_one(self, drain_s: float) -> subprocess.Popen[bytes]:
        """The last one, or a new one where that has ended."""
        last = self.employed[-1]
        return last if last.poll() is None else self.employ(drain_s)

    def hang(self) -> tuple[dict[str, Any], psutil.Process]:
        self._made += 1
        recipe = [{"technique": "dynamic_range", "exclude": [f"no-such-layer-{self._made}"]}]
        return self.service.hang(**self._spec, variants=[{"name": "it", "recipe": recipe}])

    def succeeded(self, job: dict[str, Any]) -> None:
        assert self.service.job(job["id"], wait=60)["status"] == "succeeded"

    def restart_api(self) -> None:
        env = environment(**self.settings)
        api = start(["api"], self.service.data_dir / "api.log", env)
        self.service.processes["api"] = api
        until(self._answers, "the api answers")

    def _answers(self) -> bool:
        try:
            return self.service.http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Iterator[Crew]:
    folder = tmp_path_factory.mktemp("ending")
    with redis_server(folder) as redis:
        settings = SETTINGS | {"broker_url": redis.url}
        with parts(folder / "data", **settings) as service:
            spec = {
                "model": service.upload("model", files.tflite)["id"],
                "dataset": service.upload("dataset", files.npz)["id"],
            }
            service.run(**spec, variants=["float16"])
            port = service.url.rsplit(":", 1)[1]
            made = Crew(service, settings | {"data_dir": folder / "data", "port": port}, spec)
            made.employed.append(service.processes["worker"])
            try:
                yield made
            finally:
                for process in (*made.employed, service.processes["api"]):
                    stop(process)


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_that_ends_gives_back_what_runs_and_another_goes_on(crew: Crew) -> None:
    first = crew.employed[0]
    job, child = crew.hang()
    crew.employ(drain_s=600)
    until(lambda: "litesmith_workers 2.0" in crew.service.http.get("/metrics").text, "two work")
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    assert ended(child)
    crew.succeeded(job)
    text = crew.service.http.get(f"/v1/jobs/{job['id']}/events").text
    assert text.count("event: end") == 1


def test_a_worker_with_time_to_drain_ends_what_runs_and_takes_nothing_more(crew: Crew) -> None:
    worker = crew.employed_one(drain_s=600)
    job, child = crew.hang()
    worker.send_signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in crew.service.log("worker").rpartition("ready")[2], "asked")
    later = crew.service.submit(**{k: job[k] for k in ("model", "dataset")}, variants=["int8"])
    child.resume()
    assert worker.wait(20) == 0
    crew.succeeded(job)
    assert crew.service.job(later["id"])["status"] == "queued"
    crew.employ(drain_s=600)
    crew.succeeded(later)


def test_a_worker_that_is_asked_twice_drains_no_longer(crew: Crew) -> None:
    worker = crew.employed_one(drain_s=600)
    job, child = crew.hang()
    worker.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    assert not ended(child)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert ended(child)
    crew.employ()
    crew.succeeded(job)


def events(http: httpx.Client, id_: str, after: str) -> tuple[list[str], str]:
    """The ids of the events after that one until the stream ends, and the last lines."""
    with http.stream("GET", f"/v1/jobs/{id_}/events", headers={"Last-Event-ID": after}) as answer:
        text = "\n".join(answer.iter_lines())
    return [line[4:] for line in text.splitlines() if line.startswith("id: ")], text[-300:]


def test_an_api_that_ends_answers_first_and_its_streams_go_on_elsewhere(crew: Crew) -> None:
    service = crew.service
    crew.employed_one(drain_s=0)
    job, child = crew.hang()
    more = unique("sent while the api ends")

    def slowly() -> Iterator[bytes]:
        yield more[:10]
        service.processes["api"].send_signal(signal.SIGTERM)
        until(lambda: not listens(service.url), "it listens no more")
        yield more[10:]

    with ThreadPoolExecutor() as pool:
        stream = pool.submit(events, service.http, job["id"], "0")
        waiting = pool.submit(service.job, job["id"], 60)
        sent = pool.submit(service.http.post, "/v1/datasets", content=slowly())
        assert sent.result(30).status_code == 201
        seen, goodbye = stream.result(30)
        assert waiting.result(30)["status"] == "running"
    assert "the job goes on" in goodbye
    assert "event: end" not in goodbye
    service.processes["api"].wait(20)
    crew.restart_api()
    child.resume()
    rest, end = events(service.http, job["id"], seen[-1])
    assert "event: end" in end
    assert [int(id_) for id_ in seen + rest] == [*range(1, len(seen + rest) + 1)]


def listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz", timeout=5)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        return True
    return True


def test_an_api_that_is_asked_twice_waits_for_nobody(crew: Crew) -> None:
    service = crew.service
    api = service.processes["api"]

    def never() -> Iterator[bytes]:
        yield b"x"
        api.send_signal(signal.SIGTERM)
        until(lambda: not listens(service.url), "it listens no more")
        api.send_signal(signal.SIGTERM)
        api.wait(20)

    with contextlib.suppress(httpx.TransportError):
        service.http.post("/v1/datasets", content=never())
    assert api.wait(20) is not None
    assert "graceful shutdown exceeded" not in service.log("api")
    crew.restart_api()


def test_readiness_names_the_queue_that_nobody_serves(crew: Crew) -> None:
    service = crew.service
    for worker in crew.employed:
        stop(worker)
    checks = service.http.get("/readyz").json()["checks"]
    assert "inspect, fast, train" in checks["worker"]
    env = environment(**crew.settings)
    before = service.log("worker").count(" ready.")
    crew.employed.append(
        start(["worker", "--queues", "fast"], service.data_dir / "worker.log", env)
    )

    def told() -> str:
        told: str = service.http.get("/readyz").json()["checks"]["worker"]
        return told

    until(lambda: "fast" not in told(), "it is seen")
    assert told().endswith(": train")
    assert {name for name, state in checks.items() if state == "ok"} == {
        "database", "schema", "broker", "storage",
    }  # fmt: skip
    # Where these tests run in the background, SIGINT is ignored until a worker hears signals.
    until(lambda: service.log("worker").count(" ready.") > before, "it hears signals")
