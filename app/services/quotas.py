"""What a tenant may use, what it uses, and when the service has enough to do.

A quota is a limit of one tenant; the queue's limit is back-pressure: whoever is refused by it may
try again in a while. Where no limit is set nothing is counted.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import func, select, union, update
from sqlalchemy.orm import Session

from app.config import Settings
from app.db import insert
from app.domain.jobs import ACTIVE, TERMINAL, Status
from app.errors import ServiceError
from app.tables import ArtifactRow, DatasetRow, JobRow, ModelRow, PartialRow, QuotaRow, now

UNLIMITED = -1
LIMITS = ("max_storage_bytes", "max_concurrent_jobs", "max_jobs_per_day", "max_queued_jobs")
# The throughput that a Retry-After is estimated from.
RECENT = timedelta(minutes=10)
SHORTEST_S, LONGEST_S = 5, 3600


class Limits(BaseModel):
    """Limits of a tenant; null is none."""

    max_storage_bytes: int | None
    max_concurrent_jobs: int | None
    max_jobs_per_day: int | None
    max_queued_jobs: int | None


class Used(BaseModel):
    """What a tenant uses now. `storage_bytes`: models, datasets and artifacts, the same bytes
    once; `jobs_today` since midnight UTC."""

    storage_bytes: int
    concurrent_jobs: int
    jobs_today: int
    queued_jobs: int


class Usage(BaseModel):
    used: Used
    limits: Limits
    # When `jobs_today` is 0 again.
    day_ends_at: datetime


def limits_of(session: Session, settings: Settings, tenant_id: str) -> Limits:
    """The tenant's own limits, else those of the settings."""
    row = session.get(QuotaRow, tenant_id)
    own = {name: getattr(row, name) for name in LIMITS} if row else {}
    values = {}
    for name in LIMITS:
        value = own.get(name)
        value = getattr(settings, f"tenant_{name}") if value is None else value
        values[name] = None if value == UNLIMITED else value
    return Limits(**values)


def set_limits(session: Session, tenant_id: str, values: dict[str, int | None]) -> None:
    """Change limits of a tenant: None as the settings say, -1 none. Creates its row."""
    session.execute(_row(session, tenant_id))
    if values:
        session.execute(update(QuotaRow).where(QuotaRow.tenant_id == tenant_id).values(**values))


def _row(session: Session, tenant_id: str) -> Any:
    new = {"tenant_id": tenant_id, "day": "", "jobs_of_day": 0}
    return insert(session, QuotaRow).values(**new).on_conflict_do_nothing()


def usage(session: Session, settings: Settings, tenant_id: str) -> Usage:
    at = now()
    row = session.get(QuotaRow, tenant_id)
    used = Used(
        storage_bytes=storage_bytes(session, tenant_id),
        concurrent_jobs=_jobs(session, tenant_id, ACTIVE),
        jobs_today=row.jobs_of_day if row is not None and row.day == _day(at) else 0,
        queued_jobs=_jobs(session, tenant_id, {Status.queued}),
    )
    return Usage(
        used=used, limits=limits_of(session, settings, tenant_id), day_ends_at=_day_ends(at)
    )


def _day(at: datetime) -> str:
    return at.date().isoformat()


def _day_ends(at: datetime) -> datetime:
    return datetime.combine(at.date() + timedelta(days=1), datetime.min.time(), UTC)


def _jobs(session: Session, tenant_id: str | None, statuses: Any) -> int:
    statement = select(func.count()).where(JobRow.status.in_(statuses))
    if tenant_id is not None:
        statement = statement.where(JobRow.tenant_id == tenant_id)
    return session.scalar(statement, execution_options=_of(tenant_id)) or 0


def _of(tenant_id: str | None) -> dict[str, bool]:
    """Of no tenant in particular: a number of others' jobs, of which nothing more is told."""
    return {"all_tenants": tenant_id is None}


def storage_bytes(session: Session, tenant_id: str) -> int:
    """Bytes of the tenant's models, datasets and artifacts, the same content counted once, and of
    the uploads that are under way, as they were announced."""
    contents = union(
        *(
            select(table.sha256, table.size_bytes).where(table.tenant_id == tenant_id)
            for table in (ModelRow, DatasetRow, ArtifactRow)
        )
    ).subquery()
    coming = select(func.sum(PartialRow.length)).where(
        PartialRow.tenant_id == tenant_id, PartialRow.subject_id.is_(None)
    )
    kept = session.scalar(select(func.sum(contents.c.size_bytes))) or 0
    return int(kept) + int(session.scalar(coming) or 0)


def check_storage(
    session: Session, settings: Settings, tenant_id: str, more_bytes: int = 0, *, what: str
) -> None:
    """ServiceError 507 `quota_exceeded` where `more_bytes` would not fit, or nothing more does."""
    limit = limits_of(session, settings, tenant_id).max_storage_bytes
    if limit is None:
        return
    used = storage_bytes(session, tenant_id)
    if used + more_bytes > limit or used >= limit:
        raise ServiceError(
            507,
            "quota_exceeded",
            f"Storage: {used} of {limit} bytes are used, {what} does not fit.",
            "Delete models, datasets or jobs that are not needed, or ask the operator for more; "
            "GET /v1/usage shows the limits.",
        )


def admit_job(session: Session, settings: Settings, tenant_id: str, *, new: bool = True) -> None:
    """Count a job that is submitted (or, not `new`, retried) against the limits.

    ServiceError 503 `busy` where the whole service has enough to do, 429 `queue_full` where the
    tenant has, 429 or 507 `quota_exceeded`; to be called in the transaction that adds the job.
    Where a limit is set the tenant's row is locked first: two submissions count one another.
    """
    at = now()
    limits = limits_of(session, settings, tenant_id)
    if any(value is not None for value in limits.model_dump().values()):
        session.execute(_row(session, tenant_id))
        locked = select(QuotaRow).where(QuotaRow.tenant_id == tenant_id).with_for_update()
        row = session.scalars(locked.execution_options(populate_existing=True)).one()
        _check_jobs(session, limits, tenant_id, row.jobs_of_day if row.day == _day(at) else 0, new)
        check_storage(session, settings, tenant_id, what="what a job makes")
    _check_queue(session, settings)
    if new:
        _count(session, tenant_id, _day(at))


def _count(session: Session, tenant_id: str, day: str) -> None:
    session.execute(_row(session, tenant_id))
    mine = QuotaRow.tenant_id == tenant_id
    reset = update(QuotaRow).where(mine, QuotaRow.day != day).values(day=day, jobs_of_day=0)
    session.execute(reset)
    session.execute(update(QuotaRow).where(mine).values(jobs_of_day=QuotaRow.jobs_of_day + 1))


def _check_jobs(session: Session, limits: Limits, tenant_id: str, today: int, new: bool) -> None:
    more = "GET /v1/usage shows the limits; the operator can raise them."
    if new and limits.max_jobs_per_day is not None and today >= limits.max_jobs_per_day:
        seconds = (_day_ends(now()) - now()).total_seconds()
        raise _later(
            "quota_exceeded",
            f"Jobs of the day: {today} of {limits.max_jobs_per_day} are used.",
            f"Submit it after midnight UTC. {more}",
            seconds,
        )
    if limits.max_concurrent_jobs is not None:
        active = _jobs(session, tenant_id, ACTIVE)
        if active >= limits.max_concurrent_jobs:
            raise _later(
                "quota_exceeded",
                f"Concurrent jobs: {active} of {limits.max_concurrent_jobs} are queued or run.",
                f"Wait for one to end, or cancel one. {more}",
                _seconds_for(session, 1, tenant_id),
            )
    if limits.max_queued_jobs is not None:
        queued = _jobs(session, tenant_id, {Status.queued})
        if queued >= limits.max_queued_jobs:
            raise _later(
                "queue_full",
                f"{queued} jobs of yours wait already; at most {limits.max_queued_jobs} may.",
                f"Wait for some of them to start. {more}",
                _seconds_for(session, queued - limits.max_queued_jobs + 1, tenant_id),
            )


def _check_queue(session: Session, settings: Settings) -> None:
    limit = settings.max_queued_jobs
    queued = _jobs(session, None, {Status.queued})
    if queued >= limit:
        raise _later(
            "busy",
            f"The service has {queued} jobs waiting and takes no more for now.",
            "Try again later; the header Retry-After says when.",
            _seconds_for(session, queued - limit + 1, None),
            status=503,
        )


def _later(code: str, detail: str, hint: str, seconds: float, *, status: int = 429) -> ServiceError:
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return ServiceError(status, code, detail, hint, headers=headers)


def _seconds_for(session: Session, jobs: int, tenant_id: str | None) -> float:
    """How long until so many jobs have ended, judged by the last minutes."""
    statement = select(func.count()).where(
        JobRow.finished_at > now() - RECENT, JobRow.status.in_(TERMINAL)
    )
    if tenant_id is not None:
        statement = statement.where(JobRow.tenant_id == tenant_id)
    ended = session.scalar(statement, execution_options=_of(tenant_id)) or 0
    seconds = jobs * RECENT.total_seconds() / ended if ended else 60.0
    return min(max(seconds, SHORTEST_S), LONGEST_S)
