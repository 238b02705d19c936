"""/v1/keys and /v1/audit: for the admins of a tenant"""

from datetime import datetime, timedelta
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app.api.deps import Cursor, Limit, Parts, Tenant, TheParts, location, one, owned, page
from app.api.idempotency import IdempotencyKey, answered, fingerprint_of, remember
from app.api.schemas import Page
from app.api.spec import from_json, json_body
from app.api.uploads import clean_name, once_more_on_conflict
from app.errors import invalid
from app.principal import Scope
from app.services import keys
from app.tables import AuditRow, KeyRow, now

router = APIRouter(prefix="/v1", tags=["keys"])

LONGEST_LIFE = timedelta(days=3660)


class KeyRead(BaseModel):
    """An API key without the key. `prefix`: its first characters, to know it by; `last_used_at`
    to the minute."""

    id: str
    name: str
    prefix: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, row: KeyRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class KeyCreated(KeyRead):
    """A new API key. `key` is shown in this answer and never again, so that it is null where the
    answer to an Idempotency-Key is repeated."""

    key: str | None = None


class AuditRead(BaseModel):
    """Who changed what: `action` is the operation's id; `key` is null where the service asked for
    none, and for what the command `litesmith keys` did on the service's machine."""

    id: str
    created_at: datetime
    key: str | None
    action: str
    subject: str
    request_id: str | None

    @classmethod
    def of(cls, row: AuditRow) -> Self:
        return cls(
            id=row.id,
            created_at=row.created_at,
            key=row.key_id,
            action=row.action,
            subject=row.subject,
            request_id=row.request_id,
        )


class KeyCreate(BaseModel):
    """A key of one's own tenant. admin includes write, which includes read."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    scopes: list[Scope] = Field(default=["read", "write"], min_length=1)
    expires_at: AwareDatetime | None = None


# Read by hand: nobody without a key makes the service read a body.
KEY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/KeyCreate"}}},
    }
}


@router.post(
    "/keys",
    operation_id="create_key",
    status_code=201,
    response_model=KeyCreated,
    openapi_extra=KEY_BODY,
)
async def create_key(
    request: Request, parts: TheParts, tenant: Tenant, idempotency_key: IdempotencyKey = None
) -> Response:
    """Make a key for the tenant of the key that asks. The answer alone holds it."""
    text = await json_body(request)
    return await run_in_threadpool(_create, request, parts, tenant, text, idempotency_key)


def _create(
    request: Request, parts: Parts, tenant: str, text: str, idempotency_key: str | None
) -> Response:
    asked = from_json(KeyCreate, text, {})
    if asked.expires_at and not now() < asked.expires_at < now() + LONGEST_LIFE:
        raise invalid("validation_error", "expires_at", "must lie in the next ten years")
    fingerprint = fingerprint_of("key", text)

    def create() -> Response:
        with parts.database.write() as session:
            if response := answered(session, tenant, idempotency_key, fingerprint):
                return response
            name = clean_name(asked.name, "key")
            row, key = keys.create(session, tenant, name, asked.scopes, asked.expires_at)
            session.flush()
            made = KeyCreated.of(row)
            # What is kept for the Idempotency-Key is the answer without the secret.
            response = remember(
                session,
                tenant,
                idempotency_key,
                fingerprint,
                status=201,
                body=made.model_dump_json(),
                location=location(request, "get_key", id=row.id),
            )
        whole = made.model_copy(update={"key": key}).model_dump_json()
        headers = {"Location": response.headers["location"]}
        return Response(whole, 201, headers, media_type="application/json")

    return once_more_on_conflict(create)


@router.get("/keys", operation_id="list_keys")
def list_keys(
    parts: TheParts, tenant: Tenant, limit: Limit = 50, cursor: Cursor = None
) -> Page[KeyRead]:
    """The tenant's keys, revoked and expired ones too."""
    with parts.database.read() as session:
        rows, after = page(session, owned(KeyRow, tenant), KeyRow, limit, cursor)
        return Page(items=[KeyRead.of(row) for row in rows], next_cursor=after)


@router.get("/keys/{id}", operation_id="get_key", name="get_key")
def get_key(parts: TheParts, tenant: Tenant, id: str) -> KeyRead:
    with parts.database.read() as session:
        return KeyRead.of(one(session, KeyRow, tenant, "key", id))


@router.delete("/keys/{id}", operation_id="revoke_key", status_code=204)
def revoke_key(parts: TheParts, tenant: Tenant, id: str) -> None:
    """Revoke a key: it opens nothing from the next request on."""
    with parts.database.write() as session:
        keys.revoke(one(session, KeyRow, tenant, "key", id))


@router.get("/audit", operation_id="list_audit")
def list_audit(
    parts: TheParts,
    tenant: Tenant,
    subject: Annotated[str | None, Query(max_length=80, description="Of this id alone.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[AuditRead]:
    """Who changed what in the tenant, newest first."""
    statement = owned(AuditRow, tenant)
    if subject is not None:
        statement = statement.where(AuditRow.subject == subject.replace("\x00", ""))
    with parts.database.read() as session:
        rows, after = page(session, statement, AuditRow, limit, cursor)
        return Page(items=[AuditRead.of(row) for row in rows], next_cursor=after)
