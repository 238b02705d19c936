"""Fills a database with ended jobs, as years of use would leave them."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, text

from app.db import Database
from app.tables import ArtifactRow, DatasetRow, EventRow, JobRow, ModelRow, VariantRow, new_id, now

BATCH = 2000
MODELS = 200
TENANTS = ("default", "another")
STATUSES = ("succeeded",) * 8 + ("failed", "cancelled")
EVENTS = 3
METRICS = {
    "size_bytes": 127_936, "gzip_size_bytes": 120_541, "size_ratio": 0.27,
    "gzip_size_ratio": 0.28, "metric": "accuracy", "accuracy": 0.97, "accuracy_drop": 0.001,
    "accuracy_drop_ci95": [-0.002, 0.004], "agreement": 0.99, "samples_evaluated": 540,
    "latency_ms": {"p50": 0.01, "p90": 0.02, "p99": 0.03, "mean": 0.01, "runs": 50, "threads": 1},
    "latency_ratio": 0.3, "peak_memory_bytes": 24_832, "macs": 1_297_344, "parameters": 118_186,
}  # fmt: skip


def fill(database: Database, jobs: int) -> None:
    """Add `jobs` jobs of two tenants, one in ten of the second, and the models they name."""
    models = [_upload(number, "mdl") for number in range(MODELS)]
    datasets = [_upload(number, "dat") for number in range(MODELS)]
    with database.write() as session:
        session.execute(insert(ModelRow), models)
        session.execute(insert(DatasetRow), datasets)
    for first in range(0, jobs, BATCH):
        rows: dict[Any, list[dict[str, Any]]] = {
            JobRow: [], VariantRow: [], ArtifactRow: [], EventRow: [],
        }  # fmt: skip
        for number in range(first, min(first + BATCH, jobs)):
            model = models[number % MODELS]
            for table, row in _job(number, str(model["id"]), jobs):
                rows[table].append(row)
        with database.write() as session:
            for table, made in rows.items():
                session.execute(insert(table), made)
    if database.engine.dialect.name == "postgresql":
        with database.write() as session:
            # What autovacuum does within a minute: until then, plans are those of empty tables.
            session.execute(text("ANALYZE"))


def _upload(number: int, prefix: str) -> dict[str, Any]:
    return {
        "id": new_id(prefix), "tenant_id": TENANTS[0], "created_at": now(), "name": f"it-{number}",
        "format": "tflite", "sha256": f"{prefix}{number:061d}", "size_bytes": 1000,
        "status": "ready", "facts": {},
    }  # fmt: skip


def _job(number: int, model: str, jobs: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    tenant = TENANTS[number % 10 == 0]
    made = now() - timedelta(minutes=jobs - number)
    status = STATUSES[number % 97 % len(STATUSES)]
    owned = {"tenant_id": tenant, "created_at": made}
    id_ = new_id("job")
    yield JobRow, owned | {
        "id": id_, "status": status, "model_id": model, "priority": 0, "event_seq": EVENTS,
        "spec": {"model": model, "variants": ["int8"], "seed": number}, "sources": {},
        "plan": {"model_name": "it"}, "started_at": made, "finished_at": made,
    }  # fmt: skip
    for position, name in ((-1, "baseline"), (0, "int8")):
        variant = new_id("var")
        recipe = [{"technique": "int8"}] if position == 0 else []
        yield VariantRow, owned | {
            "id": variant, "job_id": id_, "position": position, "name": name, "recipe": recipe,
            "status": status, "progress": 1.0, "metrics": METRICS, "notes": [], "training": [],
            "cached": False, "seconds": 1.0,
        }  # fmt: skip
        yield ArtifactRow, owned | {
            "id": new_id("art"), "job_id": id_, "variant_id": variant, "kind": "tflite",
            "file_name": "it.tflite", "sha256": f"{number:064d}", "size_bytes": 1000,
            "gzip_size_bytes": 900,
        }  # fmt: skip
    for seq in range(1, EVENTS + 1):
        name = "end" if seq == EVENTS else "variant"
        yield EventRow, {
            "job_id": id_, "seq": seq, "tenant_id": tenant, "name": name,
            "data": {"id": id_, "status": status}, "created_at": made,
        }  # fmt: skip
