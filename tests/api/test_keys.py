"""API keys over HTTP and by command: made, shown once, used, expired, revoked."""

import asyncio
import hashlib
import os
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from running import LITESMITH, environment, problem, unique
from sqlalchemy import select, text, update
from tenants import Tenant, World, key_row, world
from typer.testing import CliRunner, Result

from app import reconciler
from app.cli import main
from app.config import Settings
from app.db import Database, migrate
from app.services import keys
from app.tables import AuditRow, IdempotencyRow, JobRow, KeyRow, now


@pytest.fixture
def w(database: Database, tmp_path: Path) -> Iterator[World]:
    with world(database, tmp_path) as made:
        yield made


def create(w: World, **body: Any) -> dict[str, Any]:
    answer = w.send("POST", "/v1/keys", w.tenants["default"].keys["admin"], json=body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/keys/{made['id']}"
    return made


def change(database: Database, id_: str, **values: Any) -> None:
    with database.write() as session:
        session.execute(update(KeyRow).where(KeyRow.id == id_).values(**values))


def test_a_key_is_shown_once_and_kept_as_its_digest(w: World) -> None:
    made = create(w, name="CI", scopes=["write"])
    key = made["key"]
    assert keys.KEY.fullmatch(key)
    assert made["prefix"] == key[:11]
    assert w.send("GET", "/v1/models", key).status_code == 200
    admin = w.tenants["default"].keys["admin"]
    for path in ("/v1/keys", f"/v1/keys/{made['id']}"):
        shown = w.send("GET", path, admin)
        assert shown.headers["cache-control"] == "no-store"
        assert made["prefix"] in shown.text
        assert key not in shown.text
    row = key_row(w.database, made["id"])
    assert row.digest == hashlib.sha256(key.encode()).hexdigest()
    with w.database.read() as session:
        for table in ("api_keys", "idempotency_keys", "audit"):
            for line in session.execute(text(f"SELECT * FROM {table}")):
                assert key[11:] not in str(line), table
    others = [create(w, name="CI")["key"] for _ in range(3)]
    assert len({key, *others}) == 4


def test_a_repeated_request_makes_one_key_and_shows_it_once(w: World) -> None:
    admin = w.tenants["default"].keys["admin"]
    headers = {"idempotency-key": "make-a-key"}
    first, again = (
        w.send("POST", "/v1/keys", admin, json={"name": "CI"}, headers=headers) for _ in range(2)
    )
    assert first.status_code == again.status_code == 201
    assert first.json() | {"key": None} == again.json()
    assert first.json()["key"]
    with w.database.read() as session:
        kept = session.scalars(select(IdempotencyRow.body)).all()
    assert len(kept) == 1
    assert first.json()["key"] not in kept[0]
    # Keys of requests are a tenant's own.
    foreign = w.send(
        "POST", "/v1/keys", w.tenants["other"].keys["admin"], json={"name": "!"}, headers=headers
    )
    assert foreign.status_code == 201


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "name"), ({"name": ""}, "name"), ({"name": "x", "scopes": []}, "scopes"),
     ({"name": "x", "scopes": ["operator"]}, "scopes.0"),
     ({"name": "x", "tenant": "other"}, "tenant"),
     ({"name": "x", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
     ({"name": "x", "expires_at": "9999-12-31T23:59:59-23:00"}, "expires_at"),
     ({"name": "x", "expires_at": "2030-01-01T00:00:00"}, "expires_at"),
     ({"name": "x\x00"}, "spec")],
)  # fmt: skip
def test_a_key_that_cannot_be(w: World, body: dict[str, Any], field: str) -> None:
    answer = w.send("POST", "/v1/keys", w.tenants["default"].keys["admin"], json=body)
    assert problem(answer, 422, "validation_error")["errors"][0]["field"] == field


def test_a_key_opens_nothing_once_revoked_or_expired(w: World) -> None:
    soon = (now() + timedelta(hours=1)).isoformat()
    made = create(w, name="CI", expires_at=soon)
    assert w.send("GET", "/v1/models", made["key"]).status_code == 200
    change(w.database, made["id"], expires_at=now() - timedelta(seconds=1))
    told = problem(w.send("GET", "/v1/models", made["key"]), 401, "unauthenticated")
    assert "expired" in told["detail"]
    change(w.database, made["id"], expires_at=None)
    assert w.send("GET", "/v1/models", made["key"]).status_code == 200
    admin = w.tenants["default"].keys["admin"]
    for _ in range(2):
        assert w.send("DELETE", f"/v1/keys/{made['id']}", admin).status_code == 204
    told = problem(w.send("GET", "/v1/models", made["key"]), 401, "unauthenticated")
    assert "revoked" in told["detail"]
    shown = w.send("GET", f"/v1/keys/{made['id']}", admin).json()
    assert shown["revoked_at"]


def test_who_waits_is_woken_whoever_waited_first(w: World) -> None:
    """One watcher looks for all: it must not be held to the tenant whose request began it."""
    first, second = w.tenants["default"], w.tenants["other"]
    ids = [tenant.ids["jobs"] for tenant in (first, second)]
    with w.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id.in_(ids)).values(status="running"))

    async def wait_for(tenant: Tenant, seconds: float) -> str:
        headers = {"authorization": f"Bearer {tenant.keys['read']}"}
        url = f"/v1/jobs/{tenant.ids['jobs']}?wait={seconds}"
        return str((await w.http.get(url, headers=headers)).json()["status"])

    async def run() -> tuple[str, str]:
        long = asyncio.create_task(wait_for(first, 5))
        watcher = w.app.state.parts.watcher
        while not watcher._waiting:
            await asyncio.sleep(0.01)
        short = asyncio.create_task(wait_for(second, 300))
        while len(watcher._waiting) < 2:
            await asyncio.sleep(0.01)
        end = update(JobRow).where(JobRow.id == second.ids["jobs"])
        with w.database.write() as session:
            session.execute(end.values(status="succeeded", event_seq=JobRow.event_seq + 1))
        done, _ = await asyncio.wait({long, short}, return_when=asyncio.FIRST_COMPLETED)
        assert done == {short}
        return short.result(), await long

    assert w.loop.run(run()) == ("succeeded", "running")


def test_what_is_no_key_of_the_service_is_401(w: World) -> None:
    key = w.tenants["default"].keys["admin"]
    wrong = [
        f"Bearer {key[:-1]}{'A' if key[-1] != 'A' else 'B'}", f"Bearer {key}x", "Bearer", "Bearer ",
        f"Bearer {key[:11]}", f"Basic {key}", key, f"Bearer {key.lower()}", "Bearer ' OR 1=1",
        f"Bearer ls_{'A' * 51}", "Bearer ls_" + "x" * 5000,
    ]  # fmt: skip
    for header in [*wrong, "Bearer ls_é".encode("latin-1"), b"Bearer \x00"]:
        answer = w.send("GET", "/v1/models", None, headers={"authorization": header})
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer ")
    lower = w.send("GET", "/v1/models", None, headers={"authorization": f"bearer {key}"})
    assert lower.status_code == 200


def test_the_last_use_is_noted_once_a_minute(w: World) -> None:
    made = create(w, name="CI")

    def used(ago: float | None) -> tuple[Any, Any]:
        before = None if ago is None else now() - timedelta(seconds=ago)
        change(w.database, made["id"], last_used_at=before)
        assert w.send("GET", "/v1/models", made["key"]).status_code == 200
        return before, key_row(w.database, made["id"]).last_used_at

    assert used(None)[1] is not None
    before, after = used(30)
    assert before == after
    before, after = used(61)
    assert after > before + timedelta(seconds=60)


def test_old_lines_of_the_audit_log_are_forgotten(w: World) -> None:
    old, new = create(w, name="old")["id"], create(w, name="new")["id"]
    long_ago = now() - timedelta(days=w.settings.audit_retention_days + 1)
    with w.database.write() as session:
        which = AuditRow.subject == old
        session.execute(update(AuditRow).where(which).values(created_at=long_ago))
        reconciler.clean(session, w.settings)
    audit = w.send("GET", "/v1/audit", w.tenants["default"].keys["admin"]).json()["items"]
    assert [entry["subject"] for entry in audit] == [new]


def test_tenants_share_neither_files_nor_request_keys(w: World) -> None:
    headers = {"idempotency-key": "same"}
    content = unique("of both")
    answers = [
        w.send("POST", "/v1/datasets", tenant.keys["write"], content=content, headers=headers)
        for tenant in w.tenants.values()
    ]
    # 200, or the other's id, would tell that somebody else has these bytes.
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json()["id"] != answers[1].json()["id"]
    objects = w.settings.root / "objects"
    stored = hashlib.sha256(content).hexdigest()
    assert [path.name for path in objects.glob("??/*")].count(stored) == 1
    own = w.send("POST", "/v1/datasets", w.tenants["other"].keys["write"], content=content)
    assert own.status_code == 200


def test_a_request_without_a_body_worth_reading_is_refused_first(w: World) -> None:
    """Who may not upload makes the service receive nothing."""
    received = 0

    async def body() -> Any:
        nonlocal received
        for _ in range(64):
            received += 2**16
            yield bytes(2**16)

    problem(w.send("POST", "/v1/models", None, content=body()), 401, "unauthenticated")
    reader = w.tenants["default"].keys["read"]
    problem(w.send("POST", "/v1/models", reader, content=body()), 403, "missing_scope")
    assert received == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 200), ({"host": "localhost:9000"}, 200), ({"host": "[::1]:8000"}, 200),
     ({"host": "127.0.0.1"}, 200), ({"host": "evil.example:8000"}, 401), ({"host": "["}, 401),
     ({"host": "127.0.0.1.evil.example"}, 401),
     ({"x-forwarded-for": "10.0.0.1"}, 401), ({"forwarded": "for=10.0.0.1"}, 401),
     ({"origin": "https://evil.example"}, 401), ({"origin": "null"}, 401),
     ({"origin": "http://localhost:3000"}, 200), ({"origin": "https://dashboard.example"}, 200),
     ({"authorization": "Bearer ls_wrong"}, 401)],
)  # fmt: skip
def test_without_keys_only_this_machine_is_trusted(
    database: Database, tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    """A loopback address asks for no key, yet web pages and proxies reach it too."""
    origins = ["https://dashboard.example"]
    with world(database, tmp_path, auth="auto", cors_origins=origins) as w:
        assert w.send("GET", "/v1/models", None, headers=headers).status_code == status
        # A key counts where it is given.
        other = w.tenants["other"]
        more = {name: value for name, value in headers.items() if name != "authorization"}
        items = w.send("GET", "/v1/models", other.keys["read"], headers=more).json()["items"]
        assert [item["id"] for item in items] == [other.ids["models"]]


def test_the_schema_tells_who_may_call_what(w: World, tmp_path: Path) -> None:
    schema = w.send("GET", "/openapi.json", None).json()
    assert schema["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    found = {
        operation["operationId"]: operation.get("security")
        for methods in schema["paths"].values()
        for operation in methods.values()
    }
    assert found["get_health"] is None
    assert found["list_models"] == [{"api_key": ["read"]}]
    assert found["create_model"] == [{"api_key": ["write"]}]
    assert found["create_key"] == [{"api_key": ["admin"]}]


def test_security_headers_are_on_every_answer(w: World) -> None:
    tenant = w.tenants["default"]
    key, job = tenant.keys["admin"], tenant.ids["jobs"]
    file = f"/v1/artifacts/{tenant.ids['artifacts']}/content"
    paths = ["/healthz", "/docs", "/v1/models", "/v1/nothing", f"/v1/jobs/{job}/events", file,
             f"/v1/jobs/{job}/report?format=html", f"/v1/jobs/{job}/artifacts.zip"]  # fmt: skip
    policies = {}
    for path in paths:
        for given in (key, None):
            headers = w.send("GET", path, given).headers
            assert headers["x-content-type-options"] == "nosniff", path
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            policies[path, given is not None] = headers["content-security-policy"]
    for policy in policies.values():
        assert policy.startswith("default-src 'none'; frame-ancestors 'none'")
    assert policies["/v1/models", True] == "default-src 'none'; frame-ancestors 'none'"
    report = policies[f"/v1/jobs/{job}/report?format=html", True]
    assert "style-src 'unsafe-inline'" in report
    assert "script" not in report
    docs = policies["/docs", True]
    page = w.send("GET", "/docs", None).text
    for source in ("https://cdn.jsdelivr.net", "https://fastapi.tiangolo.com"):
        assert source in page
        assert source in docs


def command(*arguments: str, **settings: Any) -> Result:
    """`litesmith keys …`, in this process."""
    env: dict[str, str | None] = {name: None for name in os.environ if "LITESMITH_" in name}
    env |= {f"LITESMITH_{name.upper()}": str(value) for name, value in settings.items()}
    result = CliRunner().invoke(main, ["keys", *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.mark.parametrize(
    ("host", "auth", "asks"),
    [("0.0.0.0", "auto", True), ("::", "auto", True), ("10.0.0.1", "auto", True),
     ("my-machine", "auto", True), ("", "auto", True), ("127.0.0.1", "on", True),
     ("127.0.0.1", "auto", False), ("127.8.8.8", "auto", False), ("::1", "auto", False),
     ("localhost", "auto", False)],
)  # fmt: skip
def test_keys_are_asked_for_but_on_this_machine_alone(
    database: Database, host: str, auth: str, asks: bool
) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    known: dict[str, Any] = {"host": host, "auth": auth, "database_url": url}
    settings = Settings(**known)
    assert settings.asks_for_keys == asks
    assert (keys.refusal(settings) is not None) == asks
    with database.write() as session:
        row, _ = keys.create(session, "default", "n", ["read"])
    assert keys.refusal(settings) is None
    for values in ({"revoked_at": now()}, {"expires_at": now(), "revoked_at": None}):
        change(database, row.id, **values)
        # A key that opens nothing is none.
        assert (keys.refusal(settings) is not None) == asks


def test_a_database_that_is_away_is_no_reason_not_to_start() -> None:
    """It may come back; until then no key is accepted."""
    away = Settings(auth="on", database_url="postgresql://u:p@127.0.0.1:1/x")
    assert keys.refusal(away) is None


@pytest.mark.parametrize("process", ["serve", "api"])
def test_no_service_for_others_starts_without_a_key(tmp_path: Path, process: str) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate(settings)
    refused = subprocess.run(
        [str(LITESMITH), process, "--host", "0.0.0.0", "--port", "0"],
        env=environment(data_dir=tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 1, refused.stderr
    assert "Traceback" not in refused.stderr
    told = f"litesmith keys create --name NAME --scopes admin --data-dir {tmp_path}"
    assert told in refused.stderr


def test_a_database_without_tables_is_told(tmp_path: Path) -> None:
    empty = {"database_url": f"sqlite:///{tmp_path}/x.db", "auth": "on"}
    refusal = keys.refusal(Settings.model_validate(empty))
    assert refusal is not None
    assert "litesmith migrate" in refusal
    # Not even a folder for it: SQLite says of that what it says of one that is away.
    nowhere = Settings(host="0.0.0.0", data_dir=tmp_path / "nowhere")
    assert "litesmith migrate" in (keys.refusal(nowhere) or "")
    listed = command("list", **empty)
    assert listed.exit_code == 2
    assert "litesmith migrate" in listed.stderr


def test_keys_by_command(database: Database, tmp_path: Path) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    made = command(
        "create", "--name", "dashboard", "--tenant", "acme", "--scopes", "admin",
        "--expires-in-days", "2", database_url=url, data_dir=tmp_path,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert keys.KEY.fullmatch(key)
    assert "its first key" in made.stderr
    assert key not in made.stderr
    with world(database, tmp_path) as w:
        own = w.send("GET", "/v1/keys", key).json()["items"]
        assert [item["name"] for item in own] == ["dashboard"]
        audit = w.send("GET", "/v1/audit", key).json()["items"]
        assert [(e["action"], e["subject"], e["key"]) for e in audit] == [
            ("create_key", own[0]["id"], None)
        ]
    listed = command("list", "--tenant", "acme", database_url=url)
    assert "dashboard" in listed.stdout
    assert key not in listed.stdout
    assert key[:11] in listed.stdout
    assert command("revoke", own[0]["id"], database_url=url).exit_code == 0
    assert "revoked" in command("list", database_url=url).stdout
    create_wrongly = (["--tenant", "A b"], ["--scopes", "operator"], ["--name", " "])
    for wrong in (["revoke", "key_0"], *(["create", "--name", "x", *w] for w in create_wrongly)):
        assert command(*wrong, database_url=url).exit_code == 2, wrong
    away = command("list", database_url="postgresql://u:hunter2secret@127.0.0.1:1/x")
    assert away.exit_code == 2
    assert "hunter2secret" not in away.output


def test_the_data_directory_is_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert command("create", "--name", "x", data_dir=folder).exit_code == 0
    assert os.stat(folder).st_mode & 0o077 == 0
    assert "usable" in command("list", data_dir=folder).stdout
