"""Rate limits and quotas over HTTP: with a real broker, without one, and for strangers."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from running import Files, problem, until

from app.config import Settings
from app.db import Database, migrate
from app.embedded import _broker_command
from app.main import create_app
from app.services import keys, quotas

Start = Callable[..., "Api"]


class Api:
    """An api in this process, with a key for each of its tenants."""

    def __init__(self, client: TestClient, database: Database) -> None:
        self.http = client
        self.database = database

    def key(self, tenant: str = "default") -> dict[str, str]:
        with self.database.write() as session:
            _, text = keys.create(session, tenant, "test", ["write"])
        return {"Authorization": f"Bearer {text}"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts an api that asks for keys; `broker=False`: without a broker."""
    with ExitStack() as stack:

        def run(*, broker: bool = True, **settings: Any) -> Api:
            made = Settings(data_dir=tmp_path, host="0.0.0.0", **settings)
            migrate(made)
            if broker:
                process = subprocess.Popen(_broker_command(made.broker_socket))
                stack.callback(process.wait)
                stack.callback(process.terminate)
                until(made.broker_socket.exists, "the broker listens")
            database = Database(made.database)
            stack.callback(database.close)
            return Api(stack.enter_context(TestClient(create_app(made))), database)

        yield run


def test_requests_over_the_rate_are_told_when_to_come_back(start: Start) -> None:
    api = start(rate_limit_reads="3/hour", rate_limit_writes="1/hour")
    mine, other = api.key(), api.key()
    for left in (2, 1, 0):
        answer = api.http.get("/v1/jobs", headers=mine)
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"reads";q=3;w=3600'
        assert answer.headers["ratelimit"].startswith(f'"reads";r={left};t=')
    answer = api.http.get("/v1/models", headers=mine)
    assert problem(answer, 429, "rate_limited")["hint"]
    assert answer.headers["ratelimit"].startswith('"reads";r=0;t=')
    assert 1 <= int(answer.headers["retry-after"]) <= 7200
    # Another kind of request, another key, and what needs no key are counted for themselves.
    assert api.http.post("/v1/jobs", headers=mine, json={}).status_code == 422
    assert api.http.post("/v1/jobs", headers=mine, json={}).status_code == 429
    assert api.http.get("/v1/jobs", headers=other).status_code == 200
    assert api.http.get("/healthz").status_code == 200
    assert "ratelimit" not in api.http.get("/healthz").headers


def test_advice_is_a_read_and_a_form_an_upload(start: Start) -> None:
    api = start()
    headers = api.key()
    for path, send, policy in (
        ("/v1/advise", {"json": {}}, "reads"),
        ("/v1/models", {"content": b"x"}, "uploads"),
        ("/v1/jobs", {"files": {"model": b"x"}}, "uploads"),
        ("/v1/jobs", {"json": {}}, "writes"),
    ):
        answer = api.http.post(path, headers=headers, **send)
        assert answer.headers["ratelimit-policy"].startswith(f'"{policy}"'), path


def test_strangers_are_counted_by_address(start: Start) -> None:
    api = start(rate_limit_strangers="2/hour", rate_limit_reads="1/hour")
    wrong = {"Authorization": "Bearer ls_wrong"}
    for _ in range(2):
        problem(api.http.get("/v1/jobs", headers=wrong), 401, "unauthenticated")
    problem(api.http.get("/v1/jobs", headers=wrong), 429, "rate_limited")
    # Who has a key is no stranger.
    assert api.http.get("/v1/jobs", headers=api.key()).status_code == 200


def test_without_a_broker_nobody_is_refused(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    api = start(broker=False, rate_limit_reads="1/hour")
    headers = api.key()
    for _ in range(5):
        answer = api.http.get("/v1/jobs", headers=headers)
        assert answer.status_code == 200
        assert "ratelimit" not in answer.headers
    told = [record for record in caplog.records if "rate limits are off" in record.message]
    assert len(told) == 1


def test_on_this_machine_alone_there_are_no_limits(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate(settings)
    assert create_app(settings).state.limiter is None
    assert create_app(settings.model_copy(update={"rate_limits": "on"})).state.limiter is not None


def test_a_full_storage_takes_nothing_new(start: Start, files: Files) -> None:
    size = files.tflite.stat().st_size
    api = start(tenant_max_storage_bytes=size + 10, rate_limits="off")
    headers = api.key("team")
    first = api.http.post("/v1/models", headers=headers, content=files.tflite.read_bytes())
    assert first.status_code == 201
    other = api.http.post("/v1/datasets", headers=headers, content=files.npz.read_bytes())
    told = problem(other, 507, "quota_exceeded")
    assert f"{size} of {size + 10}" in told["detail"]
    for path, more in (("/v1/analyze", {}), ("/v1/uploads", {"Upload-Length": "1000"})):
        sent = headers | {"Tus-Resumable": "1.0.0"} | more
        refused = api.http.post(path, headers=sent, content=files.tflite.read_bytes())
        problem(refused, 507, "quota_exceeded")
    # The same bytes again need no room, and others have theirs.
    again = api.http.post("/v1/models", headers=headers, content=files.tflite.read_bytes())
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    free = api.http.post("/v1/models", headers=api.key("b"), content=files.tflite.read_bytes())
    assert free.status_code == 201
    usage = api.http.get("/v1/usage", headers=headers).json()
    assert usage["used"]["storage_bytes"] == size
    assert usage["limits"]["max_storage_bytes"] == size + 10
    assert usage["limits"]["max_jobs_per_day"] is None


def test_jobs_over_a_limit_are_refused_and_leave_nothing(start: Start, files: Files) -> None:
    api = start(rate_limits="off", max_queued_jobs=2)
    headers, other = api.key("team"), api.key("other")
    with api.database.write() as session:
        quotas.set_limits(session, "team", {"max_jobs_per_day": 1})
    ids = [
        api.http.post("/v1/models", headers=who, content=files.tflite.read_bytes()).json()["id"]
        for who in (headers, other)
    ]

    def submit(who: dict[str, str], model: str, **more: str) -> Any:
        spec = {"model": model, "variants": ["float16"]}
        return api.http.post("/v1/jobs", headers=who | more, json=spec)

    first = submit(headers, ids[0], **{"Idempotency-Key": "one"})
    assert first.status_code == 202
    # The first answer again is no new job.
    assert submit(headers, ids[0], **{"Idempotency-Key": "one"}).json() == first.json()
    refused = submit(headers, ids[0])
    assert "1 of 1" in problem(refused, 429, "quota_exceeded")["detail"]
    assert int(refused.headers["retry-after"]) <= 86_400
    assert len(api.http.get("/v1/jobs", headers=headers).json()["items"]) == 1
    assert submit(other, ids[1]).status_code == 202
    # Two wait, whosever they are: the queue is full.
    busy = submit(other, ids[1])
    problem(busy, 503, "busy")
    assert busy.headers["retry-after"] == "60"
    usage = api.http.get("/v1/usage", headers=headers).json()
    assert usage["used"] | {"storage_bytes": 0} == {
        "storage_bytes": 0, "concurrent_jobs": 1, "jobs_today": 1, "queued_jobs": 1,
    }  # fmt: skip
