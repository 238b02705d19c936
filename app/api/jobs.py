"""/v1/jobs"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from app import turns
from app.api import uploads
from app.api.content import disposition
from app.api.deps import Cursor, Limit, Parts, Tenant, TheParts, location, one, owned, page
from app.api.idempotency import IdempotencyKey, answered, fingerprint_of, remember
from app.api.receive import Received, is_form, receiving
from app.api.schemas import JobRead, Page
from app.api.spec import json_body, parse, spec_text
from app.domain.budgets import Verdict
from app.domain.jobs import TERMINAL, Status
from app.errors import ServiceError, invalid
from app.logging import request_id
from app.services import archive, jobs, planning, quotas, reports
from app.tables import EventRow, JobRow, TaskRow

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

KEEP_ALIVE_S = 15
# The client comes back, to another process or the next one, with the id of its last event.
GOODBYE = b"retry: 1000\n: this process ends, the job goes on\n\n"
Wait = Annotated[
    float, Query(ge=0, le=600, description="Answer when the job has ended, or after these seconds.")
]
JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["spec", "model"],
                    "properties": {
                        "spec": {"type": "string", "description": "The JobSpec, as JSON"},
                        "model": {"type": "string", "format": "binary"},
                        "dataset": {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}


@router.post(
    "",
    operation_id="create_job",
    status_code=202,
    response_model=JobRead,
    openapi_extra=JOB_BODY,
)
async def create_job(
    request: Request,
    parts: TheParts,
    tenant: Tenant,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a job. JSON names uploaded files; multipart sends them along: `spec` is that JSON,
    `model` and `dataset` are the files."""
    if is_form(request):
        async with receiving(request, parts) as received:
            response = await run_in_threadpool(
                _submit, request, parts, tenant, received, idempotency_key
            )
    else:
        received = Received(texts={"spec": await json_body(request)})
        response = await run_in_threadpool(
            _submit, request, parts, tenant, received, idempotency_key
        )
    if not wait:
        return response
    id_ = json.loads(bytes(response.body))["id"]
    await _until_ended(parts, id_, wait)
    job = await run_in_threadpool(_read, parts, tenant, id_)
    headers = {"Location": location(request, "get_job", id=id_)}
    return Response(job.model_dump_json(), 202, headers, media_type="application/json")


def _submit(
    request: Request, parts: Parts, tenant: str, received: Received, key: str | None
) -> Response:
    for name in received.files.keys() - {"spec", "model", "dataset"}:
        raise invalid("unknown_part", name, "the form takes 'spec', 'model' and 'dataset'")
    for name in received.texts.keys() - {"spec"}:
        raise invalid(
            "unknown_part", name, "is no file", f"Send the file as -F {name}=@PATH; ids go in spec."
        )
    text = spec_text(received)
    if text is None:
        raise invalid("missing_spec", "spec", "the form has no such part", "Add -F spec='{…}'.")
    # The recipes and fields are judged before the files are kept: a refused job leaves nothing.
    placeholders = dict.fromkeys(received.files, "sent")
    planning.parse_variants(parse(text, placeholders))
    digests = [f"{name}:{spool.sha256}" for name, spool in sorted(received.files.items())]
    fingerprint = fingerprint_of("job", text, *digests)
    kinds = {"model": uploads.MODEL, "dataset": uploads.DATASET}
    kept = {
        name: uploads.keep(parts, tenant, kinds[name], spool, received.names.get(name))
        for name, spool in received.files.items()
    }

    def create() -> Response:
        with uploads.creating(parts) as session:
            if response := answered(session, tenant, key, fingerprint):
                return response
            ids = {name: file.row(session, tenant)[0].id for name, file in kept.items()}
            session.flush()
            quotas.admit_job(session, parts.settings, tenant)
            job = jobs.submit(session, tenant, parse(text, ids), request_id.get())
            session.flush()
            return remember(
                session,
                tenant,
                key,
                fingerprint,
                status=202,
                body=JobRead.of(job).model_dump_json(),
                location=location(request, "get_job", id=job.id),
            )

    return uploads.once_more_on_conflict(create)


@router.get("", operation_id="list_jobs")
def list_jobs(
    parts: TheParts,
    tenant: Tenant,
    status: Status | None = None,
    model: str | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[JobRead]:
    statement = owned(JobRow, tenant)
    if status is not None:
        statement = statement.where(JobRow.status == status)
    if model is not None:
        statement = statement.where(JobRow.model_id == model.replace("\x00", ""))
    with parts.database.read() as session:
        rows, after = page(session, statement, JobRow, limit, cursor)
        return Page(items=[JobRead.of(row) for row in rows], next_cursor=after)


def _read(parts: Parts, tenant: str, id_: str) -> JobRead:
    with parts.database.read() as session:
        job = one(session, JobRow, tenant, "job", id_)
        position = None
        if job.status == Status.queued:
            task = session.scalar(
                select(TaskRow).where(TaskRow.kind == "prepare", TaskRow.subject_id == job.id)
            )
            position = turns.before(session, task) if task else None
        return JobRead.of(job, position)


async def _until_ended(parts: Parts, id_: str, seconds: float) -> None:
    def ended() -> bool:
        with parts.database.read() as session:
            status = session.scalar(select(JobRow.status).where(JobRow.id == id_))
            return status in (None, *TERMINAL)

    await parts.watcher.until(id_, ended, seconds)


@router.get("/{id}", operation_id="get_job", name="get_job")
async def get_job(parts: TheParts, tenant: Tenant, id: str, wait: Wait = 0) -> JobRead:
    job = await run_in_threadpool(_read, parts, tenant, id)
    if wait and job.status not in TERMINAL:
        await _until_ended(parts, id, wait)
        job = await run_in_threadpool(_read, parts, tenant, id)
    return job


@router.post("/{id}/cancel", operation_id="cancel_job", status_code=202)
def cancel_job(parts: TheParts, tenant: Tenant, id: str) -> JobRead:
    """Stop the job: what waits at once, what runs within 5 seconds."""
    with uploads.creating(parts) as session:
        one(session, JobRow, tenant, "job", id)
        job = jobs.locked(session, tenant, id)
        jobs.cancel(session, job)
        session.flush()
        return JobRead.of(job)


@router.post("/{id}/retry", operation_id="retry_job", status_code=202)
def retry_job(parts: TheParts, tenant: Tenant, id: str) -> JobRead:
    """Run again what did not succeed."""
    with uploads.creating(parts) as session:
        one(session, JobRow, tenant, "job", id)
        quotas.admit_job(session, parts.settings, tenant, new=False)
        job = jobs.locked(session, tenant, id)
        jobs.retry(session, job)
        session.flush()
        return JobRead.of(job)


@router.delete("/{id}", operation_id="delete_job", status_code=204)
def delete_job(parts: TheParts, tenant: Tenant, id: str) -> None:
    """Delete a job that has ended, with its figures, events and artifacts."""
    with parts.database.write() as session:
        one(session, JobRow, tenant, "job", id)
        jobs.delete(session, jobs.locked(session, tenant, id))


@router.get(
    "/{id}/events",
    operation_id="get_job_events",
    response_class=Response,
    responses={
        200: {
            "description": "Events `job`, `variant`, and at last `end`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def get_job_events(
    parts: TheParts,
    tenant: Tenant,
    id: str,
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> EventSourceResponse:
    """Server-Sent Events from the job's first, or after `Last-Event-ID`; ends with `end`."""
    await run_in_threadpool(_read, parts, tenant, id)
    after = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    return EventSourceResponse(_stream(parts, id, min(after, 2**62)))


def _events(parts: Parts, id_: str, after: int) -> tuple[list[EventRow], bool]:
    """Events after a number, and whether the job had ended when they were read."""
    with parts.database.read() as session:
        ended = session.scalar(select(JobRow.status).where(JobRow.id == id_)) in (None, *TERMINAL)
        return jobs.events_after(session, id_, after), ended


async def _stream(parts: Parts, id_: str, after: int) -> AsyncIterator[bytes]:
    async with parts.watcher.watching(id_) as moved:
        while True:
            moved.clear()
            rows, ended = await run_in_threadpool(_events, parts, id_, after)
            for row in rows:
                after = row.seq
                yield format_sse_event(
                    data_str=json.dumps(row.data), event=row.name, id=str(row.seq)
                )
            # A retried job has an `end` in the middle of its events.
            if ended and not rows:
                return
            if rows:
                continue
            if parts.watcher.ending:
                yield GOODBYE
                return
            try:
                await asyncio.wait_for(moved.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield b": still here\n\n"


FORMATS = {
    "application/json": "json",
    "text/markdown": "markdown",
    "text/html": "html",
    "text/csv": "csv",
    "application/xml": "junit",
    "text/xml": "junit",
}


@router.get(
    "/{id}/report",
    operation_id="get_job_report",
    response_class=Response,
    responses={
        200: {
            "description": "The report",
            "content": {media: {"schema": {"type": "string"}} for media in FORMATS},
        }
    },
)
def get_job_report(
    parts: TheParts,
    tenant: Tenant,
    id: str,
    format: Annotated[
        str | None, Query(pattern="^(json|markdown|html|csv|junit)$", description="Else by Accept.")
    ] = None,
    accept: Annotated[str, Header()] = "*/*",
) -> Response:
    """The comparison of all variants, for people, spreadsheets or CI."""
    if format is None:
        asked = [part.split(";")[0].strip() for part in accept.split(",")]
        format = next((FORMATS[media] for media in asked if media in FORMATS), "json")
    job = _read(parts, tenant, id).model_dump(mode="json")
    text, media_type = reports.render(job, format)
    return Response(text, media_type=media_type)


@router.get(
    "/{id}/verdict",
    operation_id="get_job_verdict",
    responses={412: {"model": Verdict, "description": "A budget is broken"}},
)
def get_job_verdict(parts: TheParts, tenant: Tenant, id: str) -> Response:
    """200 when every budget holds, 412 when one is broken: `curl --fail` fails a CI step."""
    job = _read(parts, tenant, id)
    if job.status not in TERMINAL or job.verdict is None:
        raise ServiceError(
            409, "not_finished", f"Job '{id}' is {job.status}.", "Add ?wait= to the job's URL."
        )
    status = 200 if job.verdict.verdict == "pass" else 412
    return Response(job.verdict.model_dump_json(), status, media_type="application/json")


@router.get(
    "/{id}/artifacts.zip",
    operation_id="get_job_artifacts",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Everything of the job",
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
def get_job_artifacts(parts: TheParts, tenant: Tenant, id: str) -> StreamingResponse:
    """All artifacts of the job and its report, streamed."""
    with parts.database.read() as session:
        job = one(session, JobRow, tenant, "job", id)
        report, _ = reports.render(JobRead.of(job).model_dump(mode="json"), "markdown")
        content = archive.of_job(parts.storage, job, {"report.md": report})
    headers = {
        "Content-Disposition": disposition(f"{job.id}.zip"),
        # By it a client sees that a zip which breaks off is not whole.
        "Content-Length": str(len(content)),
    }
    return StreamingResponse(content, media_type="application/zip", headers=headers)
