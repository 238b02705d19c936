"""What the api answers with, made from rows."""

import re
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from app.domain.budgets import Verdict
from app.domain.edgetpu import CompilerReport, EdgeTpuAdvice, EdgeTpuMemory, EdgeTpuOp
from app.domain.ethos_u import EthosUReport
from app.domain.jobs import Status
from app.domain.metrics import Metrics
from app.domain.micro import MicroReport
from app.domain.problems import Note, Problem
from app.domain.work import EpochFigures, FeatureFact, SplitFact, TensorFact
from app.errors import FieldError
from app.services import jobs, starting
from app.tables import (
    AnalysisRow,
    ArtifactRow,
    DatasetRow,
    JobRow,
    ModelRow,
    PartialRow,
    VariantRow,
)


class ProblemDetails(BaseModel):
    """RFC 9457, with a stable `code`, a `hint` and the fields at fault."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str | None = None
    errors: list[FieldError] = []
    request_id: str | None = None


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    items: list[Item]
    next_cursor: str | None


UploadStatus = Literal["inspecting", "ready", "invalid"]


class ModelRead(BaseModel):
    id: str
    name: str
    format: str
    sha256: str | None
    size_bytes: int | None
    origin: str | None
    parameters: int | None
    inputs: list[TensorFact]
    outputs: list[TensorFact]
    trainable: bool | None
    notes: list[Note]
    status: UploadStatus
    error: Problem | None
    created_at: datetime

    @staticmethod
    def of(row: ModelRow) -> "ModelRead":
        facts = row.facts or {}
        upload = _upload(row)
        if starting.to_be_made(row):
            upload |= {"sha256": None, "size_bytes": None}
        return ModelRead(
            **upload,
            origin=row.origin,
            parameters=facts.get("parameters"),
            inputs=facts.get("inputs", []),
            outputs=facts.get("outputs", []),
            trainable=facts.get("trainable"),
            notes=facts.get("notes", []),
        )


class PartialRead(BaseModel):
    """An upload in several requests. `offset`: bytes that are there, null where they are lost;
    `model` or `dataset`: what it became."""

    id: str
    kind: Literal["model", "dataset"]
    name: str | None
    sha256: str | None
    length: int
    offset: int | None
    model: str | None
    dataset: str | None
    created_at: datetime
    expires_at: datetime

    @staticmethod
    def of(row: PartialRow, offset: int | None) -> "PartialRead":
        return PartialRead(
            id=row.id,
            kind="model" if row.kind == "model" else "dataset",
            name=row.name,
            sha256=row.announced_sha256,
            length=row.length,
            offset=offset,
            model=row.subject_id if row.kind == "model" else None,
            dataset=row.subject_id if row.kind == "dataset" else None,
            created_at=row.created_at,
            expires_at=row.expires_at,
        )


class DatasetRead(BaseModel):
    id: str
    name: str
    format: str
    sha256: str
    size_bytes: int
    splits: dict[str, SplitFact]
    features: list[FeatureFact]
    classes: list[str]
    warnings: list[Note]
    status: UploadStatus
    error: Problem | None
    created_at: datetime

    @staticmethod
    def of(row: DatasetRow) -> "DatasetRead":
        facts = row.facts or {}
        return DatasetRead(
            **_upload(row),
            splits=facts.get("splits", {}),
            features=facts.get("features", []),
            classes=facts.get("classes", []),
            warnings=facts.get("warnings", []),
        )


def _upload(row: ModelRow | DatasetRow) -> dict[str, Any]:
    names = ("id", "name", "format", "sha256", "size_bytes", "status", "error", "created_at")
    return {name: getattr(row, name) for name in names}


_SEGMENT = re.compile(r"_segment_(\d+)_of_\d+_edgetpu\.tflite$")


def told_of(row: ArtifactRow, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """What the target's tool told of this file, of all that its variant's metrics hold."""
    found: dict[str, Any] | None
    match row.kind:
        case "edgetpu_tflite":
            found = (metrics.get("edgetpu") or {}).get("compiler")
            segment = _SEGMENT.search(row.file_name)
            return found["segments"][int(segment[1])] if found and segment else found
        case "ethos_u_tflite":
            found = metrics.get("ethos_u")
        case "c_array":
            found = metrics.get("micro")
        case _:
            found = None
    return found


class ArtifactRead(BaseModel):
    """`metrics`: what the compiler or runtime of the job's target told of this file."""

    id: str
    job: str
    variant: str
    kind: str
    file_name: str
    sha256: str
    size_bytes: int
    gzip_size_bytes: int
    metrics: CompilerReport | EthosUReport | MicroReport | None
    created_at: datetime

    @staticmethod
    def of(row: ArtifactRow, variant: VariantRow) -> "ArtifactRead":
        names = ("id", "kind", "file_name", "sha256", "size_bytes", "gzip_size_bytes", "created_at")
        return ArtifactRead.model_validate(
            {name: getattr(row, name) for name in names}
            | {"job": row.job_id, "variant": row.variant_id}
            | {"metrics": told_of(row, variant.metrics or {})}
        )


class AnalysisRead(BaseModel):
    """What a target makes of a .tflite file. From `ops` on, fields are null until it is `ready`;
    `failure` says why the compiler would refuse the file, `error` why there is no analysis."""

    id: str
    status: Literal["analyzing", "ready", "invalid"]
    sha256: str
    size_bytes: int
    target: str
    compiler: str
    multiple_subgraphs: bool
    ops: list[EdgeTpuOp] | None = None
    mapped: int | None = None
    cpu: int | None = None
    subgraphs: int | None = None
    memory: EdgeTpuMemory | None = None
    advice: list[EdgeTpuAdvice] | None = None
    failure: Problem | None = None
    error: Problem | None
    created_at: datetime

    @staticmethod
    def of(row: AnalysisRow) -> "AnalysisRead":
        names = ("id", "status", "sha256", "size_bytes", "error", "created_at")
        return AnalysisRead(
            **{name: getattr(row, name) for name in names} | row.options | (row.result or {})
        )


class TrainedStage(BaseModel):
    """One step of a recipe that trained: `epochs` were run, the weights are those of `best_epoch`
    (from 1). `seconds` is what it took this job: nothing where the stage was made before."""

    technique: str
    epochs: int
    best_epoch: int | None
    samples: int
    distilled: bool
    seconds: float
    cached: bool
    history: list[EpochFigures]


class VariantRead(BaseModel):
    id: str
    name: str
    recipe: list[dict[str, Any]]
    status: Status
    stage: str | None
    progress: float
    metrics: Metrics | None
    notes: list[Note]
    training: list[TrainedStage]
    artifacts: list[ArtifactRead]
    error: Problem | None
    cached: bool
    seconds: float | None

    @staticmethod
    def of(row: VariantRow) -> "VariantRead":
        return VariantRead(
            id=row.id,
            name=row.name,
            recipe=row.recipe,
            status=Status(row.status),
            stage=row.stage,
            progress=row.progress,
            metrics=Metrics.model_validate(row.metrics) if row.metrics else None,
            notes=[Note.model_validate(note) for note in row.notes],
            training=[TrainedStage.model_validate(stage) for stage in row.training],
            artifacts=[ArtifactRead.of(artifact, row) for artifact in row.artifacts],
            error=Problem.model_validate(row.error) if row.error else None,
            cached=row.cached,
            seconds=row.seconds,
        )


class JobRead(BaseModel):
    id: str
    status: Status
    progress: float
    model: str
    model_name: str | None
    dataset: str | None
    spec: dict[str, Any]
    splits: str | None
    baseline: VariantRead
    variants: list[VariantRead]
    verdict: Verdict | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: Problem | None
    queue_position: int | None

    @staticmethod
    def of(row: JobRow, queue_position: int | None = None) -> "JobRead":
        return JobRead(
            id=row.id,
            status=Status(row.status),
            progress=jobs.progress(row),
            model=row.model_id,
            model_name=(row.plan or {}).get("model_name"),
            dataset=row.spec.get("dataset"),
            spec=row.spec,
            splits=row.splits,
            baseline=VariantRead.of(jobs.baseline(row)),
            variants=[VariantRead.of(variant) for variant in jobs.requested(row)],
            verdict=Verdict.model_validate(row.verdict) if row.verdict else None,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            error=Problem.model_validate(row.error) if row.error else None,
            queue_position=queue_position,
        )
