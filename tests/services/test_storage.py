"""Both kinds of storage do the same."""

import fcntl
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import obstore
import pytest
from moto.server import ThreadedMotoServer
from running import free_port

from app.config import Settings
from app.storage import (
    Damaged,
    LocalStorage,
    S3Storage,
    Spool,
    Storage,
    StorageAway,
    StorageFull,
    is_intact,
    open_storage,
    store_bytes,
    store_file,
    verified,
)
from app.tables import now

CONTENT = bytes(range(256)) * 40_000  # 10 MB: more than one chunk


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file":
        return open_storage(Settings(data_dir=tmp_path))
    return open_storage(
        Settings(
            data_dir=tmp_path,
            storage_url=f"s3://bucket/{tmp_path.name}",
            s3_endpoint=request.getfixturevalue("endpoint"),
            s3_access_key_id="test",
            s3_secret_access_key="test",
        )
    )


def test_what_is_stored_can_be_read(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    stored = store_file(storage, source)
    assert (stored.sha256, stored.size_bytes) == (sha256(CONTENT).hexdigest(), len(CONTENT))
    assert source.exists()
    assert b"".join(storage.read(stored.sha256, 0, len(CONTENT))) == CONTENT
    assert b"".join(storage.read(stored.sha256, 5_000_000, 7)) == CONTENT[5_000_000:5_000_007]
    storage.fetch(stored.sha256, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert store_bytes(storage, CONTENT) == stored
    assert not list(storage.spool.glob("tmp*"))


def test_what_is_missing_is_no_file(storage: Storage, tmp_path: Path) -> None:
    missing = "0" * 64
    with pytest.raises(FileNotFoundError):
        storage.fetch(missing, tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        next(storage.read(missing, 0, 1))
    storage.delete(missing)


def test_age_and_deletion(storage: Storage) -> None:
    stored = store_bytes(storage, b"x")
    (found,) = storage.objects()
    assert (found.sha256, found.size_bytes) == (stored.sha256, 1)
    assert abs(found.written_at - now()) < timedelta(minutes=1)
    assert not storage.delete(stored.sha256, written_before=now() - timedelta(hours=1))
    assert is_intact(storage, stored)
    assert storage.delete(stored.sha256, written_before=now() + timedelta(hours=1))
    assert list(storage.objects()) == []
    assert not is_intact(storage, stored)


def damage(storage: Storage, digest: str) -> None:
    """Change one byte of an object behind the storage's back."""
    if isinstance(storage, LocalStorage):
        path = storage.root / digest[:2] / digest
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x00")
        return
    assert isinstance(storage, S3Storage)
    size = next(found.size_bytes for found in storage.objects() if found.sha256 == digest)
    content = b"".join(storage.read(digest, 0, size - 1)) + b"\x00"
    obstore.put(storage._store, f"{digest[:2]}/{digest}", content)


def test_what_is_damaged_is_told_and_repaired_by_storing_it_again(
    storage: Storage, tmp_path: Path
) -> None:
    stored = store_bytes(storage, CONTENT)
    damage(storage, stored.sha256)
    assert not is_intact(storage, stored)
    with pytest.raises(Damaged):
        storage.fetch(stored.sha256, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    # The last part never comes: who counts bytes sees that it is not whole.
    sent: list[bytes] = []
    with pytest.raises(Damaged):
        sent.extend(verified(storage.read(stored.sha256, 0, len(CONTENT)), stored.sha256))
    assert 0 < sum(map(len, sent)) < len(CONTENT)
    store_bytes(storage, CONTENT)
    assert is_intact(storage, stored)


def test_a_copy_is_no_way_into_the_storage(storage: Storage, tmp_path: Path) -> None:
    stored = store_bytes(storage, b"weights")
    copy = tmp_path / "copy"
    storage.fetch(stored.sha256, copy)
    copy.chmod(0o644)
    copy.write_bytes(b"changed by a hostile file")
    assert is_intact(storage, stored)


def test_to_open_the_storage_removes_nothing(tmp_path: Path) -> None:
    left = open_storage(Settings(data_dir=tmp_path)).spool / "left"
    left.write_bytes(b"half an upload")
    os.utime(left, (0, 0))
    storage = open_storage(Settings(data_dir=tmp_path))
    assert left.exists()
    storage.sweep()
    assert not left.exists()


def test_what_is_written_anew_while_garbage_is_collected_stays(tmp_path: Path) -> None:
    storage = open_storage(Settings(data_dir=tmp_path))
    assert isinstance(storage, LocalStorage)
    stored = store_bytes(storage, b"the same bytes")
    path = storage.root / stored.sha256[:2] / stored.sha256
    os.utime(path, (0, 0))
    limit = now() - timedelta(hours=1)
    # Found old; then the same bytes come again; then it is to be removed.
    assert [found.written_at < limit for found in storage.objects()] == [True]
    store_bytes(storage, b"the same bytes")
    assert not storage.delete(stored.sha256, written_before=limit)
    # Who keeps all objects for a while (a backup) keeps an old one too.
    os.utime(path, (0, 0))
    with storage.lock(fcntl.LOCK_SH):
        assert not storage.delete(stored.sha256, written_before=limit)
    assert storage.delete(stored.sha256, written_before=limit)


def test_a_store_that_is_full_or_away_says_so(tmp_path: Path) -> None:
    class Full(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b"<Error><Code>XMinioStorageFull</Code></Error>"
            self.send_response(507)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Full)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    full, away = (
        open_storage(
            Settings(
                data_dir=tmp_path,
                storage_url="s3://bucket",
                s3_endpoint=f"http://127.0.0.1:{port}",
                s3_access_key_id="a",
                s3_secret_access_key="b",
            )
        )
        for port in (server.server_port, free_port())
    )
    try:
        before = set(full.spool.iterdir())
        with pytest.raises(StorageFull):
            store_bytes(full, b"x")
        assert set(full.spool.iterdir()) == before
        for call in (lambda: store_bytes(away, b"x"), away.check, lambda: list(away.objects())):
            with pytest.raises(StorageAway):
                call()
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_not_kept_is_gone(storage: Storage) -> None:
    before = set(storage.spool.iterdir())
    with Spool(storage, limit=10) as spool:
        spool.write(b"12345")
        with pytest.raises(OverflowError):
            spool.write(b"678901")
    assert set(storage.spool.iterdir()) == before
