"""The tasks that inspect uploads: facts of a model or dataset, or why it cannot be used."""

import json
from typing import Any

from app import queue
from app.domain.formats import DatasetFormat, ModelFormat
from app.domain.problems import WorkError
from app.domain.work import Event, InspectDatasetWork, InspectModelWork, ModelSource
from app.queue import Claim
from app.services import starting, uploads
from app.tables import DatasetRow, ModelRow
from workers import steps
from workers.common import drop, limits
from workers.lease import Lease
from workers.plan import convert_key, tools
from workers.worker import Worker


def inspect_model(worker: Worker, lease: Lease) -> None:
    claim = lease.claim
    with worker.database.read() as session:
        row = session.get(ModelRow, claim.subject_id)
    if row is None:
        return drop(worker, claim)
    if starting.to_be_made(row):
        try:
            row = _make(worker, lease, row)
        except WorkError as error:
            return _inspection_failed(worker, claim, "model", error)
        if row is None:
            return drop(worker, claim)
    format_ = ModelFormat(row.format)
    key = convert_key(row.sha256, format_, {})
    with worker.writing() as session:
        mine = steps.acquire(session, claim, key, "convert") == "mine"
    work = InspectModelWork(model=ModelSource(file="in/model", format=format_), convert=mine)

    def on_event(event: Event) -> None:
        if event.stage == "inspected" and event.message:
            _inspected(worker, claim, json.loads(event.message))

    try:
        made = worker.make(
            lease,
            work,
            {"model": row.sha256},
            on_event,
            tensorflow=format_ is not ModelFormat.tflite,
            limits=limits(worker, None),
            outputs=lambda r: {"float_model": r["float_model"]} if r["float_model"] else {},
        )
    except WorkError as error:
        return _inspection_failed(worker, claim, "model", error)
    facts = made.result["facts"] | {"notes": made.result["notes"]}
    with worker.writing() as session:
        queue.finish(session, claim)
        row = session.get(ModelRow, claim.subject_id)
        if row is not None:
            uploads.inspected(session, row, facts)
        if made.files:
            data = {"tools": tools()}
            steps.complete(session, claim.tenant_id, key, "convert", made.files, data)
    return None


def _make(worker: Worker, lease: Lease, row: ModelRow) -> ModelRow | None:
    """Have a model of the catalog made; its row then, None where it was deleted meanwhile."""
    work = starting.work_of(row.origin or "")
    built = worker.make(
        lease,
        work,
        {},
        lambda event: None,
        tensorflow=True,
        limits=limits(worker, None),
        outputs=lambda result: {"model": result["file"]},
    )
    with worker.writing() as session:
        queue.renew(session, lease.claim, worker.settings.lease_s)
        found = session.get(ModelRow, row.id)
        if found is not None:
            starting.made(session, found, built.files["model"])
        return found


def _inspected(worker: Worker, claim: Claim, facts: dict[str, Any]) -> None:
    """The facts are there before the conversion that follows them."""
    with worker.writing() as session:
        queue.renew(session, claim, worker.settings.lease_s)
        row = session.get(ModelRow, claim.subject_id)
        if row is not None:
            uploads.inspected(session, row, facts)


def inspect_dataset(worker: Worker, lease: Lease) -> None:
    claim = lease.claim
    with worker.database.read() as session:
        row = session.get(DatasetRow, claim.subject_id)
    if row is None:
        return drop(worker, claim)
    work = InspectDatasetWork(
        file="in/dataset",
        format=DatasetFormat(row.format),
        max_unpacked_bytes=worker.settings.max_unpacked_bytes,
    )
    try:
        made = worker.make(
            lease,
            work,
            {"dataset": row.sha256},
            lambda event: None,
            tensorflow=False,
            limits=limits(worker, None),
            outputs=lambda result: {},
        )
    except WorkError as error:
        return _inspection_failed(worker, claim, "dataset", error)
    with worker.writing() as session:
        queue.finish(session, claim)
        row = session.get(DatasetRow, claim.subject_id)
        if row is not None:
            uploads.inspected(session, row, made.result["facts"])
    return None


def _inspection_failed(worker: Worker, claim: Claim, kind: str, error: WorkError) -> None:
    with worker.writing() as session:
        queue.finish(session, claim)
        row = uploads.find(session, kind, claim.subject_id)
        # Facts that are known stay known where only the conversion after them failed.
        if row is not None and row.status == "inspecting":
            uploads.refused(session, row, error.problem())
