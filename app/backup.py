"""Backup and restore of the embedded default: a SQLite database, and files on a local disk.

A backup is laid out as a data directory is: `litesmith.db` and `objects`. It may be taken while the
service runs; taken again into the same directory, only what is new is copied.
"""

import fcntl
import os
import sqlite3
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, make_url

from app.config import Settings
from app.db import Database, migrate
from app.services import garbage
from app.storage import Damaged, LocalStorage, Stored, open_storage
from app.tables import PartialRow


class NotPossible(Exception):
    """The text says why, and what to do instead."""


@dataclass(frozen=True)
class Copied:
    """`files` of `size_bytes` are at the target, `new` of them copied just now; `lost`: files that
    rows refer to, and that are damaged or gone at the source."""

    files: int
    new: int
    size_bytes: int
    lost: list[Stored]


def backup(settings: Settings, to: Path) -> Copied:
    """Copy database and files to `to`. Raises NotPossible, StorageFull."""
    source, storage = _embedded(settings)
    if not source.is_file():
        raise NotPossible(f"There is no database {source}. Name the service's --data-dir.")
    to.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Nothing that the snapshot refers to is removed before it is copied.
    with storage.lock(fcntl.LOCK_SH):
        return _copy(source, storage, to / "litesmith.db", _objects(to, settings))


def restore(settings: Settings, source: Path) -> Copied:
    """Make a backup the data of a service that has none yet. Raises NotPossible, StorageFull."""
    target, storage = _embedded(settings)
    if target.exists():
        raise NotPossible(f"There is a database {target} already. Name another --data-dir.")
    if not (source / "litesmith.db").is_file():
        raise NotPossible(f"{source} is no backup: it has no litesmith.db.")
    target.parent.mkdir(parents=True, exist_ok=True)
    copied = _copy(source / "litesmith.db", _objects(source, settings), target, storage)
    migrate(settings)
    database = Database(settings.database)
    with database.write() as session:
        # Their parts are in no backup.
        session.execute(delete(PartialRow).where(PartialRow.subject_id.is_(None)))
    database.close()
    return copied


def _embedded(settings: Settings) -> tuple[Path, LocalStorage]:
    url, storage = make_url(settings.database), None
    if url.get_backend_name() == "sqlite" and url.database:
        storage = open_storage(settings)
    if not isinstance(storage, LocalStorage):
        raise NotPossible(
            "This is for SQLite and local files. With PostgreSQL or S3 use their own tools, the"
            " database first: docs/operations.md, Backup."
        )
    return Path(url.database or ""), storage


def _objects(directory: Path, settings: Settings) -> LocalStorage:
    return LocalStorage(directory / "objects", timedelta(days=settings.partial_retention_days))


def _copy(source: Path, storage: LocalStorage, target: Path, to: LocalStorage) -> Copied:
    """The database appears at the target last: with it, all is there."""
    snapshot = target.with_name(f".{target.name}.{os.getpid()}.partial")
    snapshot.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(source)
        # One consistent state, whoever writes meanwhile.
        connection.execute("VACUUM INTO ?", (str(snapshot),))
        connection.close()
        database = Database(f"sqlite:///{snapshot}")
        with database.read() as session:
            wanted = garbage.referred(session)
        database.close()
        there = {found.sha256: found.size_bytes for found in to.objects()}
        missing = [Stored(*item) for item in wanted.items() if there.get(item[0]) != item[1]]
        lost = [stored for stored in missing if not _copied(stored, storage, to)]
        descriptor = os.open(snapshot, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(snapshot, target)
    finally:
        snapshot.unlink(missing_ok=True)
    for digest in there.keys() - wanted.keys():
        to.delete(digest)
    count = len(wanted) - len(lost)
    size = sum(wanted.values()) - sum(stored.size_bytes for stored in lost)
    return Copied(count, len(missing) - len(lost), size, lost)


def _copied(stored: Stored, storage: LocalStorage, to: LocalStorage) -> bool:
    passing = to.spool / f"{stored.sha256}.{os.getpid()}"
    try:
        storage.fetch(stored.sha256, passing)
    except (Damaged, FileNotFoundError):
        return False
    to.adopt(passing, stored.sha256)
    return True
