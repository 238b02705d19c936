"""Models and datasets: created once per content, inspected by a worker, deleted when unused."""

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import queue
from app.domain.formats import dataset_format, model_format
from app.domain.jobs import ACTIVE
from app.domain.problems import Problem
from app.errors import ServiceError
from app.services import webhooks
from app.storage import Stored
from app.tables import DatasetRow, JobRow, ModelRow, new_id

MODEL_FORMATS = "Keras 3 (.keras), Keras 2 (.h5), a SavedModel (.zip, .tar, .tar.gz), .tflite"
DATASET_FORMATS = "an .npz of arrays, or a .zip/.tar.gz of class_name/picture.jpg|png"
# Before anything else: somebody may be waiting for it to submit a job.
INSPECTION_PRIORITY = 100


def recognize(kind: str, path: Path) -> str:
    """The format of a received file, by content. ServiceError 415 where it is none of ours."""
    found = model_format(path) if kind == "model" else dataset_format(path)
    if found is None:
        formats = MODEL_FORMATS if kind == "model" else DATASET_FORMATS
        raise ServiceError(
            415,
            "unsupported_format",
            f"The file is no {kind} in a format that is known here, or it is damaged.",
            f"Formats are told by content, never by file name. Send {formats}.",
        )
    return str(found)


def create(
    session: Session,
    kind: str,
    *,
    tenant_id: str,
    name: str,
    format_: str,
    stored: Stored,
    request_id: str | None,
) -> tuple[ModelRow | DatasetRow, bool]:
    """The row of an uploaded file, and whether it is new: the same bytes are one model."""
    table = ModelRow if kind == "model" else DatasetRow
    existing = of_content(session, kind, tenant_id, stored.sha256)
    if existing is not None:
        if existing.status == "invalid" or _outdated(existing):
            # It may have been for want of memory, or by an older version of the inspection.
            inspect_again(session, kind, existing, request_id)
        return existing, False
    row: ModelRow | DatasetRow = table(
        id=new_id("mdl" if kind == "model" else "dat"),
        tenant_id=tenant_id,
        name=name,
        format=format_,
        sha256=stored.sha256,
        size_bytes=stored.size_bytes,
        status="inspecting",
    )
    session.add(row)
    enqueue_inspection(session, kind, row, request_id)
    return row, True


def _outdated(row: ModelRow | DatasetRow) -> bool:
    """Whether a SavedModel was inspected by a version that did not ask whether it can train."""
    facts = row.facts if row.status == "ready" else None
    return row.format == "saved_model" and facts is not None and facts.get("trainable") is None


def inspect_again(
    session: Session, kind: str, row: ModelRow | DatasetRow, request_id: str | None
) -> None:
    row.status, row.error = "inspecting", None
    queue.drop(session, f"inspect_{kind}", [row.id])
    enqueue_inspection(session, kind, row, request_id)


def enqueue_inspection(
    session: Session, kind: str, row: ModelRow | DatasetRow, request_id: str | None
) -> None:
    queue.enqueue(
        session,
        f"inspect_{kind}",
        row.id,
        "inspect",
        tenant_id=row.tenant_id,
        priority=INSPECTION_PRIORITY,
        request_id=request_id,
    )


def of_content(
    session: Session, kind: str, tenant_id: str, sha256: str
) -> ModelRow | DatasetRow | None:
    content = {"tenant_id": tenant_id, "sha256": sha256}
    if kind == "model":
        return session.scalar(select(ModelRow).filter_by(**content))
    return session.scalar(select(DatasetRow).filter_by(**content))


def find(session: Session, kind: str, id_: str) -> ModelRow | DatasetRow | None:
    """The row of a model or dataset, by kind."""
    return session.get(ModelRow, id_) if kind == "model" else session.get(DatasetRow, id_)


def delete(session: Session, row: ModelRow | DatasetRow) -> None:
    """Delete a model or dataset. ServiceError 409 while a job runs on it."""
    # Without their variants, which would be read with the rows.
    columns = select(JobRow.id, JobRow.status, JobRow.model_id, JobRow.sources)
    active = session.execute(
        columns.where(JobRow.tenant_id == row.tenant_id, JobRow.status.in_(ACTIVE))
    )
    for job in active:
        used = {job.model_id, *(source["id"] for source in job.sources.values())}
        if row.id in used:
            raise ServiceError(
                409,
                "in_use",
                f"'{row.id}' is used by job '{job.id}', which is {job.status}.",
                "Wait for the job to end, or cancel it.",
            )
    queue.drop(session, "inspect_model", [row.id])
    queue.drop(session, "inspect_dataset", [row.id])
    session.delete(row)


def inspected(session: Session, row: ModelRow | DatasetRow, facts: dict[str, object]) -> None:
    row.facts = facts
    row.error = None
    # A model is inspected twice: before and after its conversion.
    known, row.status = row.status == "ready", "ready"
    if not known:
        webhooks.upload_event(session, row)
    _wake_jobs(session, row)


def refused(session: Session, row: ModelRow | DatasetRow, problem: Problem) -> None:
    row.error = problem.model_dump(exclude_none=True)
    row.status = "invalid"
    webhooks.upload_event(session, row)
    _wake_jobs(session, row)


def _wake_jobs(session: Session, row: ModelRow | DatasetRow) -> None:
    waiting = select(JobRow.id).where(JobRow.tenant_id == row.tenant_id, JobRow.status == "queued")
    queue.wake(session, "prepare", waiting)
