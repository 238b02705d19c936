"""The workers that were heard of lately, and what they have."""

from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.tables import WorkerRow, now

# A worker says that it lives every few seconds.
SILENCE = timedelta(seconds=15)


def workers_seen(session: Session) -> list[WorkerRow]:
    return list(session.scalars(select(WorkerRow).where(WorkerRow.seen_at > now() - SILENCE)))


def compilers_seen(session: Session) -> dict[str, str]:
    """Name -> version of the compilers that the workers have; where they differ, one of them."""
    found: dict[str, str] = {}
    for row in workers_seen(session):
        found |= row.details.get("compilers", {})
    return found
