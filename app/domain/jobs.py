"""The spec of a job, as requested, and the states it goes through."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from app.domain.advise import Goal
from app.domain.budgets import Budgets
from app.domain.recipes import TechniqueId
from app.domain.targets import TargetId, options_of
from app.domain.work import Preprocessing


class Status(StrEnum):
    """Of a job or a variant; a variant is never `partial`, a job never `skipped`."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    partial = "partial"
    failed = "failed"
    cancelled = "cancelled"
    skipped = "skipped"


ACTIVE = frozenset({Status.queued, Status.running})
TERMINAL = frozenset(Status) - ACTIVE


class StepRequest(BaseModel):
    """A technique and its options; GET /v1/techniques gives each technique's options."""

    model_config = ConfigDict(extra="allow")

    technique: str = Field(description=f"One of: {', '.join(TechniqueId)}")


class VariantRequest(BaseModel):
    """A recipe with options, and a name for what it makes."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    # Judged by parse_variant, which says why the grammar forbids what it forbids.
    recipe: list[StepRequest | str]


class EvaluationRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    metric: Literal["auto", "accuracy", "mse", "none"] = "auto"
    max_samples: int = Field(default=5000, ge=1, le=1_000_000)
    time_limit_s: float | None = Field(
        default=None, gt=0, le=3600, description="Per variant; the service's setting by default."
    )


class LatencyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    runs: int = Field(default=50, ge=5, le=10_000)
    threads: int = Field(default=1, ge=1, le=64)


class TrainingRequest(BaseModel):
    """Of all techniques that train; a step's own options win. None leaves a technique's default."""

    model_config = ConfigDict(extra="forbid")

    distill: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Train towards the answers of the model as it came. `auto`: where the training"
        " data has no labels; `on`: mixed with the labels.",
    )
    epochs: int | None = Field(default=None, ge=1, le=1000)
    batch_size: int | None = Field(default=None, ge=1, le=65_536)
    learning_rate: float | None = Field(default=None, gt=0, le=10)
    patience: int | None = Field(default=None, ge=1, le=1000)
    time_limit_s: float | None = Field(default=None, gt=0, le=86_400)

    def options(self) -> dict[str, Any]:
        """What is given of the options that every technique that trains has."""
        return self.model_dump(exclude={"distill"}, exclude_none=True)


class LimitsRequest(BaseModel):
    """Lower limits than the service's own, for each process: the preparation, each step that
    trains, and the making of each variant's file."""

    model_config = ConfigDict(extra="forbid")

    deadline_s: float | None = Field(default=None, gt=0, le=86_400)
    memory_bytes: int | None = Field(default=None, ge=2**28)


Shape = Annotated[list[Annotated[int, Field(ge=1, le=65_536)]], Field(min_length=1, max_length=6)]
Variants = Annotated[list[str | VariantRequest], Field(min_length=1, max_length=50)]
PRIORITIES = {"low": -10, "normal": 0, "high": 10}


class JobSpec(BaseModel):
    """What a job is asked to do. `model` and the datasets are ids; multipart requests may send
    the files instead."""

    model_config = ConfigDict(extra="forbid")

    model: str
    dataset: str | None = None
    calibration_dataset: str | None = None
    training_dataset: str | None = None
    evaluation_dataset: str | None = None
    variants: Variants | Literal["auto"] = Field(
        description='Recipes; or "auto": the three best of what POST /v1/advise would recommend.'
    )
    goal: Goal | None = Field(
        default=None, description='What "auto" aims at; balanced where it is not given.'
    )
    target: TargetId = "cpu"
    target_options: dict[str, Any] = Field(
        default={}, description="Of the target's compiler; GET /v1/targets has their schema."
    )
    evaluation: EvaluationRequest = EvaluationRequest()
    latency: LatencyRequest = LatencyRequest()
    training: TrainingRequest = TrainingRequest()
    preprocessing: Preprocessing | None = None
    input_shapes: dict[str, Shape] = Field(
        default={},
        max_length=64,
        description="Input name -> full shape with batch, for sizes that the model leaves open.",
    )
    budgets: Budgets = Budgets()
    limits: LimitsRequest = LimitsRequest()
    priority: Literal["low", "normal", "high"] = "normal"
    seed: int = Field(default=0, ge=0, le=2**31 - 1)

    @field_validator("target_options")
    @classmethod
    def _options_are_the_targets(
        cls, given: dict[str, Any], info: ValidationInfo
    ) -> dict[str, Any]:
        if "target" in info.data:
            options_of(info.data["target"], given)
        return given

    def requested(self) -> list[Any]:
        """The variants as plain values, as parse_variant takes them; none of "auto"."""
        if self.variants == "auto":
            return []
        return [
            v if isinstance(v, str) else v.model_dump(mode="json", exclude_none=True)
            for v in self.variants
        ]
