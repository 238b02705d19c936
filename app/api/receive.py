"""Receives files: hashed and written while they arrive, so that memory stays flat."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from app.api.deps import Parts
from app.errors import ServiceError
from app.storage import CHUNK, Spool, room


@dataclass
class Received:
    """Files by form field ("file" for a raw body), their client-side names, and text fields."""

    files: dict[str, Spool] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("multipart/form-data")


def too_large(limit: int) -> ServiceError:
    return ServiceError(
        413,
        "too_large",
        f"The upload has more than {limit} bytes.",
        "The operator sets the limit by LITESMITH_MAX_UPLOAD_BYTES.",
    )


@asynccontextmanager
async def receiving(request: Request, parts: Parts) -> AsyncIterator[Received]:
    """The files of a request; what was not kept when the block ends is gone."""
    limit = parts.settings.max_upload_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(limit)
    received = Received()
    with ExitStack() as stack:
        try:
            if is_form(request):
                with room():
                    await _receive_form(request, parts, received, stack)
            else:
                spool = stack.enter_context(Spool(parts.storage, limit))
                received.files["file"] = spool
                await _drain(_limited(request, limit), spool)
        except ClientDisconnect:
            raise ServiceError(
                400, "upload_broken", "The connection ended before the upload did."
            ) from None
        yield received


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise too_large(limit)
        yield chunk


async def _drain(chunks: AsyncIterator[bytes], spool: Spool) -> None:
    """Write in pieces of CHUNK bytes: one hop to a thread for each, not for each packet."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if len(buffer) >= CHUNK:
            await run_in_threadpool(spool.write, bytes(buffer))
            buffer.clear()
    if buffer:
        await run_in_threadpool(spool.write, bytes(buffer))


async def _receive_form(
    request: Request, parts: Parts, received: Received, stack: ExitStack
) -> None:
    limit = parts.settings.max_upload_bytes
    parser = MultiPartParser(request.headers, _limited(request, limit), max_files=8, max_fields=8)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise ServiceError(
            400, "invalid_form", f"The form cannot be read: {error}", "Send it with curl -F."
        ) from None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                spool = stack.enter_context(Spool(parts.storage, limit))
                await run_in_threadpool(_copy, value, spool)
                received.files[name] = spool
                received.names[name] = value.filename or name
            else:
                received.texts[name] = value
    finally:
        await form.close()


def _copy(source: UploadFile, spool: Spool) -> None:
    while chunk := source.file.read(CHUNK):
        spool.write(chunk)
