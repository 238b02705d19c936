"""Of the service itself: /healthz, /readyz, /metrics"""

import asyncio
import logging
from collections.abc import Callable

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from sqlalchemy import text

from app.api.deps import Parts, TheParts
from app.db import newest_schema, schema_of
from app.masking import mask
from app.metrics import render
from app.queue import QUEUES
from app.services.workers import workers_seen

log = logging.getLogger(__name__)
router = APIRouter(tags=["service"])

# What a worker says of a layer of its sandbox that holds.
ACTIVE = "active"
ANSWER_S = 5.0
# Threads of their own: parts that hang take none of those that answer requests.
PROBES = CapacityLimiter(20)


class Health(BaseModel):
    status: str


class Readiness(BaseModel):
    """`checks`: "ok", or what is wrong with that part. `sandbox`: for each layer around the
    processes that open users' files "active", or what the least protected worker lacks."""

    status: str
    checks: dict[str, str]
    sandbox: dict[str, str] = {}


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", operation_id="get_health")
def get_health() -> Health:
    """The process answers."""
    return Health(status="ok")


def _check_database(parts: Parts) -> None:
    with parts.database.read() as session:
        session.execute(text("SELECT 1"))


def _check_schema(parts: Parts) -> None:
    at, newest = schema_of(parts.database), newest_schema()
    if at != newest:
        raise RuntimeError(
            f"the database is at revision {at}, this version needs {newest}: run litesmith migrate"
        )


def _check_worker(parts: Parts) -> None:
    with parts.database.read() as session:
        served = {name for worker in workers_seen(session) for name in worker.queues}
    if deserted := [name for name in QUEUES if name not in served]:
        raise RuntimeError(f"no worker was heard of lately for: {', '.join(deserted)}")


def _sandbox(parts: Parts) -> dict[str, str]:
    """Layer -> "active" where it is so for every worker, else what one of them lacks."""
    found: dict[str, str] = {}
    with parts.database.read() as session:
        workers = workers_seen(session)
    for worker in workers:
        for layer, told in worker.details.get("sandbox", {}).items():
            if found.get(layer, ACTIVE) == ACTIVE:
                found[layer] = told
    return found


CHECKS: dict[str, Callable[[Parts], None]] = {
    "database": _check_database,
    "schema": _check_schema,
    "broker": lambda parts: parts.doorbell.check(),
    "storage": lambda parts: parts.storage.check(),
    "worker": _check_worker,
}


def _outcome(name: str, parts: Parts) -> str:
    try:
        CHECKS[name](parts)
    except Exception as error:
        # Whatever a part fails with is the answer here.
        told = mask(f"{type(error).__name__}: {error}"[:300])
        if not parts.settings.asks_for_keys:
            return told
        log.warning("not ready", extra={"part": name, "error": told})
        return "failed: see the log"
    return "ok"


async def _told(name: str, parts: Parts) -> str:
    """What is wrong with the part, or "ok". A part that hangs is one that does not answer."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await to_thread.run_sync(
                _outcome, name, parts, abandon_on_cancel=True, limiter=PROBES
            )
    except TimeoutError:
        return f"no answer within {ANSWER_S:g} s"


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    operation_id="get_readiness",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "A part is missing"}},
)
async def get_readiness(parts: TheParts) -> Response:
    """Whether the service can do its work, and if not, which part is missing. Open to all, so that
    a service that asks for keys tells the cause in its log alone."""
    told = await asyncio.gather(*(_told(name, parts) for name in CHECKS))
    checks = dict(zip(CHECKS, told, strict=True))
    ready = all(value == "ok" for value in checks.values())
    # Workers are known by their rows.
    sandbox = await to_thread.run_sync(_sandbox, parts) if checks["database"] == "ok" else {}
    status = "ready" if ready else "not_ready"
    body = Readiness(status=status, checks=checks, sandbox=sandbox)
    return Response(body.model_dump_json(), 200 if ready else 503, media_type="application/json")


@router.get(
    "/metrics",
    operation_id="get_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics(parts: TheParts) -> Response:
    """Prometheus metrics of this process and of the queue."""
    with parts.database.read() as session:
        return Response(render(session), media_type=CONTENT_TYPE_LATEST)
