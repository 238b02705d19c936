"""/v1/webhooks: for the admins of a tenant"""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.api.deps import Cursor, Limit, Parts, Tenant, TheParts, location, one, owned, page
from app.api.idempotency import IdempotencyKey, answered, fingerprint_of, remember
from app.api.schemas import Page
from app.api.spec import from_json, json_body
from app.api.uploads import creating, once_more_on_conflict
from app.errors import not_found
from app.principal import note
from app.services import webhooks
from app.services.webhooks import EVENTS, Event
from app.tables import DeliveryRow, WebhookRow

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

DeliveryStatus = Literal["pending", "delivered", "failed"]
Url = Annotated[str, Field(min_length=1, max_length=2000, description="Public, https://")]
Description = Annotated[str, Field(max_length=500)]
Events = Annotated[list[Event], Field(min_length=1, max_length=len(EVENTS))]


class WebhookCreate(BaseModel):
    """Where to tell of which events."""

    model_config = ConfigDict(extra="forbid")

    url: Url
    events: Events = ["job.finished"]
    description: Description = ""


class WebhookChange(BaseModel):
    """What is given is changed; enabling again forgets why it was disabled."""

    model_config = ConfigDict(extra="forbid")

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = None


class WebhookRead(BaseModel):
    """A webhook without its secret. `failing_since`: since when no delivery has succeeded."""

    id: str
    url: str
    description: str
    events: list[str]
    enabled: bool
    disabled_reason: str | None
    failing_since: datetime | None
    created_at: datetime

    @classmethod
    def of(cls, row: WebhookRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class WebhookSecret(WebhookRead):
    """A webhook with its new secret. `secret` is shown in this answer and never again, so that it
    is null where the answer to an Idempotency-Key is repeated."""

    secret: str | None = None


class DeliveryRead(BaseModel):
    """A message to a webhook; its id is the header `webhook-id`. Of the last attempt: `error`, or
    `response_status`, the beginning of the answer, and how long it took."""

    id: str
    webhook: str
    event: str
    status: DeliveryStatus
    attempts: int
    created_at: datetime
    next_attempt_at: datetime | None
    last_attempt_at: datetime | None
    delivered_at: datetime | None
    response_status: int | None
    response_excerpt: str | None
    latency_ms: float | None
    error: str | None
    body: str

    @classmethod
    def of(cls, row: DeliveryRow) -> Self:
        names = set(cls.model_fields) - {"webhook"}
        return cls(webhook=row.webhook_id, **{name: getattr(row, name) for name in names})


def _body(schema: type[BaseModel]) -> dict[str, Any]:
    """Read by hand: nobody without a key makes the service read a body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _hook(session: Session, tenant: str, id_: str) -> WebhookRow:
    return one(session, WebhookRow, tenant, "webhook", id_)


def _delivery(session: Session, tenant: str, id_: str, delivery: str) -> DeliveryRow:
    row = one(session, DeliveryRow, tenant, "delivery", delivery)
    if row.webhook_id != id_:
        raise not_found("delivery", delivery)
    return row


@router.post(
    "",
    operation_id="create_webhook",
    status_code=201,
    response_model=WebhookSecret,
    openapi_extra=_body(WebhookCreate),
)
async def create_webhook(
    request: Request, parts: TheParts, tenant: Tenant, idempotency_key: IdempotencyKey = None
) -> Response:
    """Be told of events at a URL. The answer alone holds the secret that signs them."""
    text = await json_body(request)
    return await run_in_threadpool(_create, request, parts, tenant, text, idempotency_key)


def _create(request: Request, parts: Parts, tenant: str, text: str, key: str | None) -> Response:
    asked = from_json(WebhookCreate, text, {})
    webhooks.check_url(parts.settings, asked.url)
    fingerprint = fingerprint_of("webhook", text)

    def create() -> Response:
        with parts.database.write() as session:
            if response := answered(session, tenant, key, fingerprint):
                return response
            events = list(dict.fromkeys(asked.events))
            row = webhooks.create(session, tenant, asked.url, events, asked.description)
            session.flush()
            made = WebhookRead.of(row)
            # What is kept for the Idempotency-Key is the answer without the secret.
            response = remember(
                session,
                tenant,
                key,
                fingerprint,
                status=201,
                body=WebhookSecret(**made.model_dump()).model_dump_json(),
                location=location(request, "get_webhook", id=row.id),
            )
        whole = WebhookSecret(**made.model_dump(), secret=row.secret).model_dump_json()
        headers = {"Location": response.headers["location"]}
        return Response(whole, 201, headers, media_type="application/json")

    return once_more_on_conflict(create)


@router.get("", operation_id="list_webhooks")
def list_webhooks(
    parts: TheParts, tenant: Tenant, limit: Limit = 50, cursor: Cursor = None
) -> Page[WebhookRead]:
    with parts.database.read() as session:
        rows, after = page(session, owned(WebhookRow, tenant), WebhookRow, limit, cursor)
        return Page(items=[WebhookRead.of(row) for row in rows], next_cursor=after)


@router.get("/{id}", operation_id="get_webhook", name="get_webhook")
def get_webhook(parts: TheParts, tenant: Tenant, id: str) -> WebhookRead:
    with parts.database.read() as session:
        return WebhookRead.of(_hook(session, tenant, id))


@router.patch(
    "/{id}",
    operation_id="change_webhook",
    response_model=WebhookRead,
    openapi_extra=_body(WebhookChange),
)
async def change_webhook(request: Request, parts: TheParts, tenant: Tenant, id: str) -> WebhookRead:
    """Change a webhook, disable it, or enable it again."""
    text = await json_body(request)
    return await run_in_threadpool(_change, parts, tenant, id, text)


def _change(parts: Parts, tenant: str, id_: str, text: str) -> WebhookRead:
    with parts.database.read() as session:
        _hook(session, tenant, id_)
    asked = from_json(WebhookChange, text, {})
    if asked.url is not None:
        webhooks.check_url(parts.settings, asked.url)
    with parts.database.write() as session:
        row = _hook(session, tenant, id_)
        for name in ("url", "description"):
            if (value := getattr(asked, name)) is not None:
                setattr(row, name, value)
        if asked.events is not None:
            row.events = list(dict.fromkeys(asked.events))
        if asked.enabled is not None:
            webhooks.enable(row, asked.enabled)
        return WebhookRead.of(row)


@router.delete("/{id}", operation_id="delete_webhook", status_code=204)
def delete_webhook(parts: TheParts, tenant: Tenant, id: str) -> None:
    """Delete a webhook, its deliveries, and what waits to be sent."""
    with parts.database.write() as session:
        webhooks.delete(session, _hook(session, tenant, id))


@router.post("/{id}/rotate-secret", operation_id="rotate_webhook_secret")
def rotate_webhook_secret(parts: TheParts, tenant: Tenant, id: str) -> WebhookSecret:
    """A new secret. For a day messages are signed with the old one as well."""
    with parts.database.write() as session:
        row = _hook(session, tenant, id)
        webhooks.rotate(row)
        return WebhookSecret(**WebhookRead.of(row).model_dump(), secret=row.secret)


@router.post("/{id}/test", operation_id="test_webhook", status_code=202)
def test_webhook(parts: TheParts, tenant: Tenant, id: str) -> DeliveryRead:
    """Send a message of type `webhook.test`."""
    with creating(parts) as session:
        row = webhooks.ping(session, _hook(session, tenant, id))
        note(session, id)
        session.flush()
        return DeliveryRead.of(row)


@router.get("/{id}/deliveries", operation_id="list_deliveries")
def list_deliveries(
    parts: TheParts,
    tenant: Tenant,
    id: str,
    status: Annotated[DeliveryStatus | None, Query(description="Only these.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[DeliveryRead]:
    """What was sent, is to be sent, or could not be, newest first."""
    with parts.database.read() as session:
        statement = owned(DeliveryRow, tenant).where(
            DeliveryRow.webhook_id == _hook(session, tenant, id).id
        )
        if status is not None:
            statement = statement.where(DeliveryRow.status == status)
        rows, after = page(session, statement, DeliveryRow, limit, cursor)
        return Page(items=[DeliveryRead.of(row) for row in rows], next_cursor=after)


@router.get("/{id}/deliveries/{delivery}", operation_id="get_delivery")
def get_delivery(parts: TheParts, tenant: Tenant, id: str, delivery: str) -> DeliveryRead:
    with parts.database.read() as session:
        return DeliveryRead.of(_delivery(session, tenant, id, delivery))


@router.post("/{id}/deliveries/{delivery}/replay", operation_id="replay_delivery", status_code=202)
def replay_delivery(parts: TheParts, tenant: Tenant, id: str, delivery: str) -> DeliveryRead:
    """Send it again now, with the same id and body."""
    with creating(parts) as session:
        hook = _hook(session, tenant, id)
        row = _delivery(session, tenant, id, delivery)
        webhooks.replay(session, hook, row)
        note(session, id)
        session.flush()
        return DeliveryRead.of(row)
