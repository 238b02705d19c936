"""Work for a deployment under kills, and what must be true of it afterwards."""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from deployment import SETTINGS, WORKERS, Deployment
from running import ENDED, until

# How often each is killed, in parts; a kill that finds nobody alive does not count.
WEIGHTS = {
    "child": 4, "worker": 2, "worker2": 2, "api": 2, "beat": 1, "broker": 2, "postgres": 2,
    "freeze": 2,
}  # fmt: skip
PATIENCE_S = 120.0
END_S = 240.0


class Client:
    """Asks until it is answered, as a client that wants its job done would."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        self.statuses: Counter[int] = Counter()

    def ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                answer = self.http.request(method, path, **how)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            self.statuses[answer.status_code] += 1
            if answer.status_code != 503:
                assert answer.status_code < 500, answer.text
                return answer
            time.sleep(0.1)
        raise AssertionError(f"no answer to {method} {path} within {PATIENCE_S:g} s")

    def get(self, path: str) -> Any:
        answer = self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def upload(self, kind: str, content: bytes) -> str:
        row = self.ask("POST", f"/v1/{kind}s", content=content).json()
        path = f"/v1/{kind}s/{row['id']}"
        until(lambda: self.get(path)["status"] != "inspecting", f"{kind} inspected", END_S)
        found = self.get(path)
        assert found["status"] == "ready", found
        return str(row["id"])


@dataclass
class Followed:
    """A job, and its events as one who follows them saw them, reconnecting."""

    id: str
    cancelled: bool = False
    events: list[tuple[int, str, Any]] = field(default_factory=list)
    connections: int = 0
    error: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def follow(self, url: str) -> None:
        deadline = time.monotonic() + 2 * END_S
        with httpx.Client(base_url=url, timeout=20) as http:
            while not self.ended.is_set():
                if time.monotonic() > deadline:
                    self.error = f"no end after {self.events[-1:]}"
                    break
                try:
                    self._read(http)
                except httpx.TransportError:
                    time.sleep(0.1)
        self.ended.set()

    def _read(self, http: httpx.Client) -> None:
        last = self.events[-1][0] if self.events else 0
        headers = {"Last-Event-ID": str(last)} if last else {}
        with http.stream("GET", f"/v1/jobs/{self.id}/events", headers=headers) as answer:
            if answer.status_code != 200:
                time.sleep(0.2)
                return
            self.connections += 1
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "id" in fields:
                    event = (int(fields["id"]), fields["event"], json.loads(fields["data"]))
                    self.events.append(event)
                    fields = {}
                    if event[1] == "end":
                        self.ended.set()


@dataclass
class Figures:
    """What a run did and found."""

    kills: dict[str, int] = field(default_factory=dict)
    freezes: int = 0
    jobs: int = 0
    cancelled: int = 0
    variants: int = 0
    artifacts: int = 0
    events: int = 0
    reconnects: int = 0
    answers_503: int = 0
    objects: int = 0
    unreferenced: int = 0
    half_written: int = 0
    seconds: float = 0.0


class Workload:
    """Keeps jobs going, of few kinds, some the same as others, some cancelled."""

    def __init__(
        self, client: Client, choose: random.Random, trained: dict[str, str], at_once: int
    ) -> None:
        self.client = client
        self.jobs: list[Followed] = []
        self._choose = choose
        self._spec: dict[str, str] = {}
        self._trained = trained
        self._at_once = at_once
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="workload")
        self._error: BaseException | None = None

    def start(self, spec: dict[str, str]) -> None:
        self._spec = spec
        self._thread.start()

    def finish(self) -> None:
        """Submit no more, and wait until all have ended."""
        self._stopping.set()
        self._thread.join(PATIENCE_S)
        if self._error is not None:
            raise self._error
        for job in self.jobs:
            until(job.ended.is_set, f"{job.id} ended", END_S)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if sum(not job.ended.is_set() for job in self.jobs) < self._at_once:
                    self._submit(len(self.jobs))
                time.sleep(0.05)
        except BaseException as error:
            self._error = error

    def _submit(self, number: int) -> None:
        training = bool(self._trained) and number % 8 == 3
        spec = self._training(number) if training else self._quantizing(number)
        key = {"Idempotency-Key": f"job-{number}"}
        answer = self.client.ask("POST", "/v1/jobs", json=spec, headers=key)
        assert answer.status_code == 202, answer.text
        job = Followed(answer.json()["id"])
        url = str(self.client.http.base_url)
        threading.Thread(target=job.follow, args=(url,), daemon=True).start()
        self.jobs.append(job)
        if not training and self._choose.random() < 0.1:
            time.sleep(self._choose.uniform(0, 1))
            answer = self.client.ask("POST", f"/v1/jobs/{job.id}/cancel")
            # Asked twice where the first answer was lost: 409 then, or where it had ended.
            assert answer.status_code in (202, 409), answer.text
            job.cancelled = True

    def _quantizing(self, number: int) -> dict[str, Any]:
        """Two after each other ask for the same: what they share is made once."""
        never = f"no-such-layer-{number // 2}"
        recipe = [{"technique": "dynamic_range", "exclude": [never]}]
        variants = ["float16", "int8", {"name": "dynamic", "recipe": recipe}]
        return self._spec | {"variants": variants, "seed": number // 2}

    def _training(self, number: int) -> dict[str, Any]:
        prune = {"technique": "prune", "sparsity": 0.5, "epochs": 1, "exclude": [f"no-{number}"]}
        recipe = [prune, {"technique": "int8"}]
        return self._trained | {"variants": [{"name": "trained", "recipe": recipe}]}


def kill_at_random(
    deployment: Deployment, choose: random.Random, kills: int, figures: Figures
) -> None:
    """That many kills, each at a random moment, each part started again soon after; and now and
    then a worker that stands still for longer than its leases."""
    done: Counter[str] = Counter()
    weights = dict(WEIGHTS)
    if deployment.postgres is None:
        del weights["postgres"]
    while done.total() < kills:
        time.sleep(choose.uniform(0.1, 3.0))
        deployment.revive()
        (name,) = choose.choices([*weights], [*weights.values()])
        pick, dead_s = choose.random(), choose.uniform(0.0, 1.0)
        if name == "freeze":
            deployment.freeze(WORKERS[int(pick * len(WORKERS))], 1.5 * SETTINGS["lease_s"])
            figures.freezes += 1
        elif name == "child":
            done[name] += deployment.kill_child(pick)
        elif name == "postgres":
            done[name] += deployment.restart_postgres()
        elif deployment.kill(name):
            done[name] += 1
            time.sleep(dead_s)
            deployment.start(name)
    deployment.revive()
    figures.kills = dict(done)


def run(
    deployment: Deployment,
    seed: int,
    kills: int,
    files: tuple[Path, Path],
    trainable: tuple[Path, Path] | None,
    at_once: int,
) -> Figures:
    """`at_once` jobs under kills until that many are done; asserts that nothing was lost or done
    twice."""
    choose, started = random.Random(seed), time.monotonic()
    client = Client(deployment.url)
    spec = _uploaded(client, files)
    trained = _uploaded(client, trainable) if trainable else {}
    work = Workload(client, random.Random(seed + 1), trained, at_once)
    work.start(spec)
    figures = Figures()
    kill_at_random(deployment, choose, kills, figures)
    work.finish()
    _check_jobs(client, work.jobs, figures)
    figures.answers_503 = client.statuses[503]
    figures.seconds = round(time.monotonic() - started, 1)
    return figures


def _uploaded(client: Client, files: tuple[Path, Path]) -> dict[str, str]:
    model, data = files
    return {
        "model": client.upload("model", model.read_bytes()),
        "dataset": client.upload("dataset", data.read_bytes()),
    }


def _check_jobs(client: Client, followed: list[Followed], figures: Figures) -> None:
    listed, cursor = [], ""
    while cursor is not None:
        page = client.get(f"/v1/jobs?limit=200{cursor and f'&cursor={cursor}'}")
        listed += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
    assert sorted(listed) == sorted(job.id for job in followed), "jobs lost, or made twice"
    same: dict[str, str] = {}
    for one in followed:
        assert one.error is None, one.error
        job = client.get(f"/v1/jobs/{one.id}")
        expected = {"cancelled", "succeeded"} if one.cancelled else {"succeeded"}
        assert job["status"] in expected, job
        _check_events(client, one, job)
        figures.jobs += 1
        figures.cancelled += job["status"] == "cancelled"
        figures.events += len(one.events)
        figures.reconnects += one.connections - 1
        for variant in (job["baseline"], *job["variants"]):
            figures.variants += 1
            assert variant["status"] in expected, variant
            _check_artifacts(client, variant, figures)
            if variant["status"] == "succeeded":
                _check_same(job, variant, same)


def _check_events(client: Client, one: Followed, job: dict[str, Any]) -> None:
    """What the follower saw over all its connections is what one connection shows."""
    assert [number for number, _, _ in one.events] == [*range(1, len(one.events) + 1)], one.id
    again = Followed(one.id)
    again.follow(str(client.http.base_url))
    assert again.events == one.events
    names = [name for _, name, _ in one.events]
    assert names.count("end") == 1
    assert names[-1] == "end"
    assert one.events[-1][2]["status"] == job["status"] in ENDED
    for variant in job["variants"]:
        told = [data for _, name, data in one.events if name == "variant"]
        mine = [data for data in told if data["id"] == variant["id"]]
        ends = [data for data in mine if data["status"] in ENDED]
        assert len(ends) == 1, (one.id, "ended twice or never", ends)
        assert mine[-1] == ends[0]
        shares = [data["progress"] for data in mine if data["status"] == "running"]
        assert shares == sorted(shares), (one.id, "went back", shares)


def _check_artifacts(client: Client, variant: dict[str, Any], figures: Figures) -> None:
    kinds = [artifact["kind"] for artifact in variant["artifacts"]]
    assert len(kinds) == len(set(kinds))
    if variant["status"] == "succeeded":
        assert "tflite" in kinds
    for artifact in variant["artifacts"]:
        content = client.ask("GET", f"/v1/artifacts/{artifact['id']}/content").content
        assert sha256(content).hexdigest() == artifact["sha256"], artifact
        assert len(content) == artifact["size_bytes"]
        figures.artifacts += 1


def _check_same(job: dict[str, Any], variant: dict[str, Any], same: dict[str, str]) -> None:
    """The same request is the same file, whoever made it after whatever death."""
    asked = json.dumps([job["model"], job["spec"].get("seed"), variant["recipe"]], sort_keys=True)
    digest = next(a["sha256"] for a in variant["artifacts"] if a["kind"] == "tflite")
    assert same.setdefault(asked, digest) == digest, (job["id"], variant["name"])
