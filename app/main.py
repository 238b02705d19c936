"""The FastAPI application; app.serving serves it."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from ulid import ULID

from app import __version__
from app.api import (
    analyses,
    artifacts,
    datasets,
    jobs,
    keys,
    knowledge,
    models,
    resumable,
    service,
    usage,
    webhooks,
)
from app.api.access import scope_of
from app.api.analyses import AnalyzeArtifact
from app.api.deps import Parts, principal
from app.api.headers import SecurityHeaders
from app.api.keys import KeyCreate
from app.api.models import CatalogRequest
from app.api.ratelimit import RateLimiter, limited, stranger
from app.api.schemas import ProblemDetails
from app.api.watch import Watcher
from app.api.webhooks import WebhookChange, WebhookCreate
from app.config import Settings
from app.db import AWAY, Database
from app.domain.jobs import JobSpec
from app.errors import FieldError, ServiceError
from app.logging import request_id
from app.metrics import REQUEST_COUNT, REQUEST_SECONDS
from app.principal import Principal, confine
from app.queue import Doorbell
from app.services.advice import AdviseRequest
from app.storage import Storage, StorageAway, StorageFull, open_storage

log = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROBLEM = "application/problem+json"
SWEEP_S = 3600
# A status of the tus protocol, which HTTP itself does not have.
PHRASES = {460: "Checksum Mismatch"}


async def _sweep(storage: Storage) -> None:
    """Remove what uploads left on this machine's disk: it may be another than beat's."""
    while True:
        try:
            await to_thread.run_sync(storage.sweep)
        except OSError:
            log.exception("cannot remove what uploads left")
        await asyncio.sleep(SWEEP_S)


def create_app(settings: Settings) -> FastAPI:
    """The application over the database, storage and broker that `settings` name."""
    database = Database(settings.database)
    confine(database)
    parts = Parts(
        settings, database, open_storage(settings), Doorbell(settings.broker), Watcher(database)
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(parts.storage))
        yield
        sweeping.cancel()
        await parts.watcher.close()
        database.close()

    problem = {"model": ProblemDetails, "description": "A problem", "content": {PROBLEM: {}}}
    app = FastAPI(
        title="Litesmith",
        summary="Makes TensorFlow models small and fast for edge devices, and proves it.",
        version=__version__,
        lifespan=lifespan,
        dependencies=[Depends(principal), Depends(limited)],
        responses={"4XX": problem, 422: problem},
    )
    app.state.parts = parts
    on = settings.rate_limits == "on" or (settings.rate_limits == "auto" and settings.asks_for_keys)
    app.state.limiter = RateLimiter(settings) if on else None
    for module in (
        models,
        datasets,
        resumable,
        jobs,
        artifacts,
        analyses,
        usage,
        webhooks,
        knowledge,
        keys,
        service,
    ):
        app.include_router(module.router)
    app.middleware("http")(_identify)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[
                "Location",
                "X-Request-ID",
                "ETag",
                "Content-Range",
                "Content-Digest",
                "Repr-Digest",
                "Content-Disposition",
                "RateLimit",
                "RateLimit-Policy",
                "Retry-After",
                "Upload-Offset",
                "Upload-Length",
                "Upload-Metadata",
                "Upload-Expires",
                "Tus-Resumable",
                "Tus-Version",
                "Tus-Extension",
                "Tus-Max-Size",
                "Tus-Checksum-Algorithm",
            ],
        )
    app.add_middleware(SecurityHeaders)
    app.exception_handler(ServiceError)(_service_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    for away in AWAY:
        app.exception_handler(away)(_database_away)
    app.exception_handler(StorageFull)(_storage_full)
    app.exception_handler(StorageAway)(_storage_away)
    app.exception_handler(HTTPException)(_http_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema, with the bodies that are parsed by hand and with problems
    in the media type that they are sent in."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    components = schema["components"]["schemas"]
    by_hand = (
        JobSpec,
        CatalogRequest,
        AdviseRequest,
        AnalyzeArtifact,
        KeyCreate,
        WebhookCreate,
        WebhookChange,
    )
    _, bodies = models_json_schema(
        [(body, "validation") for body in by_hand],
        ref_template="#/components/schemas/{model}",
    )
    components.update({**bodies["$defs"], **components})
    asks_for_keys = app.state.parts.settings.asks_for_keys
    if asks_for_keys:
        schema["components"]["securitySchemes"] = {
            "api_key": {"type": "http", "scheme": "bearer", "description": "An API key: ls_…"}
        }
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            scope = scope_of(method.upper(), path)
            if asks_for_keys and scope is not None:
                operation["security"] = [{"api_key": [scope]}]
            for status in ("4XX", "422"):
                content = operation["responses"].get(status, {}).get("content", {})
                if "application/json" in content:
                    content[PROBLEM] = content.pop("application/json")
    app.openapi_schema = schema
    return schema


async def _identify(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Give the request an id, and count it."""
    given = request.headers.get("x-request-id", "")
    id_ = given if REQUEST_ID.fullmatch(given) else str(ULID()).lower()
    token = request_id.set(id_)
    started = time.perf_counter()
    try:
        response = await call_next(request)
    except Exception as error:
        # Here, not in the outermost layer: this answer has its request id and CORS headers too.
        response = _unexpected(request, error)
    finally:
        request_id.reset(token)
    seconds = time.perf_counter() - started
    response.headers["X-Request-ID"] = id_
    if rate := getattr(request.state, "rate", None):
        response.headers.update(rate.headers())
    route = getattr(request.scope.get("route"), "path", "none")
    REQUEST_COUNT.labels(request.method, route, response.status_code).inc()
    REQUEST_SECONDS.labels(request.method, route).observe(seconds)
    who: Principal | None = getattr(request.state, "principal", None)
    log.info(
        "request",
        extra={
            "request_id": id_,
            "tenant": who.tenant_id if who else None,
            "key": who.key_id if who else None,
            "method": request.method,
            "path": request.url.path,
            "status": response.status_code,
            "duration_ms": round(seconds * 1000, 1),
        },
    )
    return response


def _problem(
    status: int,
    code: str,
    detail: str,
    hint: str | None = None,
    errors: list[FieldError] | None = None,
) -> Response:
    body = ProblemDetails(
        type=f"urn:litesmith:problem:{code}",
        title=PHRASES.get(status) or HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        hint=hint,
        errors=errors or [],
        request_id=request_id.get(),
    )
    return Response(body.model_dump_json(exclude_none=True), status, media_type=PROBLEM)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    if error.status == 401:
        try:
            await stranger(request)
        except ServiceError as too_often:
            error = too_often
    response = _problem(error.status, error.code, error.detail, error.hint, error.errors)
    response.headers.update(error.headers)
    return response


async def _database_away(_: Request, error: Exception) -> Response:
    log.error("the database does not answer", exc_info=error)
    response = _problem(
        503, "unavailable", "The database does not answer.", "Try again in a moment."
    )
    response.headers["Retry-After"] = "5"
    return response


async def _storage_full(_: Request, error: Exception) -> Response:
    log.error("the storage is full", exc_info=error)
    return _problem(
        507,
        "insufficient_storage",
        "The service has no room for it; nothing was changed.",
        "Tell the operator; deleting jobs, models and datasets makes room after about an hour.",
    )


async def _storage_away(_: Request, error: Exception) -> Response:
    log.error("the storage does not answer", exc_info=error)
    response = _problem(
        503, "unavailable", "The storage does not answer.", "Try again in a moment."
    )
    response.headers["Retry-After"] = "5"
    return response


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        FieldError(field=".".join(str(part) for part in e["loc"][1:]), message=e["msg"])
        for e in error.errors()
    ]
    detail = "; ".join(f"{e.field}: {e.message}" for e in errors)[:500]
    return _problem(422, "validation_error", detail, errors=errors)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    response = _problem(error.status_code, codes.get(error.status_code, "error"), error.detail)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> list[str]:
    """What the path supports: the router knows only of the first route that matched it."""
    found = set()
    for path, operations in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", path), request.url.path):
            found |= {method.upper() for method in operations}
    return sorted(found)


def _unexpected(request: Request, error: Exception) -> Response:
    log.error("unexpected error", exc_info=error, extra={"path": request.url.path})
    return _problem(
        500,
        "internal_error",
        "The service failed at this request; nothing was changed.",
        "Report it with the request_id.",
    )
