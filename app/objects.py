"""What both kinds of storage have in common: what they do, how they fail, how bytes are checked."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from app.domain.problems import NO_ROOM

CHUNK = 4 * 2**20


class StorageFull(Exception):
    """There is no room left for what should be written."""


class StorageAway(Exception):
    """The store does not answer, or refuses the service itself; it may be back in a moment."""


class Damaged(Exception):
    """A stored object does not have the digest under which it was kept."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"the stored object {digest} is damaged")
        self.digest = digest


@dataclass(frozen=True)
class Stored:
    """An object's digest and size in bytes."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Object:
    """What a storage knows of an object without reading it."""

    sha256: str
    size_bytes: int
    written_at: datetime


class Storage(Protocol):
    """What both kinds of storage do. `digest` is the SHA-256 in hexadecimal.

    All raise StorageFull or StorageAway. `spool` holds files while they are received, `partials`
    those of uploads that come in several requests.
    """

    spool: Path
    partials: Path

    def adopt(self, file: Path, digest: str) -> None:
        """Store a complete local file under its digest; the file is gone afterwards. An object that
        is there already is replaced, which repairs a damaged one and makes an old one young."""
        ...

    def fetch(self, digest: str, to: Path) -> None:
        """Make a local copy at `to`. FileNotFoundError where there is none, Damaged where the
        object's bytes do not have its digest."""
        ...

    def read(self, digest: str, start: int, length: int) -> Iterator[bytes]:
        """The object's bytes from `start`, in chunks, unchecked (see `verified`). FileNotFoundError
        where there is none."""
        ...

    def delete(self, digest: str, written_before: datetime | None = None) -> bool:
        """Remove the object, unless it was written later than that; whether it was removed."""
        ...

    def objects(self) -> Iterator[Object]:
        """All objects."""
        ...

    def sweep(self) -> None:
        """Remove abandoned files of the spool and partials."""
        ...

    def check(self) -> None:
        """Raises where the storage cannot be used."""
        ...


@contextmanager
def room() -> Iterator[None]:
    """Tells a full disk as StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFull(str(error)) from error
        raise


def write_all(file: int, chunk: bytes | memoryview) -> None:
    """Write the whole chunk to a file descriptor: a disk that fills up takes a part of it first,
    and tells only the next write. Raises StorageFull."""
    rest = memoryview(chunk)
    with room():
        while rest:
            rest = rest[os.write(file, rest) :]


def verified(chunks: Iterator[bytes], digest: str) -> Iterator[bytes]:
    """The chunks of a whole object; the last one comes only once all of them have the digest.
    Raises Damaged."""
    seen, held = hashlib.sha256(), b""
    for chunk in chunks:
        seen.update(chunk)
        if held:
            yield held
        held = chunk
    if seen.hexdigest() != digest:
        raise Damaged(digest)
    yield held


def is_intact(storage: Storage, stored: Stored) -> bool:
    """Whether the object is there and has its digest; reads all of it."""
    try:
        for _ in verified(storage.read(stored.sha256, 0, stored.size_bytes), stored.sha256):
            pass
    except (Damaged, FileNotFoundError):
        return False
    return True
