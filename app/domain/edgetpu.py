"""Edge TPU: what maps to it and what the compiler reports, shared by the API and the workers."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.domain.problems import Problem

# What the compiler's log says of an operator; `unknown` is a wording that we do not know.
ReasonCode = Literal[
    "mapped",
    "unsupported_type",
    "unsupported_operation",
    "unsupported_version",
    "unsupported_rank",
    "not_constant",
    "dynamic_tensor",
    "imprecise_resize",
    "too_large",
    "limitation",
    "newer_runtime",
    "after_cpu",
    "unknown",
]


DEFAULT_COMPILER = "16.0"
# A release of edgetpu_compiler, such as 16.0 or 16.0.384591198.
COMPILER_PATTERN = r"^[0-9]{1,3}(\.[0-9]{1,12}){0,2}$"


class AnalysisOptions(BaseModel):
    """What an analysis is for, and how the file would be compiled."""

    model_config = ConfigDict(extra="forbid")

    target: Literal["edgetpu"] = "edgetpu"
    compiler: str = Field(
        default=DEFAULT_COMPILER,
        pattern=COMPILER_PATTERN,
        description="Release of edgetpu_compiler.",
    )
    multiple_subgraphs: bool = Field(default=False, description="Its option -a.")


class EdgeTpuOp(BaseModel):
    """One operator: whether it runs on the Edge TPU, and why not."""

    index: int = Field(description="Place in the order of execution, from 0.")
    name: str
    layer: str = Field(description="Name of the operator's first output.")
    maps: bool
    reason: ReasonCode
    message: str


class EdgeTpuMemory(BaseModel):
    """Where the parameters of the mapped operators lie, in bytes. An estimate."""

    parameter_bytes: int
    on_chip_bytes: int
    on_chip_remaining_bytes: int
    off_chip_bytes: int


class EdgeTpuAdvice(BaseModel):
    """What to change so that operators map."""

    reason: ReasonCode
    operator: str
    layers: list[str]
    message: str


class EdgeTpuAnalysis(BaseModel):
    """What the Edge TPU compiler is expected to make of a file."""

    compiler: str
    ops: list[EdgeTpuOp]
    mapped: int
    cpu: int
    subgraphs: int = Field(description="Parts that become one custom operator each.")
    memory: EdgeTpuMemory
    advice: list[EdgeTpuAdvice]
    failure: Problem | None = Field(
        default=None, description="Why the compiler would refuse the whole file, if it would."
    )


class CompileOptions(BaseModel):
    """Options of edgetpu_compiler; https://coral.ai/docs/edgetpu/compiler/#usage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_runtime_version: int | None = Field(default=None, ge=10, le=14)
    num_segments: int | None = Field(default=None, ge=1, le=16)
    multiple_subgraphs: bool = False
    search_delegate: bool = False
    delegate_search_step: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=300, gt=0, le=3600, description="Of each of two runs at most.")

    @model_validator(mode="after")
    def _steps_are_of_a_search(self) -> Self:
        if self.delegate_search_step is not None and not self.search_delegate:
            raise ValueError("delegate_search_step is of search_delegate: set that too")
        return self


class CompilerRow(BaseModel):
    """A line of the compiler's table: so many operators of a kind share a status."""

    operator: str
    count: int
    status: str
    reason: ReasonCode
    mapped: bool


class CompilerReport(BaseModel):
    """What edgetpu_compiler printed; sizes in bytes as it rounded them. None where it is silent."""

    version: str | None = None
    success: bool
    compile_ms: int | None = None
    min_runtime_version: int | None = None
    input: str | None = None
    output: str | None = None
    input_bytes: int | None = None
    output_bytes: int | None = None
    on_chip_bytes: int | None = None
    on_chip_remaining_bytes: int | None = None
    off_chip_bytes: int | None = None
    subgraphs: int | None = None
    ops: int | None = None
    mapped: int | None = None
    cpu: int | None = None
    rows: list[CompilerRow] = []
    segments: list["CompilerReport"] = Field(
        default=[], description="One report a segment, where the model was cut into several."
    )


class EdgeTpuFigures(BaseModel):
    """What becomes of a variant on the Edge TPU. `mapped` and `cpu` count operators, by the
    compiler where it ran (`compiler` is what it reported), else by the prediction."""

    mapped: int | None
    cpu: int | None
    measured_by: Literal["compiler", "prediction"]
    compiler: CompilerReport | None = None
    analysis: EdgeTpuAnalysis
