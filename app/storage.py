"""Files by their SHA-256: on a local disk, or in an S3-compatible bucket.

An object is written once, whole, and never changed; what `adopt` has returned for can be read.
What is read as a whole is compared with its digest.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlparse

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from app.config import Settings
from app.masking import mask
from app.objects import (
    CHUNK,
    Damaged,
    Object,
    Storage,
    StorageAway,
    StorageFull,
    Stored,
    is_intact,
    room,
    verified,
    write_all,
)

__all__ = [
    "CHUNK",
    "Damaged",
    "LocalStorage",
    "Object",
    "S3Storage",
    "Spool",
    "Storage",
    "StorageAway",
    "StorageFull",
    "Stored",
    "is_intact",
    "open_storage",
    "room",
    "store_bytes",
    "store_file",
    "verified",
    "write_all",
]

# A spool file not written to for so long belongs to nobody.
ABANDONED = timedelta(days=1)
# What a store without room says: the status, or the code of an S3 dialect that uses another one.
FULL_ANSWERS = ("507 Insufficient", "StorageFull", "QuotaExceeded", "InsufficientStorage")
S3_PATIENCE = timedelta(seconds=20)


def _key(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _copy(chunks: Iterator[bytes], digest: str, to: Path) -> None:
    """Write a whole object to a file, which is not there where that fails."""
    descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for chunk in verified(chunks, digest):
            write_all(descriptor, chunk)
    except BaseException:
        to.unlink()
        raise
    finally:
        os.close(descriptor)


def _own(directory: Path) -> Path:
    with room():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def remove_older(directory: Path, age: timedelta) -> int:
    """Remove the files of a directory that were not written to for so long; returns how many."""
    limit, removed = time.time() - age.total_seconds(), 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < limit:
                path.unlink()
                removed += 1
    return removed


def _sync(path: Path) -> None:
    """What was written to a file, or renamed within a directory, survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStorage:
    """Objects as files below one directory; the files of uploads lie beside them, on one disk."""

    def __init__(self, root: Path, partials_for: timedelta) -> None:
        self.root = root
        self._partials_for = partials_for
        self.spool = _own(root / "spool")
        self.partials = _own(root / "partials")

    def _path(self, digest: str) -> Path:
        return self.root / _key(digest)

    @contextmanager
    def lock(self, kind: int) -> Iterator[None]:
        """flock(2) of the whole storage: shared to add an object or to keep all of them, exclusive
        to remove one. Without it an object could be found old, be written anew, and be removed."""
        descriptor = os.open(self.root / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def adopt(self, file: Path, digest: str) -> None:
        target = self._path(digest)
        with room(), self.lock(fcntl.LOCK_SH):
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                _sync(self.root)
            file.chmod(0o444)
            os.utime(file)
            _sync(file)
            os.replace(file, target)
            _sync(target.parent)

    def fetch(self, digest: str, to: Path) -> None:
        # A copy, no link: who gets it could write into the object.
        source = self._path(digest)
        _copy(self.read(digest, 0, source.stat().st_size), digest, to)

    def read(self, digest: str, start: int, length: int) -> Iterator[bytes]:
        with self._path(digest).open("rb") as file:
            file.seek(start)
            while length > 0 and (chunk := file.read(min(CHUNK, length))):
                length -= len(chunk)
                yield chunk

    def delete(self, digest: str, written_before: datetime | None = None) -> bool:
        path = self._path(digest)
        try:
            with self.lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
                if written_before and path.stat().st_mtime >= written_before.timestamp():
                    return False
                path.unlink()
        except (FileNotFoundError, BlockingIOError):
            # Gone, or somebody adds objects just now: it is found again the next time.
            return False
        return True

    def objects(self) -> Iterator[Object]:
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                written = datetime.fromtimestamp(found.st_mtime, UTC)
                yield Object(path.name, found.st_size, written)

    def sweep(self) -> None:
        remove_older(self.spool, ABANDONED)
        remove_older(self.partials, self._partials_for)

    def check(self) -> None:
        with room(), tempfile.TemporaryFile(dir=self.spool) as file:
            file.write(b"\0")


@contextmanager
def _answered() -> Iterator[None]:
    """Tells what the store answered as one of this module's exceptions."""
    try:
        yield
    except NotFoundError as error:
        raise FileNotFoundError(str(error)) from error
    except BaseError as error:
        told = str(error).split("\n", 1)[0]
        if any(word in told for word in FULL_ANSWERS):
            raise StorageFull(told) from error
        raise StorageAway(told) from error


class S3Storage:
    """Objects in a bucket; uploads are spooled to the local temporary directory first, since the
    key is the digest of what is being received."""

    def __init__(self, settings: Settings, bucket: str, prefix: str) -> None:
        self.spool = _own(Path(tempfile.gettempdir()) / f"litesmith-spool-{os.getuid()}")
        self.partials = _own(settings.root / "partials")
        self._partials_for = timedelta(days=settings.partial_retention_days)
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
            retry_config={"max_retries": 3, "retry_timeout": S3_PATIENCE},
        )

    def adopt(self, file: Path, digest: str) -> None:
        with _answered():
            # A large file goes in parts, which become an object when the last one is there.
            obstore.put(self._store, _key(digest), file)
            kept = obstore.head(self._store, _key(digest))["size"]
        if kept != file.stat().st_size:
            raise StorageAway(f"the store kept {kept} bytes of {file.stat().st_size}")
        file.unlink()

    def fetch(self, digest: str, to: Path) -> None:
        with _answered():
            found = obstore.get(self._store, _key(digest))
            chunks = (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK))
            _copy(chunks, digest, to)

    def read(self, digest: str, start: int, length: int) -> Iterator[bytes]:
        while length > 0:
            size = min(CHUNK, length)
            with _answered():
                part = obstore.get_range(self._store, _key(digest), start=start, length=size)
            start, length = start + size, length - size
            yield bytes(part)

    def delete(self, digest: str, written_before: datetime | None = None) -> bool:
        with _answered():
            try:
                found = obstore.head(self._store, _key(digest))
            except FileNotFoundError:
                return False
            if written_before and found["last_modified"] >= written_before:
                return False
            # No store removes by age: the same bytes that come right here are lost with it.
            obstore.delete(self._store, _key(digest))
        return True

    def objects(self) -> Iterator[Object]:
        with _answered():
            for page in obstore.list(self._store):
                for item in page:
                    name = item["path"].rsplit("/", 1)[-1]
                    yield Object(name, item["size"], item["last_modified"])

    def sweep(self) -> None:
        remove_older(self.spool, ABANDONED)
        remove_older(self.partials, self._partials_for)

    def check(self) -> None:
        with _answered():
            next(iter(obstore.list(self._store, chunk_size=1)), None)


def open_storage(settings: Settings) -> Storage:
    """The storage that LITESMITH_STORAGE_URL names. ValueError for another scheme."""
    url = urlparse(settings.storage)
    if url.scheme == "file":
        return LocalStorage(Path(url.path), timedelta(days=settings.partial_retention_days))
    if url.scheme == "s3":
        return S3Storage(settings, url.netloc, url.path.strip("/"))
    raise ValueError(
        f"LITESMITH_STORAGE_URL is '{mask(settings.storage)}'; it must be file:///path or s3://bucket"
    )


class Spool:
    """A file being received: hashed while it is written, gone unless it was kept.

    Use as a context manager; `limit` is the most bytes it takes. Raises StorageFull.
    """

    def __init__(self, storage: Storage, limit: int | None = None) -> None:
        self._storage = storage
        self._limit = limit
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        with room():
            descriptor, name = tempfile.mkstemp(dir=storage.spool)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self.path = Path(name)

    def write(self, chunk: bytes) -> None:
        """Raises OverflowError past the limit."""
        self.size_bytes += len(chunk)
        if self._limit is not None and self.size_bytes > self._limit:
            raise OverflowError
        self._hash.update(chunk)
        write_all(self._file.fileno(), chunk)

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
