"""The life of a job: submitted, prepared, its variants run, ended; cancelled and retried."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import queue
from app.domain.budgets import judge
from app.domain.jobs import ACTIVE, PRIORITIES, TERMINAL, JobSpec, Status
from app.domain.metrics import Metrics
from app.domain.problems import Note, Problem
from app.domain.recipes import Variant
from app.domain.targets import TARGET_NOTE, target_notes
from app.domain.work import TrainingProgress
from app.errors import ServiceError, invalid, not_found
from app.services import advice, planning
from app.services.planning import Files
from app.storage import Stored
from app.tables import ArtifactRow, DatasetRow, EventRow, JobRow, ModelRow, VariantRow, new_id, now

BASELINE = -1
ADVISED = "advised"


def files_of(session: Session, tenant_id: str, spec: JobSpec) -> Files:
    """The rows that a spec names. ServiceError 422 `unknown_model`, `unknown_dataset`."""
    model = session.get(ModelRow, spec.model)
    if model is None or model.tenant_id != tenant_id:
        raise invalid("unknown_model", "model", f"there is no model '{spec.model}'")
    datasets = {}
    for field in planning.DATASET_FIELDS:
        if (id_ := getattr(spec, field)) is None:
            continue
        row = session.get(DatasetRow, id_)
        if row is None or row.tenant_id != tenant_id:
            raise invalid("unknown_dataset", field, f"there is no dataset '{id_}'")
        datasets[field] = row
    return Files(model, datasets)


def submit(session: Session, tenant_id: str, spec: JobSpec, request_id: str | None) -> JobRow:
    """Check the spec, and write the job, its variants, first event and first task."""
    files = files_of(session, tenant_id, spec)
    advised: dict[str, Note] = {}
    if spec.variants == "auto":
        spec, advised = _advised(spec, files)
    variants = planning.parse_variants(spec)
    planning.check(spec, variants, files)
    rows = {
        field: {"id": row.id, "sha256": row.sha256, "format": row.format}
        for field, row in files.datasets.items()
    }
    job = JobRow(
        id=new_id("job"),
        tenant_id=tenant_id,
        model_id=files.model.id,
        spec=spec.model_dump(mode="json", exclude_none=True),
        sources=rows,
        priority=PRIORITIES[spec.priority],
        request_id=request_id,
        event_seq=0,
    )
    session.add(job)
    job.variants = [_variant_row(tenant_id, BASELINE, "baseline", [])]
    for position, variant in enumerate(variants):
        recipe = [step.model_dump(mode="json") for step in variant.recipe]
        row = _variant_row(tenant_id, position, variant.name, recipe)
        notes = [*target_notes(variant, spec.target)]
        if variant.name in advised:
            notes.append(advised[variant.name])
        row.notes = [note.model_dump() for note in notes]
        job.variants.append(row)
    session.flush()
    emit_job(session, job)
    _enqueue_prepare(session, job)
    return job


def _advised(spec: JobSpec, files: Files) -> tuple[JobSpec, dict[str, Note]]:
    """The spec with the recipes that "auto" stands for, and a note on each that says why."""
    chosen = advice.resolve(spec, files)
    notes = {}
    for one in chosen:
        why = "; ".join(one.reasons)
        told = f"Chosen by advice for goal '{spec.goal or 'balanced'}', rank {one.rank}: {why}."
        notes[one.name] = Note(code=ADVISED, message=told)
    values = spec.model_dump(exclude={"variants"}) | {"variants": [one.variant for one in chosen]}
    return JobSpec.model_validate(values), notes


def _variant_row(tenant_id: str, position: int, name: str, recipe: list[Any]) -> VariantRow:
    return VariantRow(
        id=new_id("var"), tenant_id=tenant_id, position=position, name=name, recipe=recipe,
        status="queued", progress=0.0, notes=[], training=[], cached=False, artifacts=[],
    )  # fmt: skip


def _enqueue_prepare(session: Session, job: JobRow) -> None:
    queue.enqueue(
        session,
        "prepare",
        job.id,
        "fast",
        tenant_id=job.tenant_id,
        priority=job.priority,
        request_id=job.request_id,
    )


def get(session: Session, tenant_id: str, job_id: str) -> JobRow:
    job = session.get(JobRow, job_id)
    if job is None or job.tenant_id != tenant_id:
        raise not_found("job", job_id)
    return job


def locked(session: Session, tenant_id: str, job_id: str) -> JobRow:
    """The job, its row locked until the transaction ends: whoever changes a job takes turns."""
    statement = select(JobRow).where(JobRow.id == job_id).with_for_update()
    job = session.scalar(statement.execution_options(populate_existing=True))
    if job is None or job.tenant_id != tenant_id:
        raise not_found("job", job_id)
    return job


def emit(session: Session, job_id: str, tenant_id: str, name: str, data: dict[str, Any]) -> None:
    """Append an event. The number comes from the job's row, which stays locked until the
    transaction ends: a reader never sees number n+1 before n."""
    seq = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(event_seq=JobRow.event_seq + 1)
        .returning(JobRow.event_seq)
        .execution_options(synchronize_session=False)
    )
    session.add(EventRow(job_id=job_id, seq=seq, tenant_id=tenant_id, name=name, data=data))


def emit_job(session: Session, job: JobRow) -> None:
    data = {"id": job.id, "status": job.status, "progress": progress(job)}
    emit(session, job.id, job.tenant_id, "job", data)


def emit_variant(
    session: Session,
    row: VariantRow,
    message: str | None = None,
    training: TrainingProgress | None = None,
) -> None:
    data = {
        "id": row.id,
        "name": row.name,
        "status": row.status,
        "stage": row.stage,
        "progress": row.progress,
        "message": message,
        "training": training.model_dump(mode="json") if training else None,
    }
    emit(session, row.job_id, row.tenant_id, "variant", data)


def progress(job: JobRow) -> float:
    """Share of the job that is done, 0..1: its variants and the baseline count alike."""
    if job.status in TERMINAL:
        return 1.0
    done = sum(1.0 if row.status in TERMINAL else row.progress for row in job.variants)
    return round(done / len(job.variants), 4)


def requested(job: JobRow) -> list[VariantRow]:
    return [row for row in job.variants if row.position != BASELINE]


def baseline(job: JobRow) -> VariantRow:
    return next(row for row in job.variants if row.position == BASELINE)


def start(session: Session, job: JobRow) -> None:
    if job.status == Status.queued:
        job.status = Status.running
        job.started_at = now()
        emit_job(session, job)


def succeed_variant(
    session: Session,
    row: VariantRow,
    metrics: Metrics,
    notes: Iterable[dict[str, Any]],
    *,
    training: Iterable[dict[str, Any]] = (),
    cached: bool,
    seconds: float | None,
) -> None:
    row.status = Status.succeeded
    row.stage, row.progress = None, 1.0
    row.metrics = metrics.model_dump(mode="json")
    row.notes = [*row.notes, *notes]
    row.training = list(training)
    row.error = None
    row.cached = cached
    row.seconds = seconds
    emit_variant(session, row)


def fail_variant(session: Session, row: VariantRow, problem: Problem) -> None:
    row.status = Status.failed
    row.stage = None
    row.error = problem.model_dump(exclude_none=True)
    emit_variant(session, row, problem.message)


def add_artifact(
    session: Session, row: VariantRow, kind: str, file_name: str, stored: Stored, gzip_size: int
) -> None:
    row.artifacts.append(
        ArtifactRow(
            id=new_id("art"),
            tenant_id=row.tenant_id,
            job_id=row.job_id,
            kind=kind,
            file_name=file_name,
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            gzip_size_bytes=gzip_size,
        )
    )


def fail(session: Session, job: JobRow, problem: Problem) -> None:
    """The job cannot go on: every variant that has not ended fails for the same cause."""
    for row in job.variants:
        if row.status in ACTIVE:
            fail_variant(session, row, problem)
    job.error = problem.model_dump(exclude_none=True)
    settle(session, job)


def settle(session: Session, job: JobRow) -> None:
    """End the job if nothing of it is left to do, with its status, verdict and last events."""
    if job.status in TERMINAL or any(row.status in ACTIVE for row in job.variants):
        return
    rows = requested(job)
    succeeded = [row for row in rows if row.status == Status.succeeded]
    if any(row.status == Status.cancelled for row in rows):
        job.status = Status.cancelled
    elif len(succeeded) == len(rows):
        job.status = Status.succeeded
    else:
        job.status = Status.partial if succeeded else Status.failed
    spec = JobSpec.model_validate(job.spec)
    verdict = judge(
        spec.budgets,
        (
            (
                row.name,
                row.status == Status.succeeded,
                Metrics.model_validate(row.metrics) if row.metrics else None,
            )
            for row in rows
        ),
    )
    job.verdict = verdict.model_dump(mode="json")
    job.finished_at = now()
    emit_job(session, job)
    emit(session, job.id, job.tenant_id, "end", {"id": job.id, "status": job.status})


def cancel(session: Session, job: JobRow) -> None:
    """End what has not ended. 409 when the job has.

    Without its task, a run has lost its lease: its worker stops the child at the next heartbeat,
    and nothing of it can be written any more.
    """
    if job.status in TERMINAL:
        raise ServiceError(409, "already_finished", f"Job '{job.id}' has ended: {job.status}.")
    queue.drop(session, "prepare", [job.id])
    queue.drop(session, "variant", [row.id for row in job.variants])
    for row in job.variants:
        if row.status in ACTIVE:
            row.status, row.stage = Status.cancelled, None
            emit_variant(session, row)
    settle(session, job)


def retry(session: Session, job: JobRow) -> None:
    """Queue again what did not succeed. 409 when there is no such thing or the job still runs."""
    if job.status in ACTIVE:
        raise ServiceError(
            409, "not_finished", f"Job '{job.id}' is {job.status}.", "Wait for it, or cancel it."
        )
    again = [row for row in job.variants if row.status != Status.succeeded]
    if not again:
        raise ServiceError(409, "nothing_to_retry", f"Every variant of job '{job.id}' succeeded.")
    spec = JobSpec.model_validate(job.spec)
    files = files_of(session, job.tenant_id, spec)
    planning.check(spec, planning.parse_variants(spec), files)
    for row in again:
        row.status, row.progress, row.error, row.stage = Status.queued, 0.0, None, None
        row.notes = [note for note in row.notes if note["code"] in (TARGET_NOTE, ADVISED)]
        emit_variant(session, row)
    job.status, job.error, job.verdict = Status.queued, None, None
    job.finished_at = None
    emit_job(session, job)
    _enqueue_prepare(session, job)


def events_after(session: Session, job_id: str, seq: int, limit: int = 500) -> list[EventRow]:
    statement = (
        select(EventRow)
        .where(EventRow.job_id == job_id, EventRow.seq > seq)
        .order_by(EventRow.seq)
        .limit(limit)
    )
    return list(session.scalars(statement))


def variant_of(row: VariantRow) -> Variant:
    return Variant.model_validate({"name": row.name, "recipe": row.recipe})
