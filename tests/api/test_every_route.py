"""Every route of the application: who may call it, and whose rows it shows.

A new route fails here until it stands in ROUTES, and one that changes something until `changes`
calls it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import problem, unique
from sqlalchemy import update
from tenants import World, routes, world

from app.db import Database
from app.services import partial
from app.tables import JobRow, PartialRow

TFLITE = b"    TFL3 new"
OPEN = {
    ("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/readyz"), ("HEAD", "/readyz"),
    ("GET", "/openapi.json"), ("HEAD", "/openapi.json"), ("GET", "/docs"), ("HEAD", "/docs"),
    ("GET", "/docs/oauth2-redirect"), ("HEAD", "/docs/oauth2-redirect"),
    ("GET", "/redoc"), ("HEAD", "/redoc"), ("OPTIONS", "/v1/uploads"),
}  # fmt: skip
# The scope that each needs, told here again: one side alone cannot be changed by mistake.
ROUTES = {
    ("GET", "/metrics"): "operator",
    ("GET", "/v1/models"): "read", ("POST", "/v1/models"): "write",
    ("PUT", "/v1/models"): "write", ("GET", "/v1/models/{id}"): "read",
    ("DELETE", "/v1/models/{id}"): "write", ("GET", "/v1/models/{id}/content"): "read",
    ("HEAD", "/v1/models/{id}/content"): "read",
    ("GET", "/v1/datasets"): "read", ("POST", "/v1/datasets"): "write",
    ("PUT", "/v1/datasets"): "write", ("GET", "/v1/datasets/{id}"): "read",
    ("DELETE", "/v1/datasets/{id}"): "write", ("GET", "/v1/datasets/{id}/content"): "read",
    ("HEAD", "/v1/datasets/{id}/content"): "read",
    ("GET", "/v1/uploads"): "read", ("POST", "/v1/uploads"): "write",
    ("GET", "/v1/uploads/{id}"): "read", ("HEAD", "/v1/uploads/{id}"): "read",
    ("PATCH", "/v1/uploads/{id}"): "write", ("DELETE", "/v1/uploads/{id}"): "write",
    ("GET", "/v1/jobs"): "read", ("POST", "/v1/jobs"): "write", ("GET", "/v1/jobs/{id}"): "read",
    ("DELETE", "/v1/jobs/{id}"): "write",
    ("POST", "/v1/jobs/{id}/cancel"): "write", ("POST", "/v1/jobs/{id}/retry"): "write",
    ("GET", "/v1/jobs/{id}/events"): "read", ("GET", "/v1/jobs/{id}/report"): "read",
    ("GET", "/v1/jobs/{id}/verdict"): "read", ("GET", "/v1/jobs/{id}/artifacts.zip"): "read",
    ("GET", "/v1/artifacts/{id}"): "read", ("GET", "/v1/artifacts/{id}/content"): "read",
    ("HEAD", "/v1/artifacts/{id}/content"): "read",
    ("POST", "/v1/analyze"): "write", ("PUT", "/v1/analyze"): "write",
    ("GET", "/v1/analyses/{id}"): "read",
    ("GET", "/v1/techniques"): "read", ("GET", "/v1/targets"): "read",
    ("GET", "/v1/catalog"): "read", ("POST", "/v1/advise"): "read",
    ("GET", "/v1/keys"): "admin", ("POST", "/v1/keys"): "admin", ("GET", "/v1/keys/{id}"): "admin",
    ("DELETE", "/v1/keys/{id}"): "admin", ("GET", "/v1/audit"): "admin",
    ("GET", "/v1/usage"): "read",
    ("GET", "/v1/webhooks"): "admin", ("POST", "/v1/webhooks"): "admin",
    ("GET", "/v1/webhooks/{id}"): "admin", ("PATCH", "/v1/webhooks/{id}"): "admin",
    ("DELETE", "/v1/webhooks/{id}"): "admin", ("POST", "/v1/webhooks/{id}/test"): "admin",
    ("POST", "/v1/webhooks/{id}/rotate-secret"): "admin",
    ("GET", "/v1/webhooks/{id}/deliveries"): "admin",
    ("GET", "/v1/webhooks/{id}/deliveries/{delivery}"): "admin",
    ("POST", "/v1/webhooks/{id}/deliveries/{delivery}/replay"): "admin",
}  # fmt: skip
LISTS = [
    "/v1/models", "/v1/datasets", "/v1/uploads", "/v1/jobs", "/v1/keys", "/v1/audit",
    "/v1/webhooks",
]  # fmt: skip
# The strongest key that may not.
TOO_WEAK = {"read": "none", "write": "read", "admin": "write", "operator": "write"}


@pytest.fixture
def w(database: Database, tmp_path: Path) -> Iterator[World]:
    with world(database, tmp_path) as made:
        yield made


def path_of(path: str, ids: dict[str, str]) -> str:
    """The path with the id of the resource that it is about."""
    path = path.replace("{delivery}", ids["deliveries"])
    return path.replace("{id}", ids[path.split("/")[2]]) if "{id}" in path else path


def test_no_route_is_left_out(w: World) -> None:
    assert routes(w.app) == OPEN | ROUTES.keys()


def test_without_a_key_nothing_is_told(w: World) -> None:
    for method, path in sorted(ROUTES):
        answer = w.send(method, path_of(path, w.tenants["default"].ids), None, content=b"x" * 100)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"].startswith("Bearer ")
        if method != "HEAD":
            body = problem(answer, 401, "unauthenticated")
            assert "litesmith keys create" in body["hint"]
    for method, path in sorted(OPEN):
        if path != "/readyz":
            assert w.send(method, path, None).is_success, (method, path)
    # No broker and no worker here: a stranger learns no more than that.
    checks = w.send("GET", "/readyz", None).json()["checks"]
    assert checks["broker"] == checks["worker"] == "failed: see the log"


def test_a_key_without_the_scope_is_told_which_it_lacks(w: World) -> None:
    tenant = w.tenants["default"]
    for (method, path), scope in sorted(ROUTES.items()):
        answer = w.send(method, path_of(path, tenant.ids), tenant.keys[TOO_WEAK[scope]])
        assert answer.status_code == 403, (method, path)
        if method != "HEAD":
            assert f"'{scope}'" in problem(answer, 403, "missing_scope")["detail"]
    foreign_admin = w.tenants["other"].keys["admin"]
    problem(w.send("GET", "/metrics", foreign_admin), 403, "missing_scope")
    assert w.send("GET", "/metrics", tenant.keys["admin"]).status_code == 200


def test_what_another_tenant_has_is_404_as_what_nobody_has(w: World) -> None:
    own, other = w.tenants["default"], w.tenants["other"]
    for (method, path), scope in sorted(ROUTES.items()):
        if "{id}" not in path:
            continue
        foreign = w.send(method, path_of(path, other.ids), own.keys["admin"])
        assert foreign.status_code == 404, (method, path)
        nothing = {kind: f"{id_[:4]}0000" for kind, id_ in other.ids.items()}
        unknown = w.send(method, path_of(path, nothing), own.keys["admin"])
        assert unknown.status_code == 404, (method, path)
        if method == "HEAD":
            continue
        seen, expected = problem(foreign, 404, "not_found"), problem(unknown, 404, "not_found")
        assert seen.keys() == expected.keys()
        # With the id and the key of its own, it is found: what is told above is not by accident.
        if method == "GET":
            mine = w.send(method, path_of(path, own.ids), own.keys[scope])
            assert mine.status_code == 200, (method, path, mine.text)
    for tenant in (own, other):
        found = w.send("GET", f"/v1/jobs/{tenant.ids['jobs']}", tenant.keys["read"]).json()
        assert found["id"] == tenant.ids["jobs"]


def test_lists_hold_rows_of_the_tenant_alone(w: World) -> None:
    assert {path for method, path in ROUTES if method == "GET" and path in LISTS} == set(LISTS)
    own, other = w.tenants["default"], w.tenants["other"]
    for path in LISTS:
        items = w.send("GET", path, own.keys["admin"]).json()["items"]
        shown = {item["id"] for item in items}
        assert not shown & set(other.ids.values()), path
        if path != "/v1/audit":
            assert own.ids[path.split("/")[2]] in shown
    by_model = w.send("GET", f"/v1/jobs?model={other.ids['models']}", own.keys["read"])
    assert by_model.json()["items"] == []


def test_who_asks_is_told_before_what_an_upload_lacks(w: World) -> None:
    tenant = w.tenants["default"]
    old = {"headers": {"tus-resumable": "0.1"}, "content": b"x"}
    path = f"/v1/uploads/{tenant.ids['uploads']}"
    problem(w.send("PATCH", path, None, **old), 401, "unauthenticated")
    problem(w.send("PATCH", path, tenant.keys["read"], **old), 403, "missing_scope")
    problem(w.send("PATCH", path, tenant.keys["write"], **old), 412, "unsupported_version")


def test_a_key_that_may_only_read_finishes_no_upload(w: World) -> None:
    tenant = w.tenants["default"]
    content = TFLITE + b"whole"
    path = f"/v1/uploads/{tenant.ids['uploads']}"
    with w.database.write() as session:
        session.get_one(PartialRow, tenant.ids["uploads"]).length = len(content)
    storage = w.app.state.parts.storage
    partial.path_of(storage, tenant.ids["uploads"]).write_bytes(content)
    assert w.send("GET", path, tenant.keys["read"]).json()["model"] is None
    assert w.send("GET", path, tenant.keys["write"]).json()["model"] is not None


def test_a_foreign_id_in_a_body_is_unknown(w: World) -> None:
    own, other = w.tenants["default"], w.tenants["other"]
    key, foreign = own.keys["write"], other.ids
    spec = {"model": foreign["models"], "variants": ["float16"]}
    problem(w.send("POST", "/v1/jobs", key, json=spec), 422, "unknown_model")
    spec = {"model": own.ids["models"], "dataset": foreign["datasets"], "variants": ["int8"]}
    problem(w.send("POST", "/v1/jobs", key, json=spec), 422, "unknown_dataset")
    asked = {"artifact": foreign["artifacts"]}
    problem(w.send("POST", "/v1/analyze", key, json=asked), 422, "unknown_artifact")
    advice = {"model": foreign["models"], "target": "cpu"}
    problem(w.send("POST", "/v1/advise", key, json=advice), 422, "unknown_model")


def changes(w: World) -> list[tuple[str, str, str]]:
    """Call everything that changes something: method, route, and the subject's id."""
    tenant, made = w.tenants["default"], []

    def call(method: str, path: str, id_: str = "", **more: Any) -> str:
        answer = w.send(
            method,
            path.replace("{id}", id_).replace("{delivery}", tenant.ids["deliveries"]),
            tenant.keys["admin"],
            **more,
        )
        assert answer.is_success, (method, path, answer.text)
        subject: str = id_ or answer.json()["id"]
        made.append((method, path, subject))
        return subject

    call("PUT", "/v1/models", content=TFLITE)
    model = call("POST", "/v1/models", content=TFLITE + b"!")
    call("PUT", "/v1/datasets", content=unique("put"))
    dataset = call("POST", "/v1/datasets", content=unique("post"))
    upload = call("POST", "/v1/uploads", headers={"upload-length": "20"})
    call("PATCH", "/v1/uploads/{id}", upload, content=b"half")
    call("DELETE", "/v1/uploads/{id}", upload)
    spec = {"model": tenant.ids["models"], "variants": ["float16"]}
    job = call("POST", "/v1/jobs", json=spec)
    call("POST", "/v1/jobs/{id}/cancel", job)
    call("POST", "/v1/jobs/{id}/retry", job)
    call("DELETE", "/v1/jobs/{id}", tenant.ids["jobs"])
    call("PUT", "/v1/analyze", content=TFLITE, params={"wait": 0})
    call("POST", "/v1/analyze", content=TFLITE + b"?", params={"wait": 0})
    call("DELETE", "/v1/models/{id}", model)
    call("DELETE", "/v1/datasets/{id}", dataset)
    key = call("POST", "/v1/keys", json={"name": "CI"})
    call("DELETE", "/v1/keys/{id}", key)
    hook = call("POST", "/v1/webhooks", json={"url": "https://127.0.0.1:9/"})
    call("PATCH", "/v1/webhooks/{id}", hook, json={"description": "CI"})
    call("POST", "/v1/webhooks/{id}/rotate-secret", hook)
    call("POST", "/v1/webhooks/{id}/test", hook)
    own = tenant.ids["webhooks"]
    call("POST", "/v1/webhooks/{id}/deliveries/{delivery}/replay", own)
    call("DELETE", "/v1/webhooks/{id}", hook)
    return made


def test_every_change_stands_in_the_audit_log(w: World) -> None:
    tenant, other = w.tenants["default"], w.tenants["other"]
    made = changes(w)
    changing = {
        (method, path)
        for (method, path) in ROUTES
        if method not in ("GET", "HEAD") and path != "/v1/advise"
    }
    assert {(method, path) for method, path, _ in made} == changing
    operations = {
        (method.upper(), path): operation["operationId"]
        for path, methods in w.app.openapi()["paths"].items()
        for method, operation in methods.items()
    }
    entries = w.send("GET", "/v1/audit?limit=200", tenant.keys["admin"]).json()["items"]
    told = [(entry["action"], entry["subject"]) for entry in reversed(entries)]
    assert told == [(operations[method, path], subject) for method, path, subject in made]
    admin = {item["name"]: item["id"] for item in keys_of(w)}["['admin'] of default"]
    assert {entry["key"] for entry in entries} == {admin}
    assert all(entry["request_id"] and entry["created_at"] for entry in entries)
    about = w.send("GET", f"/v1/audit?subject={made[0][2]}", tenant.keys["admin"]).json()["items"]
    assert [entry["action"] for entry in about] == ["put_model"]
    assert w.send("GET", "/v1/audit", other.keys["admin"]).json()["items"] == []


def keys_of(w: World) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = w.send(
        "GET", "/v1/keys", w.tenants["default"].keys["admin"]
    ).json()["items"]
    return items


def test_what_was_refused_or_changed_nothing_is_not_in_the_audit_log(w: World) -> None:
    tenant = w.tenants["default"]
    key = tenant.keys["admin"]
    job = tenant.ids["jobs"]
    problem(w.send("POST", f"/v1/jobs/{job}/cancel", key), 409, "already_finished")
    problem(w.send("POST", f"/v1/jobs/{job}/retry", key), 409, "nothing_to_retry")
    with w.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job).values(status="running"))
    problem(w.send("DELETE", f"/v1/models/{tenant.ids['models']}", key), 409, "in_use")
    problem(w.send("POST", "/v1/models", key, content=b"none"), 415, "unsupported_format")
    same = b"    TFL3 of default"
    assert w.send("POST", "/v1/models", key, content=same).status_code == 200
    assert w.send("GET", "/v1/audit", key).json()["items"] == []
