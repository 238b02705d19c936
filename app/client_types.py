"""What the client raises and returns; the tree of errors stands in `app.client`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from app.domain.edgetpu import EdgeTpuAdvice, EdgeTpuMemory, EdgeTpuOp
from app.domain.metrics import Metrics
from app.domain.problems import Note, Problem
from app.domain.table import problem_text, text_table

FINISHED = frozenset({"succeeded", "partial", "failed", "cancelled"})


class LitesmithError(Exception):
    """The base of everything that the client raises on purpose."""


class Unreachable(LitesmithError):
    """No service answers at the URL, or the connection broke."""


class ApiError(LitesmithError):
    """The service answered with a problem; what it said is in the attributes."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code") or f"http_{status}")
        self.title = str(problem.get("title") or f"HTTP {status}")
        self.detail = str(problem.get("detail") or self.title)
        self.hint: str | None = problem.get("hint")
        self.errors: list[dict[str, Any]] = problem.get("errors") or []
        self.request_id: str | None = problem.get("request_id")
        super().__init__(f"{self.detail} ({self.code}, HTTP {status})")


class InvalidRequest(ApiError):
    """What was sent is refused; `errors` names the fields."""


class NotAllowed(ApiError):
    """The API key is missing, wrong, or may not do this."""


class NotFound(ApiError):
    """There is nothing under this id."""


class Conflict(ApiError):
    """The request does not fit the state that the resource is in."""


class LimitReached(ApiError):
    """More than a rate, a quota or the queue allows; after `retry_after_s` it may be otherwise
    (None: waiting does not help)."""

    retry_after_s: float | None = None


class ServiceFailure(ApiError):
    """The service failed, or something that is not the service answered."""


class InvalidUpload(LitesmithError):
    """The service took a model or dataset and found it unusable."""

    def __init__(self, kind: str, name: str, problem: Problem) -> None:
        self.problem = problem
        super().__init__(f"The {kind} '{name}' is invalid: {problem_text(problem.model_dump())}")


class BrokenDownload(LitesmithError):
    """The bytes that came do not have the sha256 that was promised."""


class WaitTimeout(LitesmithError):
    """It was not ready in the time given."""


class View(BaseModel):
    """What the service answered; fields that this client does not know are kept."""

    model_config = ConfigDict(extra="allow")


class Tensor(View):
    name: str
    shape: list[int]
    dtype: str


class Model(View):
    id: str
    name: str
    status: str
    format: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    origin: str | None = None
    parameters: int | None = None
    inputs: list[Tensor] | None = None
    outputs: list[Tensor] | None = None
    trainable: bool | None = None
    error: Problem | None = None
    created_at: datetime | None = None


class Split(View):
    samples: int
    labelled: bool


class Dataset(View):
    id: str
    name: str
    status: str
    format: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    splits: dict[str, Split] | None = None
    classes: list[str] | None = None
    warnings: list[Note] | None = None
    error: Problem | None = None
    created_at: datetime | None = None


class Artifact(View):
    id: str
    kind: str
    file_name: str
    sha256: str
    size_bytes: int
    gzip_size_bytes: int | None = None
    variant: str | None = None


class Analysis(View):
    """What a target makes of a .tflite file. `failure`: why the compiler would refuse it."""

    id: str
    status: str
    sha256: str
    size_bytes: int
    target: str
    compiler: str
    ops: list[EdgeTpuOp] | None = None
    mapped: int | None = None
    cpu: int | None = None
    subgraphs: int | None = None
    memory: EdgeTpuMemory | None = None
    advice: list[EdgeTpuAdvice] | None = None
    failure: Problem | None = None


class TrainedStage(View):
    """One step of a recipe that trained."""

    technique: str
    epochs: int
    best_epoch: int | None = None
    samples: int | None = None
    distilled: bool | None = None
    seconds: float | None = None
    cached: bool = False
    history: list[dict[str, Any]] = []


class Variant(View):
    name: str
    status: str
    id: str | None = None
    recipe: list[dict[str, Any]] | None = None
    stage: str | None = None
    progress: float | None = None
    metrics: Metrics | None = None
    notes: list[Note] = []
    training: list[TrainedStage] = []
    artifacts: list[Artifact] = []
    error: Problem | None = None
    cached: bool = False

    @field_validator("metrics", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None


class Check(View):
    variant: str
    budget: str
    limit: float | bool
    value: float | bool | None
    passed: bool


class Verdict(View):
    verdict: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


class Job(View):
    id: str
    status: str
    progress: float = 0.0
    model: str | None = None
    dataset: str | None = None
    spec: dict[str, Any] = {}
    baseline: Variant | None = None
    variants: list[Variant] = []
    verdict: Verdict | None = None
    error: Problem | None = None
    queue_position: int | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    @property
    def ok(self) -> bool:
        """Every variant was delivered, and no budget is broken."""
        return self.status == "succeeded" and (self.verdict is None or self.verdict.passed)

    def table(self) -> str:
        """The comparison table as plain text."""
        return text_table(self.model_dump(mode="json"))


class Event(View):
    """One event of a job: `name` is job, variant or end; `data` is its JSON."""

    id: int | None
    name: str
    data: dict[str, Any]
