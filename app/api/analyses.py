"""/v1/analyze and /v1/analyses: what a target makes of a .tflite file"""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field, ValidationError
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from app.api.deps import ID, Parts, Tenant, TheParts, location, one
from app.api.idempotency import IdempotencyKey, answered, fingerprint_of, remember
from app.api.receive import Received, receiving
from app.api.schemas import AnalysisRead
from app.api.spec import field_errors, json_body
from app.api.uploads import creating, once_more_on_conflict
from app.domain.edgetpu import COMPILER_PATTERN, AnalysisOptions
from app.errors import ServiceError, invalid
from app.logging import request_id
from app.services import analyses, quotas
from app.storage import Stored
from app.tables import AnalysisRow

router = APIRouter(prefix="/v1", tags=["analyses"])

Target = Annotated[
    Literal["edgetpu"] | None, Query(description="What to analyze for: edgetpu, the default.")
]
Compiler = Annotated[
    str | None,
    Query(pattern=COMPILER_PATTERN, description="Release of edgetpu_compiler, 16.0 by default."),
]
MultipleSubgraphs = Annotated[bool | None, Query(description="The compiler's option -a.")]
Wait = Annotated[
    float, Query(ge=0, le=600, description="Answer when it is made, or after these seconds.")
]
ANALYZE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "target": {"type": "string", "enum": ["edgetpu"]},
                        "compiler": {"type": "string", "pattern": COMPILER_PATTERN},
                        "multiple_subgraphs": {"type": "string", "enum": ["true", "false"]},
                    },
                }
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/AnalyzeArtifact"}},
        },
    }
}
LATER: dict[int | str, dict[str, Any]] = {
    202: {"model": AnalysisRead, "description": "Not made yet: see `Location`"}
}


class AnalyzeArtifact(AnalysisOptions):
    """Analyze a file that a job has made."""

    artifact: str = Field(pattern=f"^{ID.pattern}$")


# `curl -T` sends PUT.
@router.put(
    "/analyze",
    operation_id="put_analysis",
    response_model=AnalysisRead,
    responses=LATER,
    openapi_extra=ANALYZE_BODY,
)
@router.post(
    "/analyze",
    operation_id="create_analysis",
    response_model=AnalysisRead,
    responses=LATER,
    openapi_extra=ANALYZE_BODY,
)
async def create_analysis(
    request: Request,
    parts: TheParts,
    tenant: Tenant,
    target: Target = None,
    compiler: Compiler = None,
    multiple_subgraphs: MultipleSubgraphs = None,
    wait: Wait = 30,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Tell which operators of a .tflite run on the Edge TPU, and why the others do not. The file
    is the raw body, `file` of a form, or the artifact that JSON names."""
    query = {
        name: value
        for name, value in {
            "target": target,
            "compiler": compiler,
            "multiple_subgraphs": multiple_subgraphs,
        }.items()
        if value is not None
    }
    if request.headers.get("content-type", "").startswith("application/json"):
        asked = _parse(await json_body(request))
        options = _options(query | asked.model_dump(exclude={"artifact"}, exclude_unset=True))
        accepted = await run_in_threadpool(
            _create, request, parts, tenant, asked.artifact, options, idempotency_key
        )
    else:
        async with receiving(request, parts) as received:
            options = _options(query | received.texts)
            stored = await run_in_threadpool(_keep, parts, tenant, received)
        accepted = await run_in_threadpool(
            _create, request, parts, tenant, stored, options, idempotency_key
        )
    id_ = json.loads(bytes(accepted.body))["id"]
    await _until_made(parts, id_, wait)
    found = await run_in_threadpool(_read, parts, tenant, id_)
    headers = {"Location": location(request, "get_analysis", id=id_)}
    if found.error is not None:
        problem = found.error
        raise ServiceError(422, problem.code, problem.message, problem.hint, headers=headers)
    status = 200 if found.status == "ready" else 202
    return Response(found.model_dump_json(), status, headers, media_type="application/json")


@router.get("/analyses/{id}", operation_id="get_analysis", name="get_analysis")
async def get_analysis(parts: TheParts, tenant: Tenant, id: str, wait: Wait = 0) -> AnalysisRead:
    """An analysis; it is `analyzing`, `ready`, or `invalid` for the cause in `error`."""
    found = await run_in_threadpool(_read, parts, tenant, id)
    if wait and found.status == "analyzing":
        await _until_made(parts, id, wait)
        found = await run_in_threadpool(_read, parts, tenant, id)
    return found


def _parse(text: str) -> AnalyzeArtifact:
    try:
        return AnalyzeArtifact.model_validate_json(text, strict=True)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise ServiceError(
                400,
                "invalid_json",
                f"The body is not JSON: {error.errors()[0]['msg']}",
                "A file is sent as application/octet-stream, which curl -T does.",
            ) from None
        raise _misfit(error) from None


def _options(given: dict[str, Any]) -> AnalysisOptions:
    try:
        return AnalysisOptions.model_validate(given)
    except ValidationError as error:
        raise _misfit(error) from None


def _misfit(error: ValidationError) -> ServiceError:
    errors = field_errors(error)
    detail = "; ".join(f"{e.field}: {e.message}" for e in errors)[:500]
    return ServiceError(
        422,
        "validation_error",
        detail,
        "It takes target, compiler and multiple_subgraphs, and the file or artifact.",
        errors,
    )


def _keep(parts: Parts, tenant: str, received: Received) -> Stored:
    """The received file in the storage. ServiceError 415 or 422 where it is no .tflite, 507 where
    the tenant's storage is full."""
    spool = received.files.get("file")
    if spool is None:
        raise invalid("missing_file", "file", "the form has no such part", "Use -F file=@PATH.")
    analyses.recognize(spool.path)
    with parts.database.read() as session:
        what = f"this file of {spool.size_bytes} bytes"
        quotas.check_storage(session, parts.settings, tenant, spool.size_bytes, what=what)
    return spool.keep()


def _create(
    request: Request,
    parts: Parts,
    tenant: str,
    source: Stored | str,
    options: AnalysisOptions,
    key: str | None,
) -> Response:
    """The answer before the analysis is made; `source` is a stored file or an artifact's id."""
    name = source if isinstance(source, str) else source.sha256
    fingerprint = fingerprint_of("analysis", name, options.model_dump_json())

    def create() -> Response:
        with creating(parts) as session:
            if response := answered(session, tenant, key, fingerprint):
                return response
            row = analyses.create(
                session,
                tenant_id=tenant,
                stored=analyses.artifact_file(session, tenant, source)
                if isinstance(source, str)
                else source,
                options=options,
                request_id=request_id.get(),
            )
            session.flush()
            return remember(
                session,
                tenant,
                key,
                fingerprint,
                status=202,
                body=AnalysisRead.of(row).model_dump_json(),
                location=location(request, "get_analysis", id=row.id),
            )

    return once_more_on_conflict(create)


def _read(parts: Parts, tenant: str, id_: str) -> AnalysisRead:
    with parts.database.read() as session:
        return AnalysisRead.of(one(session, AnalysisRow, tenant, "analysis", id_))


async def _until_made(parts: Parts, id_: str, seconds: float) -> None:
    def made() -> bool:
        with parts.database.read() as session:
            status = session.scalar(select(AnalysisRow.status).where(AnalysisRow.id == id_))
            return status != "analyzing"

    await parts.watcher.until(id_, made, seconds)
