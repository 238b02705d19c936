"""Deletes what is older than the operator wants it kept; all of it is off by default."""

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from app.config import Settings
from app.db import Database
from app.domain.jobs import ACTIVE, TERMINAL
from app.tables import ArtifactRow, DatasetRow, JobRow, ModelRow, PartialRow, now

# Rows of one transaction: other writers wait for it.
BATCH = 200


def expire(database: Database, settings: Settings) -> dict[str, int]:
    """Delete what is too old; returns how many of what."""
    at = now()
    rules: dict[str, tuple[Callable[[Session, datetime], int], float | None]] = {
        "jobs": (_jobs, settings.job_retention_days),
        "artifacts": (_artifacts, settings.artifact_retention_days),
        "uploads": (_uploads, settings.upload_retention_days),
        "partial uploads": (_partial, 0.0),
    }
    removed: dict[str, int] = {}
    for name, (rule, days) in rules.items():
        if days is None:
            continue
        while True:
            with database.write() as session:
                count = rule(session, at - timedelta(days=days))
            removed[name] = removed.get(name, 0) + count
            if count < BATCH:
                break
    return {name: count for name, count in removed.items() if count}


def _jobs(session: Session, old: datetime) -> int:
    """Jobs that ended before, with all that they made."""
    ended = select(JobRow.id).where(JobRow.status.in_(TERMINAL), JobRow.finished_at < old)
    ids = session.scalars(ended.limit(BATCH)).all()
    session.execute(delete(JobRow).where(JobRow.id.in_(ids), JobRow.status.in_(TERMINAL)))
    return len(ids)


def _artifacts(session: Session, old: datetime) -> int:
    """Files of jobs that ended before; their figures stay."""
    ended = JobRow.status.in_(TERMINAL) & (JobRow.finished_at < old)
    wanted = select(ArtifactRow.id).join(JobRow, JobRow.id == ArtifactRow.job_id).where(ended)
    ids = session.scalars(wanted.limit(BATCH)).all()
    session.execute(delete(ArtifactRow).where(ArtifactRow.id.in_(ids)))
    return len(ids)


def _uploads(session: Session, old: datetime) -> int:
    """Models and datasets that came before, and that no job since then, or still at work, names."""
    recent = or_(JobRow.created_at >= old, JobRow.status.in_(ACTIVE))
    used: set[str] = set()
    for model_id, sources in session.execute(select(JobRow.model_id, JobRow.sources).where(recent)):
        used.update((model_id, *(source["id"] for source in sources.values())))
    count = 0
    for table in (ModelRow, DatasetRow):
        before = select(table.id).where(table.created_at < old, table.status != "inspecting")
        ids = [id_ for id_ in session.scalars(before) if id_ not in used][: BATCH - count]
        session.execute(delete(table).where(table.id.in_(ids)))
        count += len(ids)
    return count


def _partial(session: Session, at: datetime) -> int:
    """Resumable uploads that nobody went on with; their files go by age."""
    ids = session.scalars(
        select(PartialRow.id).where(PartialRow.expires_at < at).limit(BATCH)
    ).all()
    # Once more by time: somebody may go on with one just now.
    which = (PartialRow.id.in_(ids), PartialRow.expires_at < at)
    session.execute(delete(PartialRow).where(*which))
    return len(ids)
