"""The reconciler: finds what the broker forgot and what dead workers hold, and old leftovers.

Safe to run in several processes at once: all it does is compare-and-swap.
"""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app import queue
from app.config import Settings
from app.db import Database
from app.domain.problems import Problem
from app.queue import Doorbell
from app.services import garbage, retention, tasks
from app.storage import Storage, open_storage
from app.tables import (
    AnalysisRow,
    AuditRow,
    DeliveryRow,
    EventRow,
    IdempotencyRow,
    JobRow,
    StepRow,
    WorkerRow,
    now,
)

log = logging.getLogger(__name__)

CLEAN_EVERY_S = 600


def reconcile(database: Database, max_attempts: int, *, lenient: bool = False) -> list[str]:
    """Give tasks of expired leases back, or up; returns the queues in which something is due.
    `lenient` leaves expired leases alone."""
    with database.read() as session:
        expired = [] if lenient else queue.expired(session)
    for row in expired:
        lost = row.lost + 1
        log.warning(
            "lease expired", extra={"task": row.kind, "subject_id": row.subject_id, "lost": lost}
        )
        # A transaction each: to hold one task's row while waiting for another's job may deadlock.
        with database.write() as session:
            if lost < max_attempts:
                queue.take_back(session, row, queue.backoff(lost))
                continue
            tasks.lock_job(session, row.kind, row.subject_id)
            if queue.take_back(session, row, None):
                tasks.give_up(session, row.kind, row.subject_id, attempts_exhausted(lost))
    with database.read() as session:
        return queue.waiting_queues(session)


def attempts_exhausted(lost: int) -> Problem:
    return Problem(
        code="attempts_exhausted",
        message=f"The worker died {lost} times while it was at this.",
        hint="Retry the job; if it happens again, the file may crash the worker: report it.",
    )


def clean(session: Session, settings: Settings) -> None:
    """Forget old events of ended jobs, old results kept for reuse, old idempotency keys, old lines
    of the audit log and workers long silent."""
    at = now()
    old = at - timedelta(days=settings.event_retention_days)
    ended = select(JobRow.id).where(JobRow.finished_at < old)
    session.execute(delete(EventRow).where(EventRow.job_id.in_(ended)))
    session.execute(
        delete(IdempotencyRow).where(IdempotencyRow.created_at < at - timedelta(days=1))
    )
    sent = (DeliveryRow.status != "pending", DeliveryRow.created_at < old)
    session.execute(delete(DeliveryRow).where(*sent))
    unused = at - timedelta(days=settings.cache_retention_days)
    session.execute(delete(StepRow).where(StepRow.created_at < unused))
    made = AnalysisRow.status != "analyzing"
    session.execute(delete(AnalysisRow).where(made, AnalysisRow.used_at < unused))
    kept = at - timedelta(days=settings.audit_retention_days)
    session.execute(delete(AuditRow).where(AuditRow.created_at < kept))
    session.execute(delete(WorkerRow).where(WorkerRow.seen_at < at - timedelta(hours=1)))


def run(settings: Settings, stopping: Callable[[], bool]) -> None:
    """Reconcile every `reconcile_s` and clean up now and then, until `stopping()`."""
    database, storage = Database(settings.database), open_storage(settings)
    doorbell = Doorbell(settings.broker)
    cleaned = time.monotonic()
    lenient_until = 0.0
    while not stopping():
        try:
            _tick(settings, database, doorbell, lenient=time.monotonic() < lenient_until)
            if time.monotonic() - cleaned > CLEAN_EVERY_S:
                cleaned = time.monotonic()
                _clean(settings, database, storage)
        except Exception:
            # The database may be away for a while: that ends no process that only looks at it.
            log.exception("reconciling failed; trying again")
            # Nor does it end a worker: who could not renew a lease meanwhile has the time to.
            lenient_until = time.monotonic() + settings.lease_s
        _pause(settings.reconcile_s, stopping)
    database.close()


def _pause(seconds: float, stopping: Callable[[], bool]) -> None:
    """Sleep, in steps: a signal sets `stopping` but ends no sleep."""
    until = time.monotonic() + seconds
    while not stopping() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _tick(settings: Settings, database: Database, doorbell: Doorbell, *, lenient: bool) -> None:
    doorbell.ring(reconcile(database, settings.max_attempts, lenient=lenient))


def _clean(settings: Settings, database: Database, storage: Storage) -> None:
    with database.write() as session:
        clean(session, settings)
    expired = retention.expire(database, settings)
    storage.sweep()
    removed = garbage.collect(database, storage)
    if removed or expired:
        size = sum(found.size_bytes for found in removed)
        told = {"objects": len(removed), "bytes": size, "expired": expired}
        log.info("removed what nothing refers to", extra=told)
