"""Webhooks: deliveries are written with the event that they tell of, and sent by workers.

A delivery is a row and a task in the transaction of its event (a transactional outbox), so that no
event is told that did not happen, and none that did is forgotten. It is sent at least once, always
with the same `webhook-id`; the order is not kept. Signed as https://www.standardwebhooks.com says.
"""

import base64
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from sqlalchemy import delete as sql_delete
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app import __version__, outbound, queue
from app.config import Settings
from app.errors import ServiceError, invalid
from app.tables import DatasetRow, DeliveryRow, JobRow, ModelRow, WebhookRow, new_id, now

Event = Literal[
    "job.started",
    "job.finished",
    "model.ready",
    "model.invalid",
    "dataset.ready",
    "dataset.invalid",
]
EVENTS: tuple[str, ...] = get_args(Event)
TEST = "webhook.test"
MOST_WEBHOOKS = 20
OLD_SECRET_KEPT = timedelta(days=1)
# Each pause between attempts is longer or shorter by at most this share, so that what failed
# together does not come again together.
JITTER = 0.2
GONE = 410


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt: an answer, or else an error."""

    latency_ms: float
    answer: outbound.Answer | None = None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        return self.answer is not None and 200 <= self.answer.status < 300

    def told(self) -> str:
        if self.answer is None:
            return self.error or "no answer"
        redirect = " (redirects are not followed)" if 300 <= self.answer.status < 400 else ""
        return f"answered {self.answer.status}{redirect}"


def check_url(settings: Settings, url: str) -> None:
    """ServiceError 422 `webhook_url_not_allowed` where deliveries to it would be refused."""
    try:
        outbound.addresses_of(url, outbound.networks(settings.webhook_allowed_networks))
    except outbound.NotAllowed as error:
        raise invalid(
            "webhook_url_not_allowed",
            "url",
            str(error),
            "Name a public https:// address; the operator allows others by"
            " LITESMITH_WEBHOOK_ALLOWED_NETWORKS.",
        ) from None


def new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def create(
    session: Session, tenant_id: str, url: str, events: Sequence[str], description: str
) -> WebhookRow:
    """A new webhook, with its secret. ServiceError 409 where there are too many."""
    mine = select(func.count()).where(WebhookRow.tenant_id == tenant_id)
    if (session.scalar(mine) or 0) >= MOST_WEBHOOKS:
        raise ServiceError(
            409, "too_many_webhooks", f"There are {MOST_WEBHOOKS} webhooks already.", "Delete one."
        )
    row = WebhookRow(
        id=new_id("whk"),
        tenant_id=tenant_id,
        created_at=now(),
        url=url,
        description=description,
        events=list(events),
        secret=new_secret(),
        enabled=True,
    )
    session.add(row)
    return row


def rotate(row: WebhookRow) -> None:
    """A new secret; the old one signs beside it for a day."""
    row.old_secret, row.old_secret_until = row.secret, now() + OLD_SECRET_KEPT
    row.secret = new_secret()


def enable(row: WebhookRow, enabled: bool) -> None:
    row.enabled = enabled
    row.disabled_reason = None if enabled else "Disabled by request."
    row.failing_since = None


def delete(session: Session, row: WebhookRow) -> None:
    """Delete a webhook, its deliveries and what waits to be sent."""
    pending = select(DeliveryRow.id).where(
        DeliveryRow.webhook_id == row.id, DeliveryRow.status == "pending"
    )
    # First: whoever sends one holds its task, and would wait for the rows that go with this one.
    queue.drop(session, "deliver", session.scalars(pending))
    session.execute(sql_delete(DeliveryRow).where(DeliveryRow.webhook_id == row.id))
    session.delete(row)


def emit(session: Session, tenant_id: str, event: Event, data: dict[str, Any]) -> None:
    """Tell the tenant's webhooks of an event, once the transaction has committed."""
    hooks = session.scalars(
        select(WebhookRow)
        .where(WebhookRow.tenant_id == tenant_id, WebhookRow.enabled)
        # So that none is deleted before the delivery that refers to it is there.
        .with_for_update(read=True, key_share=True)
    )
    for hook in hooks:
        if event in hook.events:
            send(session, hook, event, data)


def send(session: Session, hook: WebhookRow, event: str, data: dict[str, Any]) -> DeliveryRow:
    """Write a delivery, and the task that sends it."""
    at = now()
    body = {"type": event, "timestamp": at.isoformat().replace("+00:00", "Z"), "data": data}
    row = DeliveryRow(
        id=new_id("dlv"),
        tenant_id=hook.tenant_id,
        created_at=at,
        webhook_id=hook.id,
        event=event,
        body=json.dumps(body, separators=(",", ":"), ensure_ascii=False),
        status="pending",
        attempts=0,
        tries=0,
        next_attempt_at=at,
    )
    session.add(row)
    _enqueue(session, row)
    return row


def _enqueue(session: Session, row: DeliveryRow) -> None:
    queue.enqueue(session, "deliver", row.id, "webhooks", tenant_id=row.tenant_id)


def replay(session: Session, hook: WebhookRow, row: DeliveryRow) -> None:
    """Send a delivery again, now, with the same id and body. ServiceError 409 where the webhook is
    disabled."""
    _require_enabled(hook)
    # An attempt that ends meanwhile has its say first.
    session.refresh(row, with_for_update=True)
    if row.status == "pending":
        queue.wake(session, "deliver", [row.id])
    else:
        _enqueue(session, row)
    row.status, row.tries, row.next_attempt_at = "pending", 0, now()


def ping(session: Session, hook: WebhookRow) -> DeliveryRow:
    """Send a message that tells of nothing. ServiceError 409 where the webhook is disabled."""
    _require_enabled(hook)
    return send(session, hook, TEST, {"webhook": hook.id})


def _require_enabled(hook: WebhookRow) -> None:
    if not hook.enabled:
        raise ServiceError(
            409,
            "webhook_disabled",
            f"Webhook '{hook.id}' is disabled: {hook.disabled_reason}",
            'Enable it first: PATCH it with {"enabled": true}.',
        )


def job_event(session: Session, job: JobRow, event: Event, variants: Sequence[Any]) -> None:
    """Tell of a job: ids and outcomes; the rest is asked for with a key."""
    moments = {
        name: value.isoformat().replace("+00:00", "Z") if (value := getattr(job, name)) else None
        for name in ("created_at", "started_at", "finished_at")
    }
    data = {
        "id": job.id,
        "status": str(job.status),
        "model": job.model_id,
        "verdict": (job.verdict or {}).get("verdict"),
        "variants": [
            {"id": row.id, "name": row.name, "status": str(row.status)} for row in variants
        ],
        **moments,
    }
    emit(session, job.tenant_id, event, data)


def upload_event(session: Session, row: ModelRow | DatasetRow) -> None:
    """Tell that a model or dataset was inspected."""
    ready = row.status == "ready"
    data = {name: getattr(row, name) for name in ("id", "name", "format", "status", "error")}
    if isinstance(row, ModelRow):
        emit(session, row.tenant_id, "model.ready" if ready else "model.invalid", data)
    else:
        emit(session, row.tenant_id, "dataset.ready" if ready else "dataset.invalid", data)


def headers_of(hook: WebhookRow, row: DeliveryRow, at: datetime) -> dict[str, str]:
    """The headers of one attempt, signed with every secret that holds at `at`."""
    keys = [hook.secret]
    if hook.old_secret and hook.old_secret_until and hook.old_secret_until > at:
        keys.append(hook.old_secret)
    return {
        "Content-Type": "application/json",
        "User-Agent": f"Litesmith/{__version__}",
        "webhook-id": row.id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Webhook(key).sign(row.id, at, row.body) for key in keys),
    }


def attempted(
    session: Session,
    row: DeliveryRow,
    hook: WebhookRow,
    outcome: Outcome,
    schedule: Sequence[float],
) -> float | None:
    """Write down an attempt; returns the seconds until the next one, None where there is none."""
    at = now()
    row.attempts += 1
    row.tries += 1
    row.last_attempt_at, row.latency_ms = at, outcome.latency_ms
    row.response_status = outcome.answer.status if outcome.answer else None
    # NUL is no character that PostgreSQL keeps.
    row.response_excerpt = outcome.answer.excerpt.replace("\0", "�") if outcome.answer else None
    row.error = None if outcome.delivered else outcome.told()
    row.next_attempt_at = None
    if outcome.delivered:
        row.status, row.delivered_at = "delivered", at
        hook.failing_since = None
        return None
    hook.failing_since = hook.failing_since or at
    gone = row.response_status == GONE
    if row.tries <= len(schedule) and not gone:
        seconds = schedule[row.tries - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        row.next_attempt_at = at + timedelta(seconds=seconds)
        return seconds
    row.status = "failed"
    failing_s = (at - hook.failing_since).total_seconds()
    if gone or failing_s >= (1 - JITTER) * sum(schedule):
        hook.enabled = False
        since = f"{hook.failing_since:%Y-%m-%d %H:%M} UTC"
        hook.disabled_reason = (
            "The receiver answered 410 (gone)."
            if gone
            else f"No delivery has succeeded since {since}; last: {row.error}."
        )
    return None


def abandon(row: DeliveryRow, why: str) -> None:
    """Nothing more is sent, unless it is replayed."""
    row.status, row.error, row.next_attempt_at = "failed", why, None
