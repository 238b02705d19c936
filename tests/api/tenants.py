"""The api in this process, over a migrated database, with tenants that each have one of all."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from app.api.resumable import MEDIA_TYPE
from app.config import Settings
from app.db import Database
from app.domain.edgetpu import AnalysisOptions
from app.main import create_app
from app.services import jobs, keys, partial, webhooks
from app.storage import open_storage, store_bytes
from app.tables import (
    AnalysisRow,
    ArtifactRow,
    DatasetRow,
    JobRow,
    KeyRow,
    ModelRow,
    PartialRow,
    VariantRow,
    new_id,
    now,
)

NO_BROKER = "redis+socket:///nonexistent/litesmith.sock"
FACTS = {
    "inputs": [{"name": "x", "shape": [-1, 4], "dtype": "float32"}],
    "outputs": [{"name": "y", "shape": [-1, 3], "dtype": "float32"}],
    "parameters": 15,
}


@dataclass
class Tenant:
    """Keys by scope, and the id of one resource of each kind; `model` is what its routes take."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)


@dataclass
class World:
    settings: Settings
    database: Database
    app: FastAPI
    http: httpx.AsyncClient
    loop: asyncio.Runner
    tenants: dict[str, Tenant]

    def send(self, method: str, path: str, key: str | None, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if path.startswith("/v1/uploads"):
            headers |= {"tus-resumable": "1.0.0", "content-type": MEDIA_TYPE}
            headers |= {"upload-offset": "0"} if method == "PATCH" else {}
        headers |= more.pop("headers", {})
        return self.loop.run(self.http.request(method, path, headers=headers, **more))


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Every method and path that the application answers, whether the schema tells of it or not."""
    found = set()
    for route in iter_route_contexts(app.routes):
        assert route.path is not None
        # A mounted application or a WebSocket has no methods: it would need a guard of its own.
        found |= {(method, route.path) for method in route.methods or {"any"}}
    return found


@contextmanager
def world(database: Database, folder: Path, **settings: Any) -> Iterator[World]:
    """Two tenants of a service that asks for keys, and a client on its machine."""
    known: dict[str, Any] = {
        "auth": "on",
        "broker_url": NO_BROKER,
        "data_dir": folder,
        "webhook_allowed_networks": ["127.0.0.0/8"],
    } | settings
    known["database_url"] = database.engine.url.render_as_string(hide_password=False)
    made = Settings(**known)
    app = create_app(made)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("127.0.0.1", 50_000))
    http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
    with asyncio.Runner() as loop:
        tenants = {name: furnish(made, database, name) for name in ("default", "other")}
        yield World(made, database, app, http, loop, tenants)
        loop.run(http.aclose())
    app.state.parts.database.close()


def furnish(settings: Settings, database: Database, name: str) -> Tenant:
    tenant = Tenant(name)
    storage = open_storage(settings)
    stored = store_bytes(storage, b"    TFL3 of " + name.encode())
    file: dict[str, Any] = {"sha256": stored.sha256, "size_bytes": stored.size_bytes}
    with database.write() as session:
        for scopes in ([], ["read"], ["write"], ["admin"]):
            row, key = keys.create(session, name, f"{scopes} of {name}", scopes)
            tenant.keys[scopes[0] if scopes else "none"] = key
            tenant.ids["keys"] = row.id
        model = ModelRow(
            id=new_id("mdl"), tenant_id=name, name=f"model of {name}", format="tflite",
            status="ready", facts=FACTS, **file,
        )  # fmt: skip
        dataset = DatasetRow(
            id=new_id("dat"), tenant_id=name, name=f"data of {name}", format="npz",
            status="ready", facts={}, **file,
        )  # fmt: skip
        analysis = AnalysisRow(
            id=new_id("ana"), tenant_id=name, key="k", status="analyzing",
            options=AnalysisOptions().model_dump(), **file,
        )  # fmt: skip
        job = JobRow(
            id=new_id("job"), tenant_id=name, status="succeeded", model_id=model.id, event_seq=0,
            spec={"model": model.id, "variants": ["float16"]}, finished_at=now(),
            verdict={"verdict": "pass", "checks": []},
        )  # fmt: skip
        artifact = ArtifactRow(
            id=new_id("art"), tenant_id=name, job_id=job.id, kind="tflite",
            file_name=f"{name}.tflite", gzip_size_bytes=1, **file,
        )  # fmt: skip
        job.variants = [
            VariantRow(
                id=new_id("var"), tenant_id=name, position=position, name=label, recipe=[],
                status="succeeded", progress=1.0, notes=[], training=[], artifacts=artifacts,
            )
            for position, label, artifacts in ((-1, "baseline", []), (0, "float16", [artifact]))
        ]  # fmt: skip
        upload = PartialRow(
            id=new_id("upl"), tenant_id=name, kind="model", name=f"upload of {name}", length=10,
            upload_metadata="", expires_at=now() + timedelta(days=1),
        )  # fmt: skip
        partial.begin(storage, upload.id)
        session.add_all([model, dataset, analysis, job, upload])
        hook = webhooks.create(session, name, "https://127.0.0.1:9/", ["job.finished"], "")
        session.flush()
        delivery = webhooks.send(session, hook, "job.finished", {"id": job.id})
        session.flush()
        jobs.emit(session, job.id, name, "end", {"id": job.id, "status": "succeeded"})
        tenant.ids |= {
            "models": model.id, "datasets": dataset.id, "analyses": analysis.id, "jobs": job.id,
            "artifacts": artifact.id, "webhooks": hook.id, "deliveries": delivery.id,
            "uploads": upload.id,
        }  # fmt: skip
    return tenant


def key_row(database: Database, id_: str) -> KeyRow:
    with database.read() as session:
        return session.get_one(KeyRow, id_)
