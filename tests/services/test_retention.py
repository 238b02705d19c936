"""What is too old is deleted, if the operator wants that; the files follow by reference."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from app.cli import main
from app.config import Settings
from app.db import Database
from app.errors import ServiceError
from app.services import garbage, jobs, retention
from app.storage import Storage, Stored, open_storage, store_bytes
from app.tables import (
    ArtifactRow,
    Base,
    DatasetRow,
    EventRow,
    JobRow,
    ModelRow,
    PartialRow,
    VariantRow,
    new_id,
    now,
)

OLD = now() - timedelta(days=10)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(Settings(data_dir=tmp_path))


def upload(table: type[ModelRow | DatasetRow], stored: Stored, **values: Any) -> Any:
    facts = {"name": "n", "format": "tflite", "status": "ready", "created_at": OLD} | values
    sizes = {"sha256": stored.sha256, "size_bytes": stored.size_bytes}
    return table(id=new_id("mdl" if table is ModelRow else "dat"), **sizes, **facts)


def job(stored: Stored, *, status: str = "succeeded", **values: Any) -> JobRow:
    """A job with one variant that has one artifact, and an event."""
    ended = {"finished_at": OLD, "created_at": OLD} if status == "succeeded" else {}
    facts = {"model_id": "mdl_0", "spec": {}} | ended | values
    row = JobRow(id=new_id("job"), status=status, event_seq=1, **facts)
    artifact = ArtifactRow(
        id=new_id("art"), job_id=row.id, kind="tflite", file_name="f", sha256=stored.sha256,
        size_bytes=stored.size_bytes, gzip_size_bytes=1,
    )  # fmt: skip
    variant = VariantRow(
        id=new_id("var"), position=0, name="int8", recipe=[], status=status, progress=1.0,
        notes=[], training=[], cached=False, artifacts=[artifact],
    )  # fmt: skip
    row.variants = [variant]
    return row


def add(database: Database, *rows: Base) -> list[str]:
    with database.write() as session:
        session.add_all(rows)
        session.flush()
        return [row.id for row in rows]  # type: ignore[attr-defined]


def ids(database: Database, table: Any) -> list[str]:
    with database.read() as session:
        return sorted(session.scalars(select(table.id)))


def test_nothing_is_too_old_by_default(database: Database, storage: Storage) -> None:
    stored = store_bytes(storage, b"a")
    add(database, upload(ModelRow, stored), job(stored))
    assert retention.expire(database, Settings()) == {}


def test_old_jobs_go_with_all_that_they_made(database: Database, storage: Storage) -> None:
    gone, shared, recent = (store_bytes(storage, text) for text in (b"a", b"b", b"c"))
    rows = [
        job(gone),
        job(shared),
        job(shared, finished_at=now()),
        job(recent, status="running", created_at=OLD),
    ]
    kept = sorted(add(database, *rows)[2:])
    with database.write() as session:
        session.add(EventRow(job_id=rows[0].id, seq=1, name="end", data={}))
    assert retention.expire(database, Settings(job_retention_days=7)) == {"jobs": 2}
    assert ids(database, JobRow) == kept
    assert len(ids(database, VariantRow)) == len(ids(database, ArtifactRow)) == 2
    with database.read() as session:
        assert session.scalars(select(EventRow)).all() == []
    # By reference: what another job has as well stays.
    removed = garbage.collect(database, storage, grace=timedelta(seconds=-1))
    assert [found.sha256 for found in removed] == [gone.sha256]


def test_old_artifacts_go_and_the_figures_stay(database: Database, storage: Storage) -> None:
    stored = store_bytes(storage, b"a")
    add(database, job(stored), job(stored, finished_at=now()))
    assert retention.expire(database, Settings(artifact_retention_days=7)) == {"artifacts": 1}
    assert len(ids(database, JobRow)) == len(ids(database, VariantRow)) == 2


def test_old_uploads_go_but_not_those_in_use(database: Database, storage: Storage) -> None:
    files = [store_bytes(storage, bytes([number])) for number in range(6)]
    unused, used, young, asked = (upload(ModelRow, file) for file in files[:4])
    young.created_at = now()
    data, data_used = (upload(DatasetRow, file) for file in files[4:])
    add(database, unused, used, young, asked, data, data_used)
    source = {"dataset": {"id": data_used.id, "sha256": "", "format": ""}}
    add(
        database,
        job(files[0], model_id=used.id, sources=source, status="running", created_at=OLD),
        job(files[0], model_id=asked.id, created_at=now()),
        job(files[0], model_id=unused.id),
    )
    assert retention.expire(database, Settings(upload_retention_days=7)) == {"uploads": 2}
    assert ids(database, ModelRow) == sorted([used.id, young.id, asked.id])
    assert ids(database, DatasetRow) == [data_used.id]


def test_partial_uploads_expire(database: Database, storage: Storage) -> None:
    stored = store_bytes(storage, b"a")
    values = {"kind": "model", "length": 1, "upload_metadata": ""}
    later = now() + timedelta(days=1)
    _, kept = add(
        database,
        PartialRow(id=new_id("upl"), expires_at=OLD, **values),
        PartialRow(id=new_id("upl"), expires_at=later, sha256=stored.sha256, **values),
    )
    assert retention.expire(database, Settings()) == {"partial uploads": 1}
    assert ids(database, PartialRow) == [kept]
    # Stored, and about to become a model.
    assert garbage.collect(database, storage, grace=timedelta(seconds=-1)) == []


def test_a_job_is_deleted_when_it_has_ended(database: Database, storage: Storage) -> None:
    stored = store_bytes(storage, b"a")
    ended, running = add(database, job(stored), job(stored, status="running"))
    with database.write() as session:
        jobs.delete(session, session.get_one(JobRow, ended))
        with pytest.raises(ServiceError, match="is running") as error:
            jobs.delete(session, session.get_one(JobRow, running))
    assert (error.value.status, error.value.code) == (409, "not_finished")
    assert ids(database, JobRow) == [running]
    assert len(ids(database, ArtifactRow)) == 1


def test_the_command_tells_before_it_removes(migrated_file: Path, tmp_path: Path) -> None:
    (tmp_path / "litesmith.db").write_bytes(migrated_file.read_bytes())
    settings = Settings(data_dir=tmp_path)
    storage, database = open_storage(settings), Database(settings.database)
    orphan, used = store_bytes(storage, b"orphan"), store_bytes(storage, b"used")
    hurt = store_bytes(storage, b"hurt")
    add(
        database,
        upload(ModelRow, used),
        upload(ModelRow, hurt),
        upload(DatasetRow, Stored("ab" * 32, 7)),
    )
    database.close()
    path = tmp_path / "objects" / hurt.sha256[:2] / hurt.sha256
    path.chmod(0o644)
    path.write_bytes(b"HURT")

    def gc(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["gc", "--data-dir", str(tmp_path), *options])
        return result.exit_code, result.output

    # Young: perhaps an upload whose row is not there yet.
    assert gc("--dry-run")[1].startswith("unreferenced: 0 files, 0 B, would be removed")
    status, told = gc("--dry-run", "--verify", "--grace-hours", "0")
    assert status == 1
    assert told.splitlines() == [
        "unreferenced: 1 files, 6 B, would be removed",
        f"  {orphan.sha256} 6 B",
        "missing: 1 files",
        f"  {'ab' * 32} 7 B",
        "damaged: 1 files",
        f"  {hurt.sha256} 4 B",
    ]
    assert gc("--grace-hours", "0")[1].startswith("unreferenced: 1 files, 6 B, removed")
    assert {found.sha256 for found in storage.objects()} == {used.sha256, hurt.sha256}
