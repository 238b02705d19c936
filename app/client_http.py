"""The client's connection: requests, waits and event streams, with its own errors."""

import hashlib
import json as jsonlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote

import httpx

from app.client_types import (
    Analysis,
    ApiError,
    Artifact,
    BrokenDownload,
    Conflict,
    Dataset,
    Event,
    InvalidRequest,
    InvalidUpload,
    Job,
    LimitReached,
    Model,
    NotAllowed,
    NotFound,
    ServiceFailure,
    Unreachable,
    WaitTimeout,
)
from app.domain.problems import Problem

CHUNK_BYTES = 1024 * 1024
Resource = TypeVar("Resource", Model, Dataset)
LIMIT_CODES = frozenset({"rate_limited", "quota_exceeded", "queue_full", "busy"})
OnProgress = Callable[[int, int], None]


class Connection:
    """HTTP to one service; every failure is raised as one of the client's errors."""

    def __init__(self, base_url: str, api_key: str | None, timeout: float) -> None:
        self.base_url = base_url
        self._timeout = timeout
        headers = {}
        if api_key and (key := api_key.strip()):
            if not re.fullmatch(r"[!-~]+", key):
                detail = "The API key holds characters that no key has; it begins with ls_."
                raise NotAllowed(401, {"code": "unauthenticated", "detail": detail})
            headers["Authorization"] = f"Bearer {key}"
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers=headers,
                timeout=httpx.Timeout(timeout, connect=10.0),
            )
            if self._http.base_url.scheme not in ("http", "https"):
                raise httpx.UnsupportedProtocol("it must begin with http:// or https://")
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Unreachable(f"'{base_url}' is no URL of a service: {error}") from None
        # As errors show it: a password in it is no one's business.
        self.base_url = str(self._http.base_url.copy_with(username=None, password=None)).rstrip("/")

    def close(self) -> None:
        """Close the sockets."""
        self._http.close()

    def json(self, method: str, url: str, **options: Any) -> Any:
        """The JSON of the answer."""
        answer = self.call(method, url, **options)
        try:
            return answer.json()
        except ValueError:
            raise _foreign(answer) from None

    def call(
        self,
        method: str,
        url: str,
        accept: tuple[int, ...] = (),
        patience: float = 0.0,
        **options: Any,
    ) -> httpx.Response:
        """The whole answer; `accept`: failures to return as answers instead of raising them."""
        try:
            return self._call_once(method, url, accept, patience, options)
        except Unreachable as error:
            # The service may close a connection just as it is used again: ask on a new one.
            dropped = isinstance(error.__cause__, httpx.ReadError | httpx.RemoteProtocolError)
            if method != "GET" or not dropped:
                raise
        return self._call_once(method, url, accept, patience, options)

    def _call_once(
        self,
        method: str,
        url: str,
        accept: tuple[int, ...],
        patience: float,
        options: dict[str, Any],
    ) -> httpx.Response:
        with self.stream(method, url, accept, patience, **options) as answer:
            answer.read()
            return answer

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        accept: tuple[int, ...] = (),
        patience: float = 0.0,
        **options: Any,
    ) -> Iterator[httpx.Response]:
        """An answer to be read as it comes; `patience`: seconds to wait beyond the timeout."""
        timeout = httpx.Timeout(self._timeout + patience, connect=10.0)
        try:
            with self._http.stream(method, url, timeout=timeout, **options) as answer:
                if not answer.is_success and answer.status_code not in accept:
                    answer.read()
                    raise _api_error(answer)
                yield answer
        except httpx.ConnectError as error:
            raise Unreachable(
                f"No service at {self.base_url} ({error});"
                " start one with `litesmith serve`, or name another URL"
            ) from error
        except httpx.TimeoutException as error:
            raise Unreachable(
                f"{self.base_url} did not answer {method} {url} in {timeout.read:g} s"
            ) from error
        except httpx.HTTPError as error:
            cause = str(error) or type(error).__name__
            raise Unreachable(f"The connection to {self.base_url} broke: {cause}") from error


def path_part(identifier: str) -> str:
    """An id as one part of a path, whatever the caller typed."""
    # "." and ".." would be resolved away by the URL's rules, and name another resource.
    return quote(identifier, safe="").replace(".", "%2E") or "%20"


def upload(
    connection: Connection,
    url: str,
    path: str | Path,
    params: Mapping[str, str],
    on_progress: OnProgress | None,
    patience: float = 0.0,
) -> Any:
    """POST a file as the body, streamed from disk; returns the answer."""
    with Path(path).open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        headers = {
            "Content-Length": str(total),
            "Content-Type": "application/octet-stream",
            "Idempotency-Key": str(uuid.uuid4()),
        }
        return connection.json(
            "POST",
            url,
            params=params,
            content=_file_chunks(file, total, on_progress),
            headers=headers,
            patience=patience,
        )


def analyze(
    connection: Connection,
    file: str | Path,
    params: Mapping[str, str],
    on_progress: OnProgress | None,
    wait: float,
) -> Analysis:
    """The analysis of a file or of the artifact with that id; WaitTimeout after `wait` seconds."""
    url, source, params = "/v1/analyze", str(file), {**params, "wait": f"{wait:g}"}
    if source.startswith("art_") and not Path(file).exists():
        named = {"artifact": source}
        answer = connection.json("POST", url, params=params, json=named, patience=wait)
    else:
        answer = upload(connection, url, file, params, on_progress, patience=wait)
    found = Analysis.model_validate(answer)
    if found.status != "ready":
        raise WaitTimeout(
            f"The analysis {found.id} was {found.status} after {wait:g} s; is a worker"
            " running? GET /readyz tells"
        )
    return found


def pages(
    connection: Connection, url: str, limit: int | None, query: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """The items of a list, page after page, or the first `limit` of them."""
    left = limit
    cursor: str | None = None
    while left is None or left > 0:
        params = {**(query or {}), "limit": str(min(left or 200, 200))}
        if cursor:
            params["cursor"] = cursor
        page = connection.json("GET", url, params=params)
        yield from page["items"] if left is None else page["items"][:left]
        left = None if left is None else left - len(page["items"])
        cursor = page.get("next_cursor")
        if not cursor:
            return


def _file_chunks(file: IO[bytes], total: int, on_progress: OnProgress | None) -> Iterator[bytes]:
    """The file's bytes in pieces, each reported as (bytes sent, bytes in all) once it is taken."""
    done = 0
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
        done += len(chunk)
        if on_progress:
            on_progress(done, total)


def download(connection: Connection, artifact: Artifact, target: Path) -> Path:
    """Download an artifact; the file appears there whole and verified, or BrokenDownload."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        url = f"/v1/artifacts/{path_part(artifact.id)}/content"
        with connection.stream("GET", url) as answer, part.open("wb") as file:
            for chunk in answer.iter_bytes(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != artifact.sha256:
            raise BrokenDownload(
                f"{artifact.file_name} ({artifact.id}) came with sha256 {digest.hexdigest()}"
                f" instead of {artifact.sha256}; download it again"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def download_all(connection: Connection, job: Job, folder: Path) -> list[Path]:
    """Download every artifact of a job into `folder`; returns the files' paths."""
    made = [*([job.baseline] if job.baseline else []), *job.variants]
    pairs = [(v.name, a) for v in made for a in v.artifacts]
    names = [Path(a.file_name).name for _, a in pairs]
    paths = []
    for (variant, artifact), name in zip(pairs, names, strict=True):
        # Names of two variants may be the same, and none may lead out of the folder.
        safe = name if name and names.count(name) == 1 else f"{variant}-{name or artifact.id}"
        paths.append(download(connection, artifact, folder / safe))
    return paths


def _api_error(answer: httpx.Response) -> ApiError:
    try:
        problem = answer.json()
    except ValueError:
        return _foreign(answer)
    if not isinstance(problem, dict):
        return _foreign(answer)
    status = answer.status_code
    kinds: dict[int, type[ApiError]] = {401: NotAllowed, 403: NotAllowed, 404: NotFound}
    kinds |= dict.fromkeys((400, 413, 415, 422), InvalidRequest) | {409: Conflict}
    if problem.get("code") in LIMIT_CODES:
        reached = LimitReached(status, problem)
        seconds = answer.headers.get("retry-after", "")
        reached.retry_after_s = float(seconds) if seconds.isdecimal() else None
        return reached
    kind = kinds.get(status, ServiceFailure if status >= 500 else ApiError)
    return kind(status, problem)


def _foreign(answer: httpx.Response) -> ServiceFailure:
    """The error for an answer that no Litesmith service gives."""
    detail = (
        f"{answer.request.url} answered {answer.status_code} with"
        f" {answer.headers.get('content-type') or 'no content type'}, not with JSON"
    )
    hint = "Is this the URL of a Litesmith service?"
    return ServiceFailure(answer.status_code, {"detail": detail, "hint": hint})


def _parse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Events of a text/event-stream, by the WHATWG rules that a sender of JSON makes use of."""
    name, identifier, data = "", None, list[str]()
    for line in lines:
        if not line:
            if data:
                try:
                    parsed = jsonlib.loads("\n".join(data))
                except ValueError:
                    parsed = {}
                if isinstance(parsed, dict):
                    yield Event(id=identifier, name=name or "message", data=parsed)
            name, identifier, data = "", None, []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "id" and value.isdigit():
            identifier = int(value)
        elif field == "data":
            data.append(value)


def follow(
    connection: Connection,
    job_id: str,
    ended: Callable[[], bool],
    last_event_id: int | None,
    patience: float,
) -> Iterator[Event]:
    """The events of a job until it has `ended()`, over as many connections as that takes."""
    broken_since, pause = None, 0.25
    while True:
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = str(last_event_id)
        try:
            path = f"/v1/jobs/{path_part(job_id)}/events"
            with connection.stream("GET", path, headers=headers) as answer:
                for event in _parse_events(answer.iter_lines()):
                    broken_since, pause = None, 0.25
                    last_event_id = last_event_id if event.id is None else event.id
                    yield event
                    # A job that was retried has the end of its earlier run in its events.
                    if event.name == "end" and ended():
                        return
            # The stream ended without its last event: cut off, or resumed after the end.
            if ended():
                return
        except LimitReached as error:
            time.sleep(error.retry_after_s or pause)
        except (Unreachable, ServiceFailure) as error:
            if isinstance(error, ServiceFailure) and error.status not in (502, 503, 504):
                raise
            now = time.monotonic()
            broken_since = broken_since or now
            if now - broken_since > patience:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 5.0)


def wait_ready(kind: str, get: Callable[[], Resource], timeout: float) -> Resource:
    """Ask until the upload is inspected; raises InvalidUpload or, in the end, WaitTimeout."""
    deadline = time.monotonic() + timeout
    pause = 0.05
    while True:
        found = get()
        if found.status == "invalid":
            unknown = Problem(code="invalid", message="the service gave no cause")
            raise InvalidUpload(kind, found.name, found.error or unknown)
        if found.status == "ready":
            return found
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"The {kind} {found.id} was still {found.status} after {timeout:g} s;"
                " is a worker running? GET /readyz tells"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)
