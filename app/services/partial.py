"""Uploads that come in several requests: a row, and a file that grows by what each request brings.

The file's size is the offset: what was written is there, whatever became of the process that wrote
it. Who writes holds a lock on the file, which ends with its process.
"""

import fcntl
import hashlib
import os
from datetime import datetime, timedelta
from pathlib import Path

from app.errors import ServiceError
from app.storage import CHUNK, Storage, room, write_all
from app.tables import PartialRow, now


def path_of(storage: Storage, id_: str) -> Path:
    return storage.partials / id_


def begin(storage: Storage, id_: str) -> None:
    """Make the empty file of a new upload. Raises StorageFull."""
    with room():
        path_of(storage, id_).touch(mode=0o600, exist_ok=False)


def offset_of(storage: Storage, row: PartialRow) -> int:
    """How many bytes are there. ServiceError 410 where the upload cannot go on."""
    if row.sha256 is not None:
        return row.length
    try:
        return path_of(storage, row.id).stat().st_size
    except FileNotFoundError:
        raise gone(row.id) from None


def gone(id_: str) -> ServiceError:
    return ServiceError(
        410,
        "upload_expired",
        f"What came of upload '{id_}' is not there any more.",
        "Begin again with POST /v1/uploads.",
    )


def expiry(days: float) -> datetime:
    """When an upload that brings nothing more from now on is forgotten."""
    return now() + timedelta(days=days)


class Partial:
    """The file of an upload, held for writing. ServiceError 423 where another request holds it,
    410 where it is gone; close it in the end."""

    def __init__(self, storage: Storage, id_: str) -> None:
        self.path = path_of(storage, id_)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            raise gone(id_) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may just have stored it: it is an object then, and not ours.
            same = self.path.stat().st_ino == os.fstat(self._file).st_ino
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            os.close(self._file)
            raise ServiceError(
                423,
                "upload_locked",
                f"Another request brings bytes of upload '{id_}' just now.",
                "Ask for the offset again in a moment.",
                headers={"Retry-After": "1"},
            )

    @property
    def offset(self) -> int:
        return os.fstat(self._file).st_size

    def write(self, chunk: bytes) -> None:
        """Raises StorageFull; what there was room for is there then."""
        write_all(self._file, chunk)

    def cut(self, offset: int) -> None:
        """Forget what came after `offset`."""
        os.ftruncate(self._file, offset)

    def sync(self) -> None:
        """What came survives a loss of power. Raises StorageFull."""
        with room():
            os.fsync(self._file)

    def sha256(self) -> str:
        """The digest of all that is there, in hexadecimal."""
        seen, at = hashlib.sha256(), 0
        while chunk := os.pread(self._file, CHUNK, at):
            seen.update(chunk)
            at += len(chunk)
        return seen.hexdigest()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)
