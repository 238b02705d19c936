"""Costly results, made once: looked up by key, made by one task, reused by all."""

from collections.abc import Iterable
from typing import Any, Literal

from sqlalchemy import update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app import queue
from app.domain.problems import WorkError
from app.queue import Claim
from app.storage import Stored
from app.tables import StepRow, now

Standing = Literal["ready", "mine", "busy"]


def ready(session: Session, tenant_id: str, key: str, *, hold: bool = False) -> StepRow | None:
    """The result, if it is there; `hold` keeps it there until the transaction has committed what
    refers to its files, which would be removed with it."""
    row = session.get(StepRow, (tenant_id, key), with_for_update=hold or None)
    return row if row is not None and row.status == "ready" else None


def needed(session: Session, tenant_id: str, key: str) -> StepRow:
    """A result that was there when the task was made due. WorkError where it is forgotten."""
    row = ready(session, tenant_id, key)
    if row is None:
        raise WorkError(
            "content_missing",
            "What the variant is made from is not there any more: a file of it was damaged.",
            "Retry the job: it is made anew.",
        )
    return row


def acquire(session: Session, claim: Claim, key: str, kind: str) -> Standing:
    """Whether the step is there already, is now this task's to make, or is made by another."""
    _ensure(session, claim.tenant_id, key, kind)
    row = session.get_one(
        StepRow, (claim.tenant_id, key), with_for_update=True, populate_existing=True
    )
    if row.status == "ready":
        # Kept by its last use: what a job has found must be there until it ends.
        row.created_at = now()
        return "ready"
    if (row.task_id, row.attempt) != (claim.task_id, claim.attempt) and queue.is_running(
        session, row.task_id, row.attempt
    ):
        return "busy"
    row.task_id, row.attempt = claim.task_id, claim.attempt
    # Somebody may have begun it long ago: its removal now would let another make it too.
    row.created_at = now()
    session.flush()
    return "mine"


def keep(session: Session, tenant_id: str, keys: Iterable[str]) -> None:
    """Results that are in use are as young as those just made: old ones are removed."""
    # In one order for all, as when they are acquired.
    for key in sorted(keys):
        which = (StepRow.tenant_id == tenant_id, StepRow.key == key)
        session.execute(update(StepRow).where(*which).values(created_at=now()))


def _ensure(session: Session, tenant_id: str, key: str, kind: str) -> None:
    """The step's row is there afterwards, whoever made it: two who need it at once may both find
    none."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    row = {"tenant_id": tenant_id, "key": key, "kind": kind, "status": "making"}
    session.execute(insert(StepRow).values(**row).on_conflict_do_nothing())


def complete(
    session: Session,
    tenant_id: str,
    key: str,
    kind: str,
    files: dict[str, Stored],
    data: dict[str, Any],
) -> StepRow:
    """Keep a result, in the transaction whose lease was checked."""
    row = session.get(StepRow, (tenant_id, key))
    if row is None:
        row = StepRow(tenant_id=tenant_id, key=key, kind=kind)
        session.add(row)
    row.status = "ready"
    row.files = {
        name: {"sha256": file.sha256, "size_bytes": file.size_bytes} for name, file in files.items()
    }
    row.data = data
    row.created_at = now()
    queue.wake_busy(session, tenant_id)
    return row


def file_of(row: StepRow, name: str) -> Stored:
    file = row.files[name]
    return Stored(file["sha256"], file["size_bytes"])
