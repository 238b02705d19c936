"""Models and datasets: the same calls for both, told apart by their row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Request, Response
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.api.content import stream_object
from app.api.deps import Parts, location, one, owned, page
from app.api.idempotency import answered, fingerprint_of, remember
from app.api.receive import Received, receiving
from app.api.schemas import DatasetRead, ModelRead
from app.errors import ServiceError, invalid
from app.logging import request_id
from app.services import quotas, starting, uploads
from app.storage import Spool, Stored
from app.tables import DatasetRow, ModelRow


@dataclass(frozen=True)
class Kind:
    name: str
    table: type[ModelRow] | type[DatasetRow]

    def read(self, row: ModelRow | DatasetRow) -> ModelRead | DatasetRead:
        return ModelRead.of(row) if isinstance(row, ModelRow) else DatasetRead.of(row)


MODEL = Kind("model", ModelRow)
DATASET = Kind("dataset", DatasetRow)


def clean_name(name: str | None, fallback: str) -> str:
    """A name for people: printable, at most 200 characters."""
    text = "".join(c for c in name or "" if c.isprintable()).strip()
    return text.encode("utf-8", "replace").decode()[:200] or fallback


@dataclass(frozen=True)
class Kept:
    """A received file in the storage, recognized and ready to become a row."""

    kind: Kind
    name: str
    format: str
    stored: Stored

    def row(self, session: Session, tenant_id: str) -> tuple[ModelRow | DatasetRow, bool]:
        return uploads.create(
            session,
            self.kind.name,
            tenant_id=tenant_id,
            name=self.name,
            format_=self.format,
            stored=self.stored,
            request_id=request_id.get(),
        )


def keep(parts: Parts, tenant_id: str, kind: Kind, spool: Spool, name: str | None) -> Kept:
    """Recognize and store a received file. ServiceError 415 or 422 where it is unusable, 507 where
    the tenant's storage is full."""
    if spool.size_bytes == 0:
        raise invalid(
            "empty_upload", "file", "no bytes arrived", f"Send the {kind.name} as the body."
        )
    format_ = uploads.recognize(kind.name, spool.path)
    with parts.database.read() as session:
        # The same bytes again take no room.
        if uploads.of_content(session, kind.name, tenant_id, spool.sha256) is None:
            what = f"this {kind.name} of {spool.size_bytes} bytes"
            quotas.check_storage(session, parts.settings, tenant_id, spool.size_bytes, what=what)
    stored = spool.keep()
    return Kept(kind, clean_name(name, f"{kind.name}-{stored.sha256[:8]}"), format_, stored)


async def upload(
    request: Request, parts: Parts, tenant_id: str, kind: Kind, name: str | None, key: str | None
) -> Response:
    async with receiving(request, parts) as received:
        return await run_in_threadpool(
            _create, request, parts, tenant_id, kind, received, name, key
        )


def _create(
    request: Request,
    parts: Parts,
    tenant_id: str,
    kind: Kind,
    received: Received,
    name: str | None,
    key: str | None,
) -> Response:
    spool = received.files.get("file") or received.files.get(kind.name)
    if spool is None:
        raise invalid("missing_file", "file", "the form has no such part", "Use -F file=@PATH.")
    name = name or received.texts.get("name") or received.names.get("file")
    kept = keep(parts, tenant_id, kind, spool, name)
    fingerprint = fingerprint_of(kind.name, kept.stored.sha256, kept.name)

    def create() -> Response:
        with creating(parts) as session:
            if response := answered(session, tenant_id, key, fingerprint):
                return response
            row, new = kept.row(session, tenant_id)
            session.flush()
            return remember(
                session,
                tenant_id,
                key,
                fingerprint,
                status=201 if new else 200,
                body=kind.read(row).model_dump_json(),
                location=location(request, f"get_{kind.name}", id=row.id),
            )

    return once_more_on_conflict(create)


@contextmanager
def creating(parts: Parts) -> Iterator[Session]:
    """A writing transaction whose doorbell rings after the commit."""
    with parts.database.write() as session:
        parts.doorbell.ring_after_commit(session)
        yield session


def once_more_on_conflict(create: Callable[[], Response]) -> Response:
    """Run `create`, and again where another request created the same: it is found then."""
    try:
        return create()
    except IntegrityError:
        return create()


def read_page(
    parts: Parts, tenant_id: str, kind: Kind, limit: int, cursor: str | None
) -> tuple[list[ModelRow | DatasetRow], str | None]:
    with parts.database.read() as session:
        if kind is MODEL:
            models, after = page(session, owned(ModelRow, tenant_id), ModelRow, limit, cursor)
            return [*models], after
        rows, after = page(session, owned(DatasetRow, tenant_id), DatasetRow, limit, cursor)
        return [*rows], after


def delete(parts: Parts, tenant_id: str, kind: Kind, id_: str) -> None:
    with parts.database.write() as session:
        uploads.delete(session, one(session, kind.table, tenant_id, kind.name, id_))


def content(request: Request, parts: Parts, tenant_id: str, kind: Kind, id_: str) -> Response:
    with parts.database.read() as session:
        row = one(session, kind.table, tenant_id, kind.name, id_)
        if isinstance(row, ModelRow) and starting.to_be_made(row):
            raise ServiceError(
                409,
                "not_ready",
                f"Model '{id_}' has no file yet: it is {row.status}.",
                f"Wait until GET /v1/models/{id_} says that it is ready.",
            )
    return stream_object(request, parts, row.sha256, row.size_bytes, row.name)
