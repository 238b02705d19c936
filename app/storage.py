"""Files by their SHA-256: on a local disk, or in an S3-compatible bucket.

An object is written once, whole, and never changed; what `put` has returned for can be read.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

import obstore
from obstore.store import S3Store

from app.config import Settings
from app.masking import mask

CHUNK = 4 * 2**20
# A spool file not written to for so long belongs to nobody.
ABANDONED_S = 86_400


@dataclass(frozen=True)
class Stored:
    """An object's digest and size in bytes."""

    sha256: str
    size_bytes: int


class Storage(Protocol):
    """What both kinds of storage do. `digest` is the SHA-256 in hexadecimal."""

    spool: Path

    def adopt(self, file: Path, digest: str) -> None:
        """Store a complete local file under its digest; the file is gone afterwards."""
        ...

    def fetch(self, digest: str, to: Path) -> None:
        """Make the object a local file at `to`. FileNotFoundError where there is none."""
        ...

    def read(self, digest: str, start: int, length: int) -> Iterator[bytes]:
        """The object's bytes from `start`, in chunks. FileNotFoundError where there is none."""
        ...

    def delete(self, digest: str) -> None: ...

    def older_than(self, age: timedelta, now: datetime) -> Iterator[str]:
        """Digests of the objects last written before `now - age`."""
        ...

    def check(self) -> None:
        """Raises where the storage cannot be used."""
        ...


def _key(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _spool(directory: Path) -> Path:
    """The directory, without what a process that was killed left there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    limit = time.time() - ABANDONED_S
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < limit:
                path.unlink()
    return directory


class LocalStorage:
    """Objects as files below one directory; the spool lies beside them, on the same disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = _spool(root / "spool")

    def _path(self, digest: str) -> Path:
        return self.root / _key(digest)

    def adopt(self, file: Path, digest: str) -> None:
        target = self._path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        file.chmod(0o444)
        os.replace(file, target)

    def fetch(self, digest: str, to: Path) -> None:
        source = self._path(digest)
        try:
            os.link(source, to)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, to)

    def read(self, digest: str, start: int, length: int) -> Iterator[bytes]:
        with self._path(digest).open("rb") as file:
            file.seek(start)
            while length > 0 and (chunk := file.read(min(CHUNK, length))):
                length -= len(chunk)
                yield chunk

    def delete(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def older_than(self, age: timedelta, now: datetime) -> Iterator[str]:
        limit = (now - age).timestamp()
        for path in self.root.glob("??/*"):
            if path.stat().st_mtime < limit:
                yield path.name

    def check(self) -> None:
        with tempfile.TemporaryFile(dir=self.spool):
            pass


class S3Storage:
    """Objects in a bucket; uploads are spooled to the local temporary directory first, since the
    key is the digest of what is being received."""

    def __init__(self, settings: Settings, bucket: str, prefix: str) -> None:
        self.spool = _spool(Path(tempfile.gettempdir()) / f"litesmith-spool-{os.getuid()}")
        config: dict[str, str] = {"region": settings.s3_region}
        if settings.s3_endpoint:
            config["endpoint"] = settings.s3_endpoint
        if settings.s3_access_key_id:
            config["access_key_id"] = settings.s3_access_key_id
        if settings.s3_secret_access_key:
            config["secret_access_key"] = settings.s3_secret_access_key
        plain = (settings.s3_endpoint or "").startswith("http://")
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            config=config,  # type: ignore[arg-type, unused-ignore]
            client_options={"allow_http": plain},
        )

    def adopt(self, file: Path, digest: str) -> None:
        obstore.put(self._store, _key(digest), file)
        file.unlink()

    def fetch(self, digest: str, to: Path) -> None:
        partial = to.with_name(to.name + ".partial")
        with partial.open("wb") as file:
            for chunk in obstore.get(self._store, _key(digest)).stream(min_chunk_size=CHUNK):
                file.write(chunk)
        os.replace(partial, to)

    def read(self, digest: str, start: int, length: int) -> Iterator[bytes]:
        while length > 0:
            size = min(CHUNK, length)
            chunk = bytes(obstore.get_range(self._store, _key(digest), start=start, length=size))
            start, length = start + len(chunk), length - len(chunk)
            yield chunk

    def delete(self, digest: str) -> None:
        obstore.delete(self._store, _key(digest))

    def older_than(self, age: timedelta, now: datetime) -> Iterator[str]:
        for page in obstore.list(self._store):
            for item in page:
                if item["last_modified"] < now - age:
                    yield item["path"].rsplit("/", 1)[-1]

    def check(self) -> None:
        next(iter(obstore.list(self._store, chunk_size=1)), None)


def open_storage(settings: Settings) -> Storage:
    """The storage that LITESMITH_STORAGE_URL names. ValueError for another scheme."""
    url = urlparse(settings.storage)
    if url.scheme == "file":
        return LocalStorage(Path(url.path))
    if url.scheme == "s3":
        return S3Storage(settings, url.netloc, url.path.strip("/"))
    raise ValueError(
        f"LITESMITH_STORAGE_URL is '{mask(settings.storage)}'; it must be file:///path or s3://bucket"
    )


class Spool:
    """A file being received: hashed while it is written, gone unless it was kept.

    Use as a context manager; `limit` is the most bytes it takes.
    """

    def __init__(self, storage: Storage, limit: int | None = None) -> None:
        self._storage = storage
        self._limit = limit
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        descriptor, name = tempfile.mkstemp(dir=storage.spool)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self.path = Path(name)

    def write(self, chunk: bytes) -> None:
        """Raises OverflowError past the limit."""
        self.size_bytes += len(chunk)
        if self._limit is not None and self.size_bytes > self._limit:
            raise OverflowError
        self._hash.update(chunk)
        self._file.write(chunk)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def keep(self) -> Stored:
        self._file.close()
        self._storage.adopt(self.path, self.sha256)
        return Stored(self.sha256, self.size_bytes)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def store_file(storage: Storage, file: Path) -> Stored:
    """Copy a local file into the storage."""
    with Spool(storage) as spool, file.open("rb") as source:
        while chunk := source.read(CHUNK):
            spool.write(chunk)
        return spool.keep()


def store_bytes(storage: Storage, content: bytes) -> Stored:
    with Spool(storage) as spool:
        spool.write(content)
        return spool.keep()
