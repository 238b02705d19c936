"""The task `deliver`: one attempt to send a webhook's message."""

import asyncio
import time

import httpx

from app import outbound, queue
from app.services import webhooks
from app.services.webhooks import Outcome
from app.tables import DeliveryRow, WebhookRow, now
from workers.common import drop
from workers.lease import Lease
from workers.runner import Stopped
from workers.worker import Worker

STOPPING_S = 0.2


def deliver(worker: Worker, lease: Lease) -> None:
    """Send it once; what fails is due again as the schedule says."""
    claim, settings = lease.claim, worker.settings
    with worker.database.read() as session:
        row = session.get(DeliveryRow, claim.subject_id)
        hook = session.get(WebhookRow, row.webhook_id) if row is not None else None
    if row is None or hook is None:
        drop(worker, claim)
        return
    outcome = None
    if hook.enabled:
        outcome = asyncio.run(_send(worker, lease, hook, row))
    with worker.writing() as session:
        # First the task: who deletes the webhook takes its tasks before its rows.
        queue.renew(session, claim, settings.lease_s)
        row = session.get_one(DeliveryRow, row.id)
        hook = session.get_one(WebhookRow, hook.id)
        seconds = None
        if outcome is None:
            webhooks.abandon(row, "the webhook is disabled")
        else:
            seconds = webhooks.attempted(session, row, hook, outcome, settings.webhook_retry_s)
        if seconds is None:
            queue.finish(session, claim)
        else:
            queue.postpone(session, claim, seconds)


async def _send(worker: Worker, lease: Lease, hook: WebhookRow, row: DeliveryRow) -> Outcome:
    """One attempt; raises Stopped where the worker stops meanwhile."""
    settings, started = worker.settings, time.perf_counter()
    sending = asyncio.create_task(
        outbound.post(
            hook.url,
            webhooks.headers_of(hook, row, now()),
            row.body,
            outbound.networks(settings.webhook_allowed_networks),
            settings.webhook_timeout_s,
        )
    )
    while not (await asyncio.wait({sending}, timeout=STOPPING_S))[0]:
        if lease.should_stop():
            sending.cancel()
            raise Stopped
    latency_ms = round((time.perf_counter() - started) * 1000, 1)
    try:
        return Outcome(latency_ms, answer=sending.result())
    except outbound.NotAllowed as error:
        return Outcome(latency_ms, error=f"not sent: {error}")
    except TimeoutError:
        return Outcome(latency_ms, error=f"no answer within {settings.webhook_timeout_s:g} s")
    except httpx.HTTPError as error:
        return Outcome(latency_ms, error=f"{type(error).__name__}: {error}"[:500])
