"""The body of a PATCH: appended to an upload as it comes, and compared with its checksum."""

import asyncio
import binascii
import hashlib
from base64 import b64decode
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.errors import ServiceError
from app.services.partial import Partial
from app.storage import CHUNK
from app.tables import PartialRow

CHECKSUMS = ("sha256", "sha1")
# A connection that broke without a word would hold the upload for ever.
SILENCE_S = 30.0
# What the digest is computed with, and what it must become.
Checksum = tuple["hashlib._Hash", bytes]


def parse_checksum(header: str | None) -> Checksum | None:
    if header is None:
        return None
    name, _, value = header.partition(" ")
    try:
        wanted = b64decode(value, validate=True)
    except binascii.Error:
        wanted = b""
    if name not in CHECKSUMS or not wanted:
        raise ServiceError(
            400,
            "invalid_checksum",
            "Upload-Checksum must be an algorithm and the digest in base64.",
            f"Algorithms: {', '.join(CHECKSUMS)}.",
        )
    return hashlib.new(name), wanted


async def append_body(
    request: Request,
    row: PartialRow,
    held: Partial,
    checksum: Checksum | None,
) -> None:
    """Append the body. What came of it stays, whatever ends it; but with a checksum, nothing of a
    body that does not have it."""
    start, proven = held.offset, checksum is None
    try:
        async for chunk in _chunks(request):
            if held.offset + len(chunk) > row.length:
                raise ServiceError(
                    413, "too_large", f"The upload was announced with {row.length} bytes."
                )
            if checksum:
                checksum[0].update(chunk)
            await run_in_threadpool(held.write, chunk)
        if checksum and checksum[0].digest() != checksum[1]:
            raise mismatch("this body")
        await run_in_threadpool(held.sync)
        proven = True
    except (ClientDisconnect, TimeoutError):
        raise ServiceError(
            400, "upload_broken", "The connection ended before the body did.", "Go on with it."
        ) from None
    finally:
        if not proven:
            held.cut(start)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about CHUNK bytes; of one that breaks off, what came of it first."""
    buffer, broken = bytearray(), None
    stream = aiter(request.stream())
    while broken is None:
        try:
            chunk = await asyncio.wait_for(anext(stream), SILENCE_S)
        except StopAsyncIteration:
            break
        except (ClientDisconnect, TimeoutError) as error:
            broken = error
        else:
            buffer += chunk
        if len(buffer) >= CHUNK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
    if broken is not None:
        raise broken


def mismatch(what: str) -> ServiceError:
    return ServiceError(
        460,
        "checksum_mismatch",
        f"What came of {what} does not have the digest that was announced.",
        "Send it again.",
    )
