"""Whose task comes next: fair between tenants, by priority within a tenant, and nothing starves.

Between tenants, the one with the fewest tasks running in the queue goes first, and among those the
one that was served longest ago: with a single slot they take turns, whatever their numbers of
tasks. Priority orders a tenant's own tasks only, so that nobody gains by calling everything urgent.
Within a tenant a point of priority is worth AGING_S seconds of waiting: what waits rises, and a
low task comes before every normal one that became due 10 * AGING_S seconds after it.
"""

from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, Integer, func, literal, select, union_all, update
from sqlalchemy.orm import Session

from app.db import insert
from app.tables import TaskRow, TurnRow

AGING_S = 60
# The priorities that tasks have; the index of what is due is searched once for each.
PRIORITIES = (100, 10, 0, -10)


def in_turn(session: Session, queue: str, at: datetime) -> list[tuple[str, int]]:
    """(tenant, priority) of what is due at `at`, in the order in which it should be served."""
    running = dict(session.execute(_running(queue)).all())
    served = {row.tenant_id: row.served_at for row in session.scalars(_turns(queue))}

    def place(row: Any) -> tuple[int, float, str, datetime]:
        last = served.get(row.tenant_id)
        return (
            running.get(row.tenant_id, 0),
            last.timestamp() if last else 0.0,
            row.tenant_id,
            row.since - timedelta(seconds=AGING_S * row.priority),
        )

    due = [row for row in session.execute(_oldest(queue)) if row.since and row.since <= at]
    return [(row.tenant_id, row.priority) for row in sorted(due, key=place)]


def _running(queue: str) -> Any:
    held = (TaskRow.queue == queue, TaskRow.status == "running")
    return (
        select(TaskRow.tenant_id, func.count().label("running"))
        .where(*held)
        .group_by(TaskRow.tenant_id)
    )


def _turns(queue: str) -> Any:
    return select(TurnRow).where(TurnRow.queue == queue)


def _oldest(queue: str) -> Any:
    """For each waiting tenant and priority, since when its oldest task is due. Walks from tenant to
    tenant in the index instead of reading every waiting task ("loose index scan")."""
    waiting = (TaskRow.queue == queue, TaskRow.status == "queued")
    first = select(func.min(TaskRow.tenant_id).label("tenant_id")).where(*waiting)
    tenants = first.cte("tenants", recursive=True)
    following = select(func.min(TaskRow.tenant_id)).where(
        *waiting, TaskRow.tenant_id > tenants.c.tenant_id
    )
    tenants = tenants.union_all(
        select(following.correlate(tenants).scalar_subquery()).where(
            tenants.c.tenant_id.is_not(None)
        )
    )
    levels = union_all(
        *(select(literal(level, Integer).label("priority")) for level in PRIORITIES)
    ).subquery("levels")
    since = (
        select(func.min(TaskRow.available_at))
        .where(
            *waiting,
            TaskRow.tenant_id == tenants.c.tenant_id,
            TaskRow.priority == levels.c.priority,
        )
        .correlate(tenants, levels)
        .scalar_subquery()
    )
    return (
        select(tenants.c.tenant_id, levels.c.priority, since.label("since"))
        .select_from(tenants.join(levels, literal(True)))
        .where(tenants.c.tenant_id.is_not(None))
    )


def served(session: Session, queue: str, tenant_id: str, at: datetime) -> None:
    """The tenant has had its turn."""
    which = (TurnRow.queue == queue, TurnRow.tenant_id == tenant_id)
    result = session.execute(update(TurnRow).where(*which).values(served_at=at))
    if cast(CursorResult[Any], result).rowcount == 0:
        row = {"queue": queue, "tenant_id": tenant_id, "served_at": at}
        session.execute(insert(session, TurnRow).values(**row).on_conflict_do_nothing())


def before(session: Session, task: TaskRow) -> int:
    """About how many tasks of the queue run or come before this one: all that run, the tenant's
    own that are more urgent, and of every other tenant as many as turns pass until then."""
    # The queue is shared: numbers of others, of whom nothing more is told.
    shared = {"all_tenants": True}
    found = session.execute(_running(task.queue), execution_options=shared)
    running = sum(int(count) for _, count in found)
    waiting = (TaskRow.queue == task.queue, TaskRow.status == "queued")
    own = (*waiting, TaskRow.tenant_id == task.tenant_id)
    same = TaskRow.priority == task.priority
    sooner = (TaskRow.priority > task.priority, same & (TaskRow.available_at < task.available_at))
    # Two counts, each of one stretch of the index.
    ahead = sum(session.scalar(select(func.count()).where(*own, one)) or 0 for one in sooner)
    others = (
        select(func.count())
        .where(*waiting, TaskRow.tenant_id != task.tenant_id)
        .group_by(TaskRow.tenant_id)
    )
    return (
        running
        + ahead
        + sum(min(count, ahead + 1) for count in session.scalars(others, execution_options=shared))
    )
