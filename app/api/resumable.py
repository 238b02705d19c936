"""/v1/uploads: models and datasets in several requests, by the tus protocol 1.0.0 (core, creation,
expiration, checksum, termination), https://tus.io/protocols/resumable-upload"""

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Coroutine
from datetime import datetime
from email.utils import format_datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from app.api import uploads
from app.api.append import CHECKSUMS, append_body, mismatch, parse_checksum
from app.api.deps import (
    Cursor,
    Limit,
    Parts,
    Tenant,
    TheParts,
    ThePrincipal,
    location,
    one,
    owned,
    page,
)
from app.api.idempotency import IdempotencyKey, answered, fingerprint_of, remember
from app.api.receive import too_large
from app.api.schemas import Page, PartialRead
from app.errors import ServiceError, invalid
from app.principal import Principal
from app.services import partial, quotas
from app.services.partial import Partial
from app.services.uploads import recognize
from app.storage import Stored
from app.tables import PartialRow, new_id, now

VERSION = "1.0.0"
EXTENSIONS = "creation,expiration,checksum,termination"
MEDIA_TYPE = "application/offset+octet-stream"
SHA256 = r"^[0-9a-f]{64}$"
KINDS = {"model": uploads.MODEL, "dataset": uploads.DATASET}
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class TusRoute(APIRoute):
    """A route whose answers name the version of the protocol, errors too."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def tus(request: Request) -> Response:
            try:
                response = await handle(request)
            except ServiceError as error:
                error.headers["Tus-Resumable"] = VERSION
                raise
            response.headers["Tus-Resumable"] = VERSION
            return response

        return tus


def of_this_version(request: Request) -> None:
    """ServiceError 412 where a request does not name the version; a plain GET is ours. Asked after
    who it is that asks: dependencies of the application come first."""
    if request.method in ("GET", "OPTIONS") or request.headers.get("tus-resumable") == VERSION:
        return
    raise ServiceError(
        412,
        "unsupported_version",
        f"The request needs 'Tus-Resumable: {VERSION}'.",
        "Use a client of the tus protocol, or PUT the file to /v1/models.",
        headers={"Tus-Version": VERSION},
    )


router = APIRouter(
    prefix="/v1/uploads",
    tags=["uploads"],
    route_class=TusRoute,
    dependencies=[Depends(of_this_version)],
)

Length = Annotated[int, Header(ge=0, le=2**53, description="Bytes of the whole file.")]
Metadata = Annotated[
    str,
    Header(
        max_length=4000,
        description="`key base64(value)`, comma-separated: `kind` (model or dataset; model without"
        " it), `name`, `sha256` of the whole in hexadecimal; others are kept and not used.",
    ),
]


@router.options("", include_in_schema=False)
def get_capabilities(parts: TheParts) -> Response:
    headers = {
        "Tus-Version": VERSION,
        "Tus-Extension": EXTENSIONS,
        "Tus-Max-Size": str(parts.settings.max_upload_bytes),
        "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
    }
    return Response(None, 204, headers)


@router.post("", operation_id="create_upload", status_code=201, response_model=PartialRead)
def create_upload(
    request: Request,
    parts: TheParts,
    tenant: Tenant,
    upload_length: Length,
    upload_metadata: Metadata = "",
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Begin an upload; its bytes are sent by PATCH to the `Location` that is answered."""
    if upload_length > parts.settings.max_upload_bytes:
        raise too_large(parts.settings.max_upload_bytes)
    if upload_length == 0:
        raise invalid("empty_upload", "Upload-Length", "is 0", "Send a file that is not empty.")
    given = _parse(upload_metadata)
    kind, sha256 = given.get("kind", "model"), given.get("sha256")
    if kind not in KINDS:
        raise invalid("validation_error", "Upload-Metadata.kind", "must be model or dataset")
    if sha256 is not None and not re.fullmatch(SHA256, sha256):
        raise invalid("validation_error", "Upload-Metadata.sha256", "must be 64 hexadecimal digits")
    fingerprint = fingerprint_of("upload", str(upload_length), upload_metadata)

    def create() -> Response:
        with parts.database.write() as session:
            if response := answered(session, tenant, idempotency_key, fingerprint):
                return response
            what = f"this {kind} of {upload_length} bytes"
            quotas.check_storage(session, parts.settings, tenant, upload_length, what=what)
            row = PartialRow(
                id=new_id("upl"),
                tenant_id=tenant,
                created_at=now(),
                kind=kind,
                name=uploads.clean_name(given.get("name") or given.get("filename"), "") or None,
                length=upload_length,
                upload_metadata=upload_metadata,
                announced_sha256=sha256,
                expires_at=partial.expiry(parts.settings.partial_retention_days),
            )
            session.add(row)
            partial.begin(parts.storage, row.id)
            response = remember(
                session,
                tenant,
                idempotency_key,
                fingerprint,
                status=201,
                body=PartialRead.of(row, 0).model_dump_json(),
                location=location(request, "get_upload", id=row.id),
            )
            response.headers["Upload-Expires"] = _http_date(row.expires_at)
            return response

    return uploads.once_more_on_conflict(create)


def _parse(metadata: str) -> dict[str, str]:
    """Key -> value of an Upload-Metadata header."""
    found = {}
    for pair in filter(None, (part.strip() for part in metadata.split(","))):
        key, _, value = pair.partition(" ")
        try:
            found[key] = b64decode(value, validate=True).decode()
        except (binascii.Error, ValueError):
            raise invalid(
                "validation_error",
                "Upload-Metadata",
                f"the value of '{key[:80]}' is no base64 of UTF-8 text",
            ) from None
    return found


def _http_date(at: datetime) -> str:
    return format_datetime(at, usegmt=True)


@router.get("", operation_id="list_uploads")
def list_uploads(
    parts: TheParts,
    tenant: Tenant,
    sha256: Annotated[str | None, Query(pattern=SHA256, description="Announced digest.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[PartialRead]:
    """Uploads that are under way or were finished lately: one that was interrupted is found again
    by the digest that was announced with it."""
    at_least = owned(PartialRow, tenant).where(PartialRow.expires_at > now())
    if sha256 is not None:
        at_least = at_least.where(PartialRow.announced_sha256 == sha256)
    with parts.database.read() as session:
        rows, after = page(session, at_least, PartialRow, limit, cursor)
    return Page(items=[_read(parts, row) for row in rows], next_cursor=after)


def _read(parts: Parts, row: PartialRow) -> PartialRead:
    try:
        return PartialRead.of(row, partial.offset_of(parts.storage, row))
    except ServiceError:
        return PartialRead.of(row, None)


def _find(parts: Parts, tenant: str, id_: str) -> PartialRow:
    with parts.database.read() as session:
        row = one(session, PartialRow, tenant, "upload", id_)
    if row.expires_at < now():
        raise partial.gone(id_)
    return row


@router.get("/{id}", operation_id="get_upload", name="get_upload")
def get_upload(parts: TheParts, principal: ThePrincipal, id: str) -> PartialRead:
    """How far an upload is, and the model or dataset that it became."""
    return _read(parts, _settle(parts, principal, id))


@router.head("/{id}", include_in_schema=False)
def get_offset(parts: TheParts, principal: ThePrincipal, id: str) -> Response:
    """Where to go on."""
    row = _settle(parts, principal, id)
    headers = _progress(row, partial.offset_of(parts.storage, row))
    headers |= {"Upload-Length": str(row.length), "Cache-Control": "no-store"}
    if row.upload_metadata:
        headers["Upload-Metadata"] = row.upload_metadata
    return Response(None, 200, headers)


def _settle(parts: Parts, principal: Principal, id_: str) -> PartialRow:
    """The upload; one that is whole is finished first, should its process have died at that: who
    finds nothing left to send does not come again. A key that may only read finishes nothing."""
    tenant = principal.tenant_id
    row = _find(parts, tenant, id_)
    if "write" not in principal.scopes:
        return row
    if row.subject_id is None and partial.offset_of(parts.storage, row) == row.length:
        row, held = _hold(parts, tenant, id_)
        try:
            _complete(parts, tenant, row, held)
        finally:
            _close(held)
        row = _find(parts, tenant, id_)
    return row


def _progress(row: PartialRow, offset: int) -> dict[str, str]:
    return {"Upload-Offset": str(offset), "Upload-Expires": _http_date(row.expires_at)}


@router.delete("/{id}", operation_id="delete_upload", status_code=204)
def delete_upload(parts: TheParts, tenant: Tenant, id: str) -> None:
    """Give an upload up; a model or dataset that it became stays."""
    with parts.database.write() as session:
        session.delete(one(session, PartialRow, tenant, "upload", id))
    partial.path_of(parts.storage, id).unlink(missing_ok=True)


@router.patch(
    "/{id}",
    operation_id="append_to_upload",
    status_code=204,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def append_to_upload(
    request: Request,
    parts: TheParts,
    tenant: Tenant,
    id: str,
    upload_offset: Annotated[int, Header(ge=0, le=2**53)],
    upload_checksum: Annotated[
        str | None, Header(max_length=200, description="`sha256 BASE64`, of this body.")
    ] = None,
) -> Response:
    """Bring the bytes from `Upload-Offset` on. With the last of them the file becomes a model or
    dataset, which `GET` of the same URL names."""
    if request.headers.get("content-type") != MEDIA_TYPE:
        raise ServiceError(415, "unsupported_media_type", f"The body must be sent as {MEDIA_TYPE}.")
    checksum = parse_checksum(upload_checksum)
    row, held = await run_in_threadpool(_hold, parts, tenant, id)
    try:
        offset = row.length if held is None else held.offset
        if upload_offset != offset:
            raise _elsewhere(offset)
        if held is not None:
            await append_body(request, row, held, checksum)
            offset = held.offset
        if offset == row.length and row.subject_id is None:
            await run_in_threadpool(_complete, parts, tenant, row, held)
    finally:
        _close(held)
    return Response(None, 204, _progress(row, offset))


def _hold(parts: Parts, tenant: str, id_: str) -> tuple[PartialRow, Partial | None]:
    """The upload, good for another while, and its file, held; None where that is stored already."""
    row, held = _find(parts, tenant, id_), None
    if row.sha256 is None or partial.path_of(parts.storage, id_).exists():
        try:
            held = Partial(parts.storage, id_)
        except ServiceError as error:
            if error.status != 410:
                raise
    try:
        with parts.database.write() as session:
            # Read once more, now that nobody else can change it.
            row = one(session, PartialRow, tenant, "upload", id_)
            row.expires_at = partial.expiry(parts.settings.partial_retention_days)
        if held is None and row.sha256 is None:
            raise partial.gone(id_)
    except BaseException:
        _close(held)
        raise
    return row, held


def _close(held: Partial | None) -> None:
    if held is not None:
        held.close()


def _elsewhere(offset: int) -> ServiceError:
    return ServiceError(
        409,
        "offset_mismatch",
        f"The upload is at {offset}.",
        "Ask for the offset by HEAD, and go on there.",
        headers={"Upload-Offset": str(offset)},
    )


def _complete(parts: Parts, tenant: str, row: PartialRow, held: Partial | None) -> None:
    """Make a whole file a model or dataset; `held` where it may not be stored yet."""
    if held is not None:
        _store(parts, tenant, row, held)

    def create() -> Response:
        with uploads.creating(parts) as session:
            found = one(session, PartialRow, tenant, "upload", row.id)
            if found.sha256 is None or found.format is None:
                raise partial.gone(row.id)
            kind, stored = KINDS[found.kind], Stored(found.sha256, found.length)
            name = uploads.clean_name(found.name, f"{kind.name}-{found.sha256[:8]}")
            subject, _ = uploads.Kept(kind, name, found.format, stored).row(session, tenant)
            session.flush()
            found.subject_id = subject.id
        return Response(None, 204)

    uploads.once_more_on_conflict(create)


def _store(parts: Parts, tenant: str, row: PartialRow, held: Partial) -> None:
    """Recognize the whole file and store it. Of one that is unusable nothing stays."""
    try:
        digest = held.sha256()
        if row.announced_sha256 not in (None, digest):
            raise mismatch("the whole file")
        format_ = recognize(row.kind, held.path)
    except FileNotFoundError:
        # It was given up meanwhile.
        raise partial.gone(row.id) from None
    except ServiceError:
        with parts.database.write() as session:
            session.delete(one(session, PartialRow, tenant, "upload", row.id))
        held.discard()
        raise
    # Before it is stored: should this process die between the two, the next one knows.
    with parts.database.write() as session:
        found = one(session, PartialRow, tenant, "upload", row.id)
        found.sha256, found.format = digest, format_
    parts.storage.adopt(held.path, digest)
