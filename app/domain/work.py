"""The contract between the worker and its child process: work in, events and results out.

The worker lays out a directory, writes `spec.json` (one `Work`), and starts the child there. The
child reads inputs from `in/`, writes files to `out/`, prints one JSON event a line on the event
pipe, and ends by writing `result.json` (the `Result` of its work) or `error.json` (a `Problem`).
File names in this contract are relative to the directory.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.domain.edgetpu import AnalysisOptions
from app.domain.formats import DatasetFormat, ModelFormat
from app.domain.metrics import Metrics
from app.domain.options import CalibrationOptions
from app.domain.problems import Note, Problem
from app.domain.recipes import Step, Training
from app.domain.splits import Part
from app.domain.targets import TargetId

FLOAT_MODEL = "out/float32.tflite"
BASELINE_OUTPUTS = "out/baseline_outputs.npz"
VARIANT_FILE = "out/model.tflite"
CHECKPOINT = "out/checkpoint"
LEARNED_RANGES = "out/learned_ranges.npz"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TensorFact(Strict):
    """One input or output of a model; -1 stands for a size that is not fixed."""

    name: str
    shape: list[int]
    dtype: str


class ModelFacts(Strict):
    """What the inspection found; `parameters` counts weights, trained or not. `trainable` is None
    where it was not looked for, and `not_trainable` says why it is False. `depthwise`: whether
    it has depthwise convolutions; None where nobody looked."""

    inputs: list[TensorFact]
    outputs: list[TensorFact]
    parameters: int
    trainable: bool | None = None
    not_trainable: str | None = None
    depthwise: bool | None = None
    notes: list[Note] = []


class FeatureFact(Strict):
    """One feature array over all splits: shape without the sample axis, and its values' range."""

    name: str
    shape: list[int]
    dtype: str
    min: float | None
    max: float | None
    mean: float | None


class SplitFact(Strict):
    samples: int
    labelled: bool


class DatasetFacts(Strict):
    """What the data check found. `classes`: class names of pictures, or the label values as text;
    empty where labels are not classes. `label_shape`: without the sample axis; None unlabelled."""

    splits: dict[str, SplitFact]
    features: list[FeatureFact]
    classes: list[str] = []
    label_dtype: str | None = None
    label_shape: list[int] | None = None
    label_min: float | None = None
    label_max: float | None = None
    warnings: list[Note] = []


class Preprocessing(Strict):
    """fed = value * scale + offset, after resizing to [height, width]. Lists are per channel."""

    scale: float | list[float] = 1.0
    offset: float | list[float] = 0.0
    resize: (
        tuple[Annotated[int, Field(ge=1, le=8192)], Annotated[int, Field(ge=1, le=8192)]] | None
    ) = None


class DataSource(Strict):
    """A part of a dataset file, in the role that its place in the spec gives it."""

    file: str
    format: DatasetFormat
    part: Part
    preprocessing: Preprocessing = Preprocessing()


class ModelSource(Strict):
    file: str
    format: ModelFormat
    # Input name -> full shape with batch, for sizes that the model leaves open.
    input_shapes: dict[str, list[int]] = {}
    # Whether open batch sizes become 1 when it is converted, rather than stay open.
    fixed_batch: bool = False


class EvaluationSettings(Strict):
    metric: Literal["auto", "accuracy", "mse", "none"] = "auto"
    max_samples: int = Field(default=5000, ge=1, le=1_000_000)
    # Evaluation stops at the first batch boundary past this; `samples_evaluated` says how far.
    time_limit_s: float = Field(default=10.0, gt=0, le=3600)
    threads: int = Field(default=2, ge=1, le=64)


class LatencySettings(Strict):
    runs: int = Field(default=50, ge=5, le=10_000)
    threads: int = Field(default=1, ge=1, le=64)
    # Stop before `runs` once this is spent, so that a slow variant does not hold the machine.
    time_limit_s: float = Field(default=5.0, gt=0, le=600)
    # A file shared by all measurements of a machine: held exclusively while one of them runs.
    lock_file: str | None = None


class CatalogWork(Strict):
    """Make a model of the catalog, to be inspected then like an upload; `seed` is that of random
    weights."""

    kind: Literal["catalog"] = "catalog"
    catalog: str
    weights: Literal["imagenet", "random"]
    seed: int = Field(default=0, ge=0, le=2**31 - 1)


class InspectModelWork(Strict):
    """Inspect a model; `convert` also leaves FLOAT_MODEL where all its shapes are fixed, for reuse
    by the first job. A conversion that fails then is told in `notes`, never as an error."""

    kind: Literal["inspect_model"] = "inspect_model"
    model: ModelSource
    convert: bool = True


class InspectDatasetWork(Strict):
    kind: Literal["inspect_dataset"] = "inspect_dataset"
    file: str
    format: DatasetFormat
    # Refuse an archive that would unpack to more.
    max_unpacked_bytes: int = 20 * 2**30


class AnalyzeWork(Strict):
    """Tell what a target makes of a .tflite of any types; the result is an EdgeTpuAnalysis."""

    kind: Literal["analyze"] = "analyze"
    file: str
    options: AnalysisOptions = AnalysisOptions()


class PrepareWork(Strict):
    """What the variants of a job share. Each `steps` member is made; what is not asked for is
    read from `in/` under the file name of its `out/` twin where a later step needs it."""

    kind: Literal["prepare"] = "prepare"
    steps: list[Literal["convert", "baseline", "calibrate"]]
    model: ModelSource | None = None  # for convert
    float_model: str = FLOAT_MODEL  # "in/float32.tflite" when convert is not asked for
    evaluation_data: DataSource | None = None
    calibration_data: DataSource | None = None
    calibrations: list[CalibrationOptions] = []  # one file each: see calibration_file()
    evaluation: EvaluationSettings = EvaluationSettings()
    latency: LatencySettings = LatencySettings()


class TrainingSettings(Strict):
    """What every training of a job has in common. `distill`: targets from the model as it came;
    auto does so where there are no labels."""

    distill: Literal["auto", "on", "off"] = "auto"
    metric: Literal["auto", "accuracy", "mse", "none"] = "auto"
    seed: int = Field(default=0, ge=0, le=2**31 - 1)


class TrainWork(Strict):
    """Train a model by one step, from the uploaded model or the checkpoint of the step before.

    `before`: the steps already taken, whose effects this one must keep. `teacher` is the float32
    .tflite of the model as it came.
    """

    kind: Literal["train"] = "train"
    step: Training
    before: list[Training] = []
    model: ModelSource
    teacher: str
    training_data: DataSource
    settings: TrainingSettings = TrainingSettings()


class LayerEffect(Strict):
    """What training left in one kernel, to be found again in the delivered file.

    `distinct` is None where the kernel was not clustered; `zeros` counts exact zeros where it was
    pruned, else None.
    """

    layer: str
    elements: int
    zeros: int | None = None
    distinct: int | None = None


class EpochFigures(Strict):
    """One epoch: mean loss, and score on held-out samples by the metric's name (higher is better
    for accuracy, lower for others)."""

    epoch: int
    loss: float
    metric: str
    score: float
    seconds: float


class TargetWork(Strict):
    """What a target needs beside the .tflite. `executable`: the Edge TPU's compiler, where this
    worker has it, of release `version`; `c_name`: what a C array is called."""

    id: TargetId
    options: dict[str, Any] = {}
    executable: str | None = None
    version: str | None = None
    c_name: str = "model"


class VariantWork(Strict):
    """Make one variant from the float32 .tflite, verify it and measure it.

    With trained steps in the recipe, `float_model` is the trained one, `effects` what it holds,
    `model` its checkpoint; `original` is then the untouched .tflite to measure against.
    """

    kind: Literal["variant"] = "variant"
    name: str
    recipe: list[Step]
    float_model: str
    original: str | None = None
    effects: list[LayerEffect] = []
    learned_ranges: str | None = None  # of quantization-aware training
    baseline_metrics: Metrics
    baseline_outputs: str | None = None
    calibration: str | None = None  # the file of exact ranges; without it they are collected here
    calibration_data: DataSource | None = None  # for bias correction and engine "converter"
    evaluation_data: DataSource | None = None
    model: ModelSource | None = None  # for engine "converter" and sparse encoding
    target: TargetWork | None = None
    evaluation: EvaluationSettings = EvaluationSettings()
    latency: LatencySettings = LatencySettings()


Work = Annotated[
    CatalogWork
    | InspectModelWork
    | InspectDatasetWork
    | AnalyzeWork
    | PrepareWork
    | TrainWork
    | VariantWork,
    Field(discriminator="kind"),
]


class CatalogResult(Strict):
    file: str = "out/model.keras"


class InspectModelResult(Strict):
    facts: ModelFacts
    float_model: str | None = None
    notes: list[Note] = []


class InspectDatasetResult(Strict):
    facts: DatasetFacts


class PrepareResult(Strict):
    """Paths of what was made; `tools`: name -> version of every tool that made it."""

    float_model: str | None = None
    baseline_metrics: Metrics | None = None
    baseline_outputs: str | None = None
    # One place for each of the work's `calibrations`: the file, or why there is none.
    calibrations: list[str | None] = []
    calibration_problems: list[Problem | None] = []
    notes: list[Note] = []
    tools: dict[str, str] = {}


class TrainResult(Strict):
    """`checkpoint`: the trained model in the format of the one that came, wrappers stripped;
    `float_model`: its float32 .tflite. `best_epoch` counts from 1."""

    checkpoint: str = CHECKPOINT
    float_model: str = FLOAT_MODEL
    learned_ranges: str | None = None
    effects: list[LayerEffect] = []
    epochs: list[EpochFigures] = []
    best_epoch: int | None = None
    samples: int = 0
    distilled: bool = False
    notes: list[Note] = []
    tools: dict[str, str] = {}


class TargetFile(Strict):
    """A file made for a target: an artifact of that `kind`, named after the variant with `suffix`
    at its end, or `file_name` where its content depends on the name."""

    kind: Literal["edgetpu_tflite", "ethos_u_tflite", "c_array", "compiler_log"]
    path: str
    suffix: str
    file_name: str | None = None


class VariantResult(Strict):
    file: str = VARIANT_FILE
    target_files: list[TargetFile] = []
    metrics: Metrics
    notes: list[Note] = []
    tools: dict[str, str] = {}


class TrainingProgress(Strict):
    """Where a training stands; epochs and steps count from 1, `eta_s` is to its end."""

    technique: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None = None
    metric: str | None = None
    score: float | None = None
    eta_s: float | None = None

    def __str__(self) -> str:
        told = f"{self.technique}: epoch {self.epoch}/{self.epochs}, step {self.step}/{self.steps}"
        if self.loss is not None:
            told += f", loss {self.loss:.4g}"
        if self.score is not None:
            told += f", {self.metric} {self.score:.4g}"
        return told if self.eta_s is None else f"{told}, {self.eta_s:.0f} s left"


class Event(BaseModel):
    """One line on the event pipe; `progress` is that of this work, 0..1.

    Stage "inspected" carries the JSON of ModelFacts as its message: they are known before the
    conversion that may follow.
    """

    stage: str
    progress: float
    message: str | None = None
    training: TrainingProgress | None = None


def calibration_file(index: int) -> str:
    """Where PrepareWork leaves the ranges of its `calibrations[index]`."""
    return f"out/calibration-{index}.npz"
