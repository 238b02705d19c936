"""The Python client of the service.

    from app.client import Client

    with Client() as client:
        job = client.optimize("model.keras", "data.npz", variants=["int8"], out="out")
    print(job.table())

What can go wrong:

    LitesmithError
    ├── Unreachable          no service answers at the URL, or the connection broke
    ├── ApiError             the service answered with a problem (RFC 9457): `status, code, title,
    │   │                    detail, hint, errors, request_id`
    │   ├── InvalidRequest   400, 413, 415, 422: what was sent is refused
    │   ├── NotAllowed       401, 403: the API key is missing, wrong, or may not do this
    │   ├── NotFound         404
    │   ├── LimitReached     429, 503, 507: a rate, a quota or the queue; `retry_after_s`
    │   ├── Conflict         409: it does not fit the state that the resource is in
    │   └── ServiceFailure   5xx, or an answer that is not the service's
    ├── InvalidUpload        the service took a model or dataset and found it unusable: `problem`
    ├── BrokenDownload       the bytes that came do not have the sha256 that was promised
    └── WaitTimeout          it was not ready in the time given
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from app.client_http import (
    Connection,
    OnProgress,
    analyze,
    download,
    download_all,
    follow,
    pages,
    path_part,
    wait_ready,
)
from app.client_resume import send
from app.client_types import (
    Analysis,
    ApiError,
    Artifact,
    BrokenDownload,
    Check,
    Conflict,
    Dataset,
    Event,
    InvalidRequest,
    InvalidUpload,
    Job,
    LimitReached,
    LitesmithError,
    Model,
    NotAllowed,
    NotFound,
    ServiceFailure,
    Unreachable,
    Variant,
    Verdict,
    WaitTimeout,
)
from app.client_webhooks import Webhooks
from app.domain.edgetpu import DEFAULT_COMPILER

__all__ = [
    "Analysis",
    "ApiError",
    "Artifact",
    "BrokenDownload",
    "Check",
    "Client",
    "Conflict",
    "Dataset",
    "Event",
    "InvalidRequest",
    "InvalidUpload",
    "Job",
    "LimitReached",
    "LitesmithError",
    "Model",
    "NotAllowed",
    "NotFound",
    "ServiceFailure",
    "Unreachable",
    "Variant",
    "Verdict",
    "WaitTimeout",
]

DEFAULT_URL = "http://127.0.0.1:8000"
# The service answers a `wait` longer than this with an error.
LONGEST_WAIT_S = 600.0

OnEvent = Callable[[Event], None]
Source = str | Path
Variants = Sequence[str | Mapping[str, Any]] | Literal["auto"]


class Client:
    """A connection to one service; use it as a context manager.

    `timeout` is the longest silence, in seconds, that a call stands before it raises Unreachable.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, api_key: str | None = None, timeout: float = 60.0
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._connection = Connection(self.base_url, api_key, timeout)
        self.webhooks = Webhooks(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    # Models and datasets

    def upload_model(
        self,
        path: Source,
        name: str | None = None,
        on_progress: OnProgress | None = None,
        *,
        resumable: bool | None = None,
        patience: float = 120.0,
    ) -> Model:
        """Upload a model file, streamed from disk; the same bytes again give the same model.

        `on_progress` is called with (bytes sent, bytes in all). The model's inspection may still
        run when this returns: see `wait_model`. A `resumable` upload (by itself from 64 MiB on)
        survives broken connections: it goes on by itself until nothing came through for `patience`
        seconds, and the same call goes on later.
        """
        how = (on_progress, resumable, patience)
        return Model.model_validate(send(self._connection, "model", Path(path), name, *how))

    def upload_dataset(
        self,
        path: Source,
        name: str | None = None,
        on_progress: OnProgress | None = None,
        *,
        resumable: bool | None = None,
        patience: float = 120.0,
    ) -> Dataset:
        """Upload a dataset file, as `upload_model`."""
        how = (on_progress, resumable, patience)
        return Dataset.model_validate(send(self._connection, "dataset", Path(path), name, *how))

    def model_from_catalog(self, catalog: str, weights: str = "imagenet", seed: int = 0) -> Model:
        """Bring in a model of `catalog()`; a worker makes it: see `wait_model`."""
        body = {"catalog": catalog, "weights": weights, "seed": seed}
        return Model.model_validate(self._connection.json("POST", "/v1/models", json=body))

    def models(self, limit: int | None = None) -> Iterator[Model]:
        """All models, newest first, or the first `limit` of them."""
        return (Model.model_validate(item) for item in pages(self._connection, "/v1/models", limit))

    def datasets(self, limit: int | None = None) -> Iterator[Dataset]:
        """All datasets, newest first, or the first `limit` of them."""
        found = pages(self._connection, "/v1/datasets", limit)
        return (Dataset.model_validate(item) for item in found)

    def model(self, model_id: str) -> Model:
        """One model."""
        path = f"/v1/models/{path_part(model_id)}"
        return Model.model_validate(self._connection.json("GET", path))

    def dataset(self, dataset_id: str) -> Dataset:
        """One dataset."""
        path = f"/v1/datasets/{path_part(dataset_id)}"
        return Dataset.model_validate(self._connection.json("GET", path))

    def delete_model(self, model_id: str) -> None:
        """Delete a model; raises Conflict while a job runs on it."""
        self._connection.call("DELETE", f"/v1/models/{path_part(model_id)}")

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a dataset; raises Conflict while a job runs on it."""
        self._connection.call("DELETE", f"/v1/datasets/{path_part(dataset_id)}")

    def wait_model(self, model_id: str, timeout: float = 600.0) -> Model:
        """Wait until a model is inspected; raises InvalidUpload where it is unusable."""
        return wait_ready("model", lambda: self.model(model_id), timeout)

    def wait_dataset(self, dataset_id: str, timeout: float = 600.0) -> Dataset:
        """Wait until a dataset is inspected; raises InvalidUpload where it is unusable."""
        return wait_ready("dataset", lambda: self.dataset(dataset_id), timeout)

    # Jobs

    def submit(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> Job:
        """Submit a job, as the body of `POST /v1/jobs`.

        Without a key of yours each call has its own, so that a request whose answer was lost is
        sent once more without making a second job.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        try:
            answer = self._connection.json("POST", "/v1/jobs", json=dict(spec), headers=headers)
        except Unreachable:
            answer = self._connection.json("POST", "/v1/jobs", json=dict(spec), headers=headers)
        return Job.model_validate(answer)

    def job(self, job_id: str, wait: float | None = None) -> Job:
        """One job; with `wait`, once it has ended or after so many seconds (at most 600)."""
        params = {} if wait is None else {"wait": f"{min(wait, LONGEST_WAIT_S):g}"}
        path = f"/v1/jobs/{path_part(job_id)}"
        found = self._connection.json("GET", path, params=params, patience=wait or 0.0)
        return Job.model_validate(found)

    def jobs(
        self, status: str | None = None, model: str | None = None, limit: int | None = None
    ) -> Iterator[Job]:
        """All jobs, newest first, or the first `limit` of them."""
        query = {k: v for k, v in (("status", status), ("model", model)) if v is not None}
        found = pages(self._connection, "/v1/jobs", limit, query)
        return (Job.model_validate(item) for item in found)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; raises Conflict where it is finished."""
        path = f"/v1/jobs/{path_part(job_id)}/cancel"
        return Job.model_validate(self._connection.json("POST", path))

    def retry(self, job_id: str) -> Job:
        """Run again what did not succeed."""
        path = f"/v1/jobs/{path_part(job_id)}/retry"
        return Job.model_validate(self._connection.json("POST", path))

    def delete_job(self, job_id: str) -> None:
        """Delete a job with all that it made; raises Conflict before it has ended."""
        self._connection.call("DELETE", f"/v1/jobs/{path_part(job_id)}")

    def events(
        self, job_id: str, last_event_id: int | None = None, patience: float = 60.0
    ) -> Iterator[Event]:
        """The job's events as they come, until it ends.

        A connection that breaks is taken up again after the last event that came; Unreachable is
        raised when that has not worked for `patience` seconds.
        """

        def ended() -> bool:
            return self.job(job_id).finished

        return follow(self._connection, job_id, ended, last_event_id, patience)

    def verdict(self, job_id: str) -> Verdict:
        """Whether the budgets hold; raises Conflict while the job runs."""
        path = f"/v1/jobs/{path_part(job_id)}/verdict"
        # 412 is the answer of a broken budget, with the same body.
        return Verdict.model_validate(self._connection.call("GET", path, accept=(412,)).json())

    def report(self, job_id: str, format: str = "markdown") -> str:
        """The job's report: json, markdown, html, csv or junit."""
        path = f"/v1/jobs/{path_part(job_id)}/report"
        return self._connection.call("GET", path, params={"format": format}).text

    def download(self, artifact: Artifact | str, path: Source) -> Path:
        """Download an artifact to `path`; the file appears there whole and verified, or not.

        Raises BrokenDownload where the bytes do not have the artifact's sha256.
        """
        if isinstance(artifact, str):
            found = self._connection.json("GET", f"/v1/artifacts/{path_part(artifact)}")
            artifact = Artifact.model_validate(found)
        return download(self._connection, artifact, Path(path))

    def download_all(self, job: Job | str, folder: Source) -> list[Path]:
        """Download every artifact of a job into `folder`; returns the files' paths."""
        found = self.job(job) if isinstance(job, str) else job
        return download_all(self._connection, found, Path(folder))

    def analyze(
        self,
        file: Source,
        compiler: str = DEFAULT_COMPILER,
        multiple_subgraphs: bool = False,
        *,
        timeout: float = LONGEST_WAIT_S,
        on_progress: OnProgress | None = None,
    ) -> Analysis:
        """What maps to the Edge TPU of a .tflite file: a path, or an artifact's id (`art_…`).

        Raises InvalidRequest for a file that cannot be analyzed, and WaitTimeout when that takes
        longer than `timeout` seconds.
        """
        params = {"compiler": compiler, "multiple_subgraphs": str(multiple_subgraphs).lower()}
        wait = min(timeout, LONGEST_WAIT_S)
        return analyze(self._connection, file, params, on_progress, wait)

    def usage(self) -> dict[str, Any]:
        """What your tenant uses (`used`), and its `limits`; None is no limit."""
        found: dict[str, Any] = self._connection.json("GET", "/v1/usage")
        return found

    def techniques(self) -> list[dict[str, Any]]:
        """Each technique: the data it needs, its expected effect and its options."""
        return self._items("/v1/techniques")

    def targets(self) -> list[dict[str, Any]]:
        """Each target: the recipes it takes, what is measured, whether its compiler is there."""
        return self._items("/v1/targets")

    def catalog(self) -> list[dict[str, Any]]:
        """Models to start from, with parameters, published accuracy, licence and source."""
        return self._items("/v1/catalog")

    def advise(
        self, model: Source | None = None, dataset: Source | None = None, **situation: Any
    ) -> dict[str, Any]:
        """Recipes worth trying, best first, and why not the others: as `POST /v1/advise`.

        `model` and `dataset` are paths or ids, as for `optimize`; both may be left out.
        """
        body = dict(situation)
        if model is not None:
            body["model"] = self.wait_model(self._given(model, "mdl_", None)).id
        if dataset is not None:
            body["dataset"] = self.wait_dataset(self._given(dataset, "dat_", None)).id
        found: dict[str, Any] = self._connection.json("POST", "/v1/advise", json=body)
        return found

    def _items(self, path: str) -> list[dict[str, Any]]:
        answer = self._connection.json("GET", path)
        return list(answer["items"] if isinstance(answer, dict) else answer)

    def optimize(
        self,
        model: Source,
        dataset: Source | None = None,
        variants: Variants = ("float16", "dynamic_range", "int8"),
        out: Source | None = None,
        *,
        on_upload: Callable[[Path, int, int], None] | None = None,
        on_event: OnEvent | None = None,
        wait: bool = True,
        **spec: Any,
    ) -> Job:
        """Upload, submit, wait and download in one call; returns the finished job.

        `model` and `dataset` are paths, or ids (`mdl_…`, `dat_…`) of what is there already; `spec`
        takes every other field of a job (`budgets`, `preprocessing`, `calibration_dataset`, …).
        With `out`, the files and the reports are written into that folder. `wait=False` returns
        the job as soon as it is accepted.
        """
        asked = variants if variants == "auto" else list(variants)
        body: dict[str, Any] = {**spec, "variants": asked}
        body["model"] = self._given(model, "mdl_", on_upload)
        if dataset is not None:
            body["dataset"] = dataset
        kinds = ("calibration", "training", "evaluation")
        for role in ("dataset", *(f"{kind}_dataset" for kind in kinds)):
            if body.get(role) is not None:
                body[role] = self._given(body[role], "dat_", on_upload)
        self.wait_model(body["model"])
        for role, given in body.items():
            if role.endswith("dataset") and given is not None:
                self.wait_dataset(given)
        job = self.submit(body)
        if not wait:
            return job
        for event in self.events(job.id):
            if on_event:
                on_event(event)
        job = self.job(job.id, wait=LONGEST_WAIT_S)
        if out is not None:
            self.save(job, out)
        return job

    def save(self, job: Job, folder: Source) -> list[Path]:
        """Write a finished job's files and its report (.md, .json, .html) into `folder`."""
        paths = self.download_all(job, folder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for format, suffix in (("markdown", "md"), ("json", "json"), ("html", "html")):
            path = Path(folder) / f"report.{suffix}"
            path.write_text(self.report(job.id, format), encoding="utf-8")
            paths.append(path)
        return paths

    def _given(
        self, source: Source, prefix: str, on_upload: Callable[[Path, int, int], None] | None
    ) -> str:
        """The id of what the caller named: an id as it stands, a path uploaded."""
        path = Path(source)
        if str(source).startswith(prefix) and not path.exists():
            return str(source)

        def progress(done: int, total: int) -> None:
            if on_upload:
                on_upload(path, done, total)

        upload = self.upload_model if prefix == "mdl_" else self.upload_dataset
        return upload(path, on_progress=progress).id
