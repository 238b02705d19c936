"""Analyses of .tflite files for a target: made by a worker, once for the same bytes and options."""

from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import queue
from app.domain.edgetpu import AnalysisOptions
from app.domain.fingerprint import fingerprint
from app.domain.formats import TFLITE_IDENTIFIER
from app.domain.problems import Problem
from app.errors import ServiceError, invalid
from app.services.uploads import INSPECTION_PRIORITY
from app.storage import Stored
from app.tables import AnalysisRow, ArtifactRow, new_id, now

HINT = "Send a .tflite file; a job makes one of a Keras model or a SavedModel."


def recognize(path: Path) -> None:
    """ServiceError 422 or 415 where a received file is no .tflite by its first bytes."""
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise invalid("empty_upload", "file", "no bytes arrived", "Send the .tflite as the body.")
    if head[4:] != TFLITE_IDENTIFIER:
        raise ServiceError(
            415,
            "unsupported_format",
            "The file is no .tflite: it does not start as one.",
            HINT,
        )


def artifact_file(session: Session, tenant_id: str, id_: str) -> Stored:
    """The file of a .tflite artifact. ServiceError 422 `unknown_artifact`, 415 for other kinds."""
    # Held until the analysis that refers to the file is there too: its job may be deleted.
    row = session.get(ArtifactRow, id_, with_for_update={"read": True})
    if row is None or row.tenant_id != tenant_id:
        raise invalid("unknown_artifact", "artifact", f"there is no artifact '{id_}'")
    if not row.kind.endswith("tflite"):
        raise ServiceError(
            415,
            "unsupported_format",
            f"The artifact '{id_}' is no .tflite file but a {row.kind} ('{row.file_name}').",
            "Name the artifact of kind tflite of that variant.",
        )
    return Stored(row.sha256, row.size_bytes)


def create(
    session: Session,
    *,
    tenant_id: str,
    stored: Stored,
    options: AnalysisOptions,
    request_id: str | None,
) -> AnalysisRow:
    """The analysis of a stored file; one that is there already is given again."""
    key = fingerprint("analysis", sha256=stored.sha256, options=options)
    row = session.scalar(select(AnalysisRow).filter_by(tenant_id=tenant_id, key=key))
    if row is not None:
        row.used_at = now()
        if row.status != "invalid":
            return row
        # It may have been for want of memory.
        row.status, row.error = "analyzing", None
    else:
        row = AnalysisRow(
            id=new_id("ana"),
            tenant_id=tenant_id,
            key=key,
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            options=options.model_dump(),
            status="analyzing",
        )
        session.add(row)
    queue.enqueue(
        session,
        "analyze",
        row.id,
        "inspect",
        tenant_id=tenant_id,
        priority=INSPECTION_PRIORITY,
        request_id=request_id,
    )
    return row


def analyzed(row: AnalysisRow, result: dict[str, Any]) -> None:
    row.result = result
    row.error = None
    row.status = "ready"


def refused(row: AnalysisRow, problem: Problem) -> None:
    row.error = problem.model_dump(exclude_none=True)
    row.status = "invalid"
