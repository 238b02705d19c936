"""The client's uploads in several requests, by the tus protocol 1.0.0: an interrupted one goes on
where it was, in the same call or in a later one."""

import hashlib
import os
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from app.client_http import CHUNK_BYTES, Connection, OnProgress, upload
from app.client_types import ApiError, Unreachable

# Files from this size on are sent so.
RESUMABLE_BYTES = 64 * 2**20
# Bytes of one request: some proxies pass a request on only when they have all of it.
PART_BYTES = 64 * 2**20
Kind = Literal["model", "dataset"]
TUS = {"Tus-Resumable": "1.0.0"}
LONGEST_PAUSE_S = 10.0
# 409, 423: another connection is or was ahead; the others may be over in a moment.
PASSING = (409, 423, 502, 503, 504)


def send(
    connection: Connection,
    kind: Kind,
    path: Path,
    name: str | None,
    on_progress: OnProgress | None,
    resumable: bool | None,
    patience: float,
) -> Any:
    """Upload a file in one request, or in several where it is `resumable`: None means by its
    size. Returns the model or dataset that it became."""
    name = name or path.name
    if resumable is None:
        resumable = path.stat().st_size >= RESUMABLE_BYTES
    if resumable:
        return upload_in_parts(connection, kind, path, name, on_progress, patience)
    return upload(connection, f"/v1/{kind}s", path, {"name": name}, on_progress)


def upload_in_parts(
    connection: Connection,
    kind: Kind,
    path: Path,
    name: str,
    on_progress: OnProgress | None,
    patience: float,
) -> Any:
    """Upload a file, or what is missing of it; returns the model or dataset that it became.

    What breaks is taken up again until nothing came through for `patience` seconds; then the error
    is raised, and the same call later goes on. The service keeps what came for some days.
    """
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        url = _begun(connection, kind, digest, total) or _begin(
            connection, kind, name, digest, total
        )
        _send(connection, url, file, total, on_progress, patience)
    made = connection.json("GET", url)[kind]
    return connection.json("GET", f"/v1/{kind}s/{made}")


def _begun(connection: Connection, kind: str, digest: str, total: int) -> str | None:
    """The URL of an unfinished upload of the same file, by this or another client of the tenant."""
    found = connection.json("GET", "/v1/uploads", params={"sha256": digest})["items"]
    for item in found:
        unfinished = item[kind] is None and item["offset"] is not None
        if item["kind"] == kind and item["length"] == total and unfinished:
            return f"/v1/uploads/{item['id']}"
    return None


def _begin(connection: Connection, kind: str, name: str, digest: str, total: int) -> str:
    given = {"kind": kind, "name": name, "sha256": digest}
    metadata = ",".join(f"{k} {b64encode(v.encode()).decode()}" for k, v in given.items())
    headers = TUS | {"Upload-Length": str(total), "Upload-Metadata": metadata}
    return f"/v1/uploads/{connection.json('POST', '/v1/uploads', headers=headers)['id']}"


def _send(
    connection: Connection,
    url: str,
    file: IO[bytes],
    total: int,
    on_progress: OnProgress | None,
    patience: float,
) -> None:
    reached, since, pause = 0, time.monotonic(), 0.5
    while True:
        try:
            head = connection.call("HEAD", url, headers=TUS)
            offset = int(head.headers["Upload-Offset"])
            if offset > reached:
                reached, since, pause = offset, time.monotonic(), 0.5
            if on_progress:
                on_progress(offset, total)
            while offset < total:
                offset = _send_part(connection, url, file, offset, total, on_progress)
            return
        except (Unreachable, ApiError) as error:
            if isinstance(error, ApiError) and error.status not in PASSING:
                raise
            if time.monotonic() - since > patience:
                if isinstance(error, Unreachable):
                    again = f"{error}; the same upload, called again, goes on at byte {reached}"
                    raise Unreachable(again) from error
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _send_part(
    connection: Connection,
    url: str,
    file: IO[bytes],
    offset: int,
    total: int,
    on_progress: OnProgress | None,
) -> int:
    """Send the next part; returns the offset after it."""
    size = min(PART_BYTES, total - offset)
    headers = TUS | {
        "Content-Type": "application/offset+octet-stream",
        "Content-Length": str(size),
        "Upload-Offset": str(offset),
    }

    def chunks() -> Iterator[bytes]:
        file.seek(offset)
        done = 0
        while done < size and (chunk := file.read(min(CHUNK_BYTES, size - done))):
            yield chunk
            done += len(chunk)
            if on_progress:
                on_progress(offset + done, total)

    answer = connection.call("PATCH", url, headers=headers, content=chunks())
    return int(answer.headers["Upload-Offset"])
