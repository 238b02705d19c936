"""The queue: tasks in the database are the truth, a broker message is only a doorbell.

A message says "something is due in this queue". Whoever hears it claims the most urgent due task
by compare-and-swap and holds it by a lease. `attempt` is the fencing token: every later write of
the run is guarded by it, so that a run which lost its lease can change nothing. What no message
announces is found by the reconciler (app.reconciler).
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from celery import Celery
from sqlalchemy import CursorResult, Select, delete, event, func, select, update
from sqlalchemy.orm import Session

from app import turns
from app.tables import TaskRow, new_id, now

log = logging.getLogger(__name__)

WORK = "litesmith.work"
QUEUES = ("inspect", "fast", "train", "webhooks")
# What is due later than this, the reconciler rings for.
LONGEST_TIMER_S = 60
LONGEST_BACKOFF_S = 60


class LeaseLost(Exception):
    """The task was given to another run, cancelled or deleted: this run may write nothing more."""


@dataclass(frozen=True)
class Claim:
    """A task held by this process until `lease` ends or is renewed."""

    task_id: str
    attempt: int
    kind: str
    subject_id: str
    tenant_id: str
    queue: str
    request_id: str | None
    lost: int


class Doorbell:
    """Publishes "something is due" without ever failing or delaying the request that made it due:
    the reconciler rings again for what was not heard."""

    def __init__(self, broker_url: str) -> None:
        self.celery = Celery("litesmith", broker=broker_url)
        self.celery.conf.update(
            broker_transport_options={
                "socket_connect_timeout": 2,
                "socket_timeout": 2,
                # Once more at once, for a connection that the broker has closed; then never mind.
                "max_retries": 1,
                "interval_start": 0,
                "interval_step": 0,
                "interval_max": 0,
            },
            broker_connection_timeout=2,
        )

    def ring(self, queues: Iterable[str]) -> None:
        for queue in sorted(set(queues)):
            try:
                self.celery.send_task(
                    WORK, args=[queue], queue=queue, retry=False, ignore_result=True
                )
            except Exception as error:
                # Any broker client error: the task itself is safe in the database.
                log.warning("doorbell not heard", extra={"queue": queue, "error": str(error)})

    def ring_after_commit(self, session: Session) -> None:
        """Ring for what `session` enqueues, once its transaction has committed."""

        @event.listens_for(session, "after_commit")
        def ring(committed: Session) -> None:
            self.ring(committed.info.pop("due", set()))
            for queue, seconds in committed.info.pop("due_later", {}).items():
                timer = threading.Timer(seconds, self.ring, [[queue]])
                timer.daemon = True
                timer.start()

    def check(self) -> None:
        """Raises where the broker does not answer."""
        with self.celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)


def enqueue(
    session: Session,
    kind: str,
    subject_id: str,
    queue: str,
    *,
    tenant_id: str,
    priority: int = 0,
    request_id: str | None = None,
) -> None:
    """Add a task to the transaction; its queue is rung once that has committed."""
    session.add(
        TaskRow(
            id=new_id("tsk"),
            tenant_id=tenant_id,
            kind=kind,
            subject_id=subject_id,
            queue=queue,
            priority=priority,
            request_id=request_id,
        )
    )
    due(session, queue)


def due(session: Session, queue: str) -> None:
    session.info.setdefault("due", set()).add(queue)


def claim(session: Session, queue: str, worker: str, lease_s: float) -> Claim | None:
    """Take the due task whose turn it is (app.turns), or None. Commit before running it."""
    at = now()
    for tenant_id, priority in turns.in_turn(session, queue, at):
        row = _take(session, queue, tenant_id, priority, at, worker, lease_s)
        # None where another worker was faster.
        if row is not None:
            turns.served(session, queue, tenant_id, at)
            return Claim(
                row.id,
                row.attempt,
                row.kind,
                row.subject_id,
                row.tenant_id,
                queue,
                row.request_id,
                row.lost,
            )
    return None


def _take(
    session: Session,
    queue: str,
    tenant_id: str,
    priority: int,
    at: datetime,
    worker: str,
    lease_s: float,
) -> TaskRow | None:
    """The tenant's oldest due task of that priority, now running."""
    candidate = (
        select(TaskRow.id)
        .where(
            TaskRow.queue == queue,
            TaskRow.status == "queued",
            TaskRow.tenant_id == tenant_id,
            TaskRow.priority == priority,
            TaskRow.available_at <= at,
        )
        .order_by(TaskRow.available_at, TaskRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return session.execute(
        update(TaskRow)
        .where(TaskRow.id == candidate, TaskRow.status == "queued")
        .values(
            status="running",
            attempt=TaskRow.attempt + 1,
            lease_until=at + timedelta(seconds=lease_s),
            worker=worker,
        )
        .returning(TaskRow)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()


def backoff(lost: int) -> float:
    """Seconds until a task that has lost so many attempts is due again."""
    return float(min(2**lost, LONGEST_BACKOFF_S))


def _held(claim: Claim) -> list[Any]:
    return [
        TaskRow.id == claim.task_id,
        TaskRow.attempt == claim.attempt,
        TaskRow.status == "running",
    ]


def _changed(session: Session, statement: Any) -> None:
    result = cast(CursorResult[Any], session.execute(statement))
    if result.rowcount != 1:
        raise LeaseLost


def renew(session: Session, claim: Claim, lease_s: float) -> None:
    """Extend the lease; also the guard to put first in any transaction that writes for a run.
    Raises LeaseLost."""
    until = now() + timedelta(seconds=lease_s)
    _changed(session, update(TaskRow).where(*_held(claim)).values(lease_until=until))


def finish(session: Session, claim: Claim) -> None:
    """End the task, in the transaction that writes its result. Raises LeaseLost."""
    _changed(session, delete(TaskRow).where(*_held(claim)))


def postpone(session: Session, claim: Claim, seconds: float, *, failed: bool = False) -> None:
    """Give the task back, due again after `seconds`; `failed` counts as a lost attempt.
    Raises LeaseLost."""
    values = {
        "status": "queued",
        "available_at": now() + timedelta(seconds=seconds),
        "lease_until": None,
        "worker": None,
        "lost": TaskRow.lost + int(failed),
    }
    _changed(session, update(TaskRow).where(*_held(claim)).values(**values))
    if seconds == 0:
        due(session, claim.queue)
    elif seconds <= LONGEST_TIMER_S:
        session.info.setdefault("due_later", {})[claim.queue] = seconds


def drop(session: Session, kind: str, subject_ids: Iterable[str]) -> None:
    """Delete tasks, waiting or running: a run whose task is gone has lost its lease, so that it
    stops within a heartbeat and can write nothing more."""
    session.execute(
        delete(TaskRow).where(TaskRow.kind == kind, TaskRow.subject_id.in_(list(subject_ids)))
    )


def wake(session: Session, kind: str, subject_ids: Select[str] | Sequence[str]) -> None:
    """Make postponed tasks due now."""
    _wake(session, TaskRow.kind == kind, TaskRow.subject_id.in_(subject_ids))


def wake_busy(session: Session, tenant_id: str) -> None:
    """Make due what was postponed because another task made what it needs."""
    _wake(
        session,
        TaskRow.tenant_id == tenant_id,
        TaskRow.queue.in_(("fast", "train")),
        TaskRow.kind.in_(("prepare", "variant")),
        TaskRow.available_at > now(),
        TaskRow.lost == 0,
    )


def _wake(session: Session, *which: Any) -> None:
    found = select(TaskRow.id).where(*which, TaskRow.status == "queued")
    rows = session.execute(
        update(TaskRow)
        # Who else has one of them locked claims or ends it: no reason to wait.
        .where(TaskRow.id.in_(found.with_for_update(skip_locked=True)))
        # Since when it waits: it keeps its place.
        .values(available_at=TaskRow.created_at)
        .returning(TaskRow.queue)
        .execution_options(synchronize_session=False)
    ).scalars()
    for queue in rows:
        due(session, queue)


def expired(session: Session) -> list[TaskRow]:
    """Tasks whose runs let their lease end."""
    return list(
        session.scalars(
            select(TaskRow).where(
                TaskRow.queue.in_(QUEUES),
                TaskRow.status == "running",
                TaskRow.lease_until < now(),
            )
        )
    )


def take_back(session: Session, row: TaskRow, seconds: float | None) -> bool:
    """End the lease of an `expired` task: due again after `seconds`, or never (None). False where
    its run came back meanwhile, or another reconciler was first."""
    held = (
        TaskRow.id == row.id,
        TaskRow.attempt == row.attempt,
        TaskRow.status == "running",
        TaskRow.lease_until < now(),
    )
    again = {"status": "queued", "lease_until": None, "worker": None, "lost": row.lost + 1}
    statement: Any = delete(TaskRow).where(*held)
    if seconds is not None:
        due_at = now() + timedelta(seconds=seconds)
        statement = update(TaskRow).where(*held).values(**again, available_at=due_at)
    result = cast(CursorResult[Any], session.execute(statement))
    return result.rowcount == 1


def is_running(session: Session, task_id: str | None, attempt: int | None) -> bool:
    """Whether that run of the task still holds its lease."""
    return (
        session.scalar(
            select(func.count())
            .select_from(TaskRow)
            .where(
                TaskRow.id == task_id,
                TaskRow.attempt == attempt,
                TaskRow.status == "running",
                TaskRow.lease_until > now(),
            )
        )
        == 1
    )


def waiting_queues(session: Session) -> list[str]:
    """Queues in which something is due now."""
    at = now()
    return [
        queue
        for queue in QUEUES
        if session.scalar(
            select(TaskRow.id)
            .where(TaskRow.queue == queue, TaskRow.status == "queued", TaskRow.available_at <= at)
            .limit(1)
        )
    ]
