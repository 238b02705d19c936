"""Sends stored files: whole or in part, with their digest."""

import re
from base64 import b64encode
from collections.abc import Iterator
from itertools import chain
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from app.api.deps import Parts
from app.errors import ServiceError
from app.services import damage
from app.storage import Damaged, verified

AGAIN = "If you uploaded it, upload it again; if a job made it, submit that job again."
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, length) of a single-range header; None to send the whole. ServiceError 416."""
    match = RANGE.fullmatch(header) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, stop = max(0, size - int(last)), size
    if start >= size or stop <= start:
        raise ServiceError(
            416,
            "range_not_satisfiable",
            f"The file has {size} bytes; '{header}' is not in it.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop - start


def disposition(name: str) -> str:
    """An attachment under any name, by RFC 6266."""
    plain = re.sub(r"[^A-Za-z0-9._+-]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def whole(parts: Parts, sha256: str, size: int) -> Iterator[bytes]:
    """All bytes of an object, compared with its digest: of one that is damaged the last part never
    comes, so that nobody takes it for whole. Raises Damaged and FileNotFoundError."""
    try:
        yield from verified(parts.storage.read(sha256, 0, size), sha256)
    except (Damaged, FileNotFoundError):
        with parts.database.write() as session:
            damage.forget(session, sha256)
        raise


def stream_object(
    request: Request, parts: Parts, sha256: str, size: int, file_name: str
) -> Response:
    """The object's bytes, with ETag, Range, Content-Digest (RFC 9530) and Content-Disposition.

    A whole object is compared with its digest while it is sent; of a range, who puts the ranges
    together can do so, by its Repr-Digest.
    """
    etag = f'"{sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Digest": f"sha-256=:{b64encode(bytes.fromhex(sha256)).decode()}:",
        "Content-Disposition": disposition(file_name),
        "Cache-Control": "private, immutable, max-age=31536000",
    }
    known = request.headers.get("if-none-match", "").split(",")
    if {etag, "*"} & {tag.strip().removeprefix("W/") for tag in known}:
        return Response(status_code=304, headers=headers)
    conditional = request.headers.get("if-range")
    wanted = request.headers.get("range") if conditional in (None, etag) else None
    span = _span(wanted, size)
    start, length = span or (0, size)
    status = 200
    if span:
        status = 206
        # The digest is of the whole file, which a part of it does not have.
        headers["Repr-Digest"] = headers.pop("Content-Digest")
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    headers["Content-Length"] = str(length)
    if request.method == "HEAD":
        return Response(None, status, headers, "application/octet-stream")
    chunks = parts.storage.read(sha256, start, length) if span else whole(parts, sha256, size)
    try:
        # Before the answer begins: after it, what is found could only cut it off.
        first = next(chunks, b"")
    except FileNotFoundError:
        raise ServiceError(
            410, "content_missing", "The file is not in the storage any more.", AGAIN
        ) from None
    except Damaged:
        raise ServiceError(
            410, "storage_corrupt", "The stored file is damaged: its digest is another.", AGAIN
        ) from None
    return StreamingResponse(chain((first,), chunks), status, headers, "application/octet-stream")
