"""Stored objects: kept while a row refers to them, and while they are young."""

from datetime import timedelta
from pathlib import Path

import pytest

from app.config import Settings
from app.db import Database
from app.services import garbage, uploads
from app.storage import Storage, Stored, open_storage, store_bytes
from workers import steps

TENANT = "default"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(Settings(data_dir=tmp_path))


def exists(storage: Storage, stored: Stored) -> bool:
    return stored.sha256 in [found.sha256 for found in storage.objects()]


def test_only_what_nobody_refers_to_is_removed(database: Database, storage: Storage) -> None:
    uploaded, made, orphan = (store_bytes(storage, text) for text in (b"a", b"b", b"c"))
    with database.write() as session:
        uploads.create(
            session, "model", tenant_id=TENANT, name="m", format_="tflite", stored=uploaded,
            request_id=None,
        )  # fmt: skip
        steps.complete(session, TENANT, "key", "convert", {"float_model": made}, {})
    assert garbage.collect(database, storage) == []
    (removed,) = garbage.collect(database, storage, grace=timedelta(seconds=-1))
    assert (removed.sha256, removed.size_bytes) == (orphan.sha256, 1)
    assert [exists(storage, stored) for stored in (uploaded, made, orphan)] == [True, True, False]


def test_what_a_killed_process_left_in_the_spool_goes_with_the_next_start(tmp_path: Path) -> None:
    import os

    spool = tmp_path / "objects" / "spool"
    spool.mkdir(parents=True)
    (spool / "old").touch()
    os.utime(spool / "old", (0, 0))
    (spool / "new").touch()
    open_storage(Settings(data_dir=tmp_path)).sweep()
    assert [path.name for path in spool.iterdir()] == ["new"]


def test_what_is_in_use_is_no_leftover() -> None:
    with pytest.raises(ValueError, match="cache_retention_days"):
        Settings(cache_retention_days=0.5)


def test_storages_are_told_by_their_url(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LITESMITH_STORAGE_URL"):
        open_storage(Settings(data_dir=tmp_path, storage_url="ftp://host/x"))
