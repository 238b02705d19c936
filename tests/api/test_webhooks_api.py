"""/v1/webhooks over HTTP, and a job of the whole service that a receiver is told of."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from receiver import Receiver, receiving
from running import LEASE_S, Files, embedded, problem, until
from typer.testing import CliRunner

from app.cli import main
from app.client import Client, LimitReached
from app.config import Settings
from app.db import Database, migrate
from app.main import create_app
from app.services import keys


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    made = Settings(
        data_dir=tmp_path_factory.mktemp("webhooks"),
        auth="on",
        rate_limits="off",
        webhook_allowed_networks=["127.0.0.0/8"],
    )
    migrate(made)
    return made


@pytest.fixture(scope="module")
def http(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


def key(settings: Settings, tenant: str, scope: Any = "admin") -> dict[str, str]:
    database = Database(settings.database)
    with database.write() as session:
        _, text = keys.create(session, tenant, "test", [scope])
    database.close()
    return {"Authorization": f"Bearer {text}"}


def test_a_webhook_is_made_changed_and_deleted(
    http: TestClient, settings: Settings, receiver: Receiver
) -> None:
    mine = key(settings, "a")
    body = {"url": receiver.url, "events": ["job.finished", "model.ready"], "description": "CI"}
    again = mine | {"Idempotency-Key": "k"}
    answer = http.post("/v1/webhooks", headers=again, json=body)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert made["secret"].startswith("whsec_")
    assert answer.headers["location"] == f"/v1/webhooks/{made['id']}"
    url = f"/v1/webhooks/{made['id']}"
    shown = http.get(url, headers=mine).json()
    assert "secret" not in shown
    assert shown == {name: made[name] for name in shown}
    repeated = http.post("/v1/webhooks", headers=again, json=body).json()
    assert (repeated["id"], repeated["secret"]) == (made["id"], None)
    assert [row["id"] for row in http.get("/v1/webhooks", headers=mine).json()["items"]] == [
        made["id"]
    ]
    changed = http.patch(url, headers=mine, json={"events": ["model.invalid"], "enabled": False})
    assert changed.json()["events"] == ["model.invalid"]
    assert not changed.json()["enabled"]
    assert changed.json()["url"] == receiver.url
    problem(http.post(f"{url}/test", headers=mine), 409, "webhook_disabled")
    assert http.patch(url, headers=mine, json={"enabled": True}).json()["disabled_reason"] is None
    rotated = http.post(f"{url}/rotate-secret", headers=mine).json()
    assert rotated["secret"] not in (None, made["secret"])
    sent = http.post(f"{url}/test", headers=mine)
    assert sent.status_code == 202
    assert (sent.json()["event"], sent.json()["status"]) == ("webhook.test", "pending")
    listed = http.get(f"{url}/deliveries", headers=mine).json()["items"]
    assert [row["id"] for row in listed] == [sent.json()["id"]]
    assert http.get(f"{url}/deliveries?status=failed", headers=mine).json()["items"] == []
    one = f"{url}/deliveries/{sent.json()['id']}"
    assert http.get(one, headers=mine).json()["body"].startswith('{"type":"webhook.test"')
    assert http.post(f"{one}/replay", headers=mine).status_code == 202
    assert http.delete(url, headers=mine).status_code == 204
    problem(http.get(url, headers=mine), 404, "not_found")
    problem(http.get(one, headers=mine), 404, "not_found")


def test_webhooks_are_of_their_tenant_and_for_its_admins(
    http: TestClient, settings: Settings, receiver: Receiver
) -> None:
    mine, other = key(settings, "b"), key(settings, "c")
    url = http.post("/v1/webhooks", headers=mine, json={"url": receiver.url}).headers["location"]
    sent = http.post(f"{url}/test", headers=mine).json()["id"]
    assert http.get("/v1/webhooks", headers=other).json()["items"] == []
    theirs = http.post("/v1/webhooks", headers=other, json={"url": receiver.url}).headers[
        "location"
    ]
    for method, path in (
        ("GET", url), ("PATCH", url), ("DELETE", url), ("POST", f"{url}/test"),
        ("POST", f"{url}/rotate-secret"), ("GET", f"{url}/deliveries"),
        ("GET", f"{url}/deliveries/{sent}"), ("POST", f"{url}/deliveries/{sent}/replay"),
        ("GET", f"{theirs}/deliveries/{sent}"), ("POST", f"{theirs}/deliveries/{sent}/replay"),
    ):  # fmt: skip
        problem(http.request(method, path, headers=other, json={}), 404, "not_found")
    writer = key(settings, "b", "write")
    problem(http.get("/v1/webhooks", headers=writer), 403, "missing_scope")
    problem(http.post("/v1/webhooks", headers=writer, json={}), 403, "missing_scope")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"url": "https://169.254.169.254/latest/meta-data"}, "webhook_url_not_allowed"),
        ({"url": "https://[::1]/"}, "webhook_url_not_allowed"),
        ({"url": "https://user:pass@127.0.0.1/"}, "webhook_url_not_allowed"),
        ({"url": "https://nowhere.invalid/"}, "webhook_url_not_allowed"),
        ({"url": "ftp://127.0.0.1/"}, "webhook_url_not_allowed"),
        ({"url": "http://127.0.0.1/", "events": []}, "validation_error"),
        ({"url": "http://127.0.0.1/", "events": ["job.deleted"]}, "validation_error"),
        ({"url": "http://127.0.0.1/", "secret": "mine"}, "validation_error"),
        ({"url": "http://127.0.0.1/", "description": "\0"}, "validation_error"),
        ({}, "validation_error"),
    ],
)
def test_what_cannot_be_is_refused(
    http: TestClient, settings: Settings, body: dict[str, Any], code: str
) -> None:
    mine = key(settings, "d")
    problem(http.post("/v1/webhooks", headers=mine, json=body), 422, code)
    made = http.post("/v1/webhooks", headers=mine, json={"url": "http://127.0.0.1:9/"}).json()
    if body:
        answer = http.patch(f"/v1/webhooks/{made['id']}", headers=mine, json=body)
        problem(answer, 422, code)
    http.delete(f"/v1/webhooks/{made['id']}", headers=mine)


def test_there_is_an_end_to_webhooks(http: TestClient, settings: Settings) -> None:
    mine = key(settings, "e")
    body = {"url": "http://127.0.0.1:9/"}
    for _ in range(20):
        assert http.post("/v1/webhooks", headers=mine, json=body).status_code == 201
    problem(http.post("/v1/webhooks", headers=mine, json=body), 409, "too_many_webhooks")


def test_a_job_tells_a_receiver_that_fails_at_first(
    tmp_path: Path, files: Files, receiver: Receiver
) -> None:
    """All parts as processes: the api, a worker, beat and the broker."""
    with embedded(
        tmp_path / "data",
        light_spares=1,
        tensorflow_spares=0,
        fast_slots=1,
        lease_s=LEASE_S,
        webhook_allowed_networks="127.0.0.0/8",
        webhook_retry_s="0.2,0.2",
    ) as service:

        def litesmith(*words: str) -> str:
            done = CliRunner().invoke(main, ["--url", service.url, *words])
            assert done.exit_code == 0, done.output
            return done.stdout

        events = "model.ready,job.started,job.finished"
        made = json.loads(
            litesmith("webhooks", "create", receiver.url, "--events", events, "--json")
        )
        receiver.answers[:] = [500, 500]
        model = service.upload("model", files.tflite)
        job = service.run(model=model["id"], variants=["float16"])
        url = f"/v1/webhooks/{made['id']}/deliveries"

        def told() -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = service.http.get(url).json()["items"]
            return rows if [row["status"] for row in rows] == ["delivered"] * 3 else []

        rows = until(told, "three messages are delivered")
        listed = litesmith("webhooks", "deliveries", made["id"], "--status", "delivered")
        assert "job.finished" in listed
        assert listed.count("200 in ") == 3
        assert "enabled" in litesmith("webhooks", "list")
        litesmith("tenants", "set", "default", "--max-storage", "1GiB", "--max-jobs-per-day", "9",
                  "--max-concurrent-jobs", "none", "--data-dir", str(service.data_dir))  # fmt: skip
        assert "1073741824" in litesmith("usage")
        shown = litesmith("tenants", "show", "default", "--data-dir", str(service.data_dir))
        assert [line.split()[-2:] for line in shown.splitlines() if "jobs today" in line] == [
            ["1", "9"]
        ]
        with Client(service.url) as client:
            again = client.webhooks.replay(made["id"], rows[0]["id"])
            assert again.status == "pending"
            until(lambda: len(receiver.messages) == 6, "the message is sent again")
            client.webhooks.delete(made["id"])
            assert list(client.webhooks.list()) == []
            submit = {"model": model["id"], "variants": ["float16"]}
            litesmith("tenants", "set", "default", "--max-jobs-per-day", "1",
                      "--data-dir", str(service.data_dir))  # fmt: skip
            with pytest.raises(LimitReached) as caught:
                client.submit(submit)
            assert caught.value.code == "quota_exceeded"
            assert (caught.value.retry_after_s or 0) > 0
            refused = CliRunner().invoke(
                main, ["--url", service.url, "optimize", model["id"], "-v", "float16"]
            )
            assert refused.exit_code == 2
            assert "Jobs of the day: 1 of 1 are used." in refused.stderr
        assert sum(row["attempts"] for row in rows) == len(receiver.messages) - 1 == 5
    bodies = {message.headers["webhook-id"]: message for message in receiver.messages}
    found = {
        str(one["type"]): one["data"]
        for m in bodies.values()
        if (one := m.verified(made["secret"]))
    }
    assert set(found) == {"model.ready", "job.started", "job.finished"}
    finished: Any = found["job.finished"]
    assert (finished["id"], finished["status"]) == (job["id"], "succeeded")
    assert [variant["status"] for variant in finished["variants"]] == ["succeeded"]
