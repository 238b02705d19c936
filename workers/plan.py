"""What a prepared job will do: the sources of its data, and the key of each costly step."""

import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from pydantic import BaseModel, Field

from app.domain.fingerprint import fingerprint
from app.domain.formats import DatasetFormat, ModelFormat
from app.domain.jobs import JobSpec
from app.domain.micro import identifier
from app.domain.options import CalibrationOptions
from app.domain.recipes import CALIBRATED, Training, Variant
from app.domain.splits import Part
from app.domain.targets import PROFILES, TargetId, family, options_of
from app.domain.work import (
    EvaluationSettings,
    LatencySettings,
    Preprocessing,
    TrainingSettings,
)

MODEL_SUFFIX = re.compile(r"\.(keras|h5|hdf5|tflite|zip|tar|tar\.gz|tgz)$", re.IGNORECASE)
TOOLS = ("tensorflow", "ai-edge-litert", "litert-quantizer", "numpy")
TRAINING_TOOLS = ("tensorflow-model-optimization", "tf-keras", "keras")
# Options of steps that train which only count when the file is made from what they trained.
AFTER_TRAINING = frozenset(
    {
        "sparse_encoding",
        "calibration",
        "bias_correction",
        "input_type",
        "output_type",
        "integer_only",
    }
)


class Source(BaseModel):
    """A part of a dataset, by the digest of its file."""

    id: str
    sha256: str
    format: DatasetFormat
    part: Part


class Plan(BaseModel):
    """Everything that determines a job's results, settled when the job is prepared."""

    model_sha256: str
    model_format: ModelFormat
    model_name: str
    input_shapes: dict[str, list[int]]
    calibration: Source | None
    evaluation: Source | None
    training: Source | None = None
    preprocessing: Preprocessing
    evaluation_settings: EvaluationSettings
    latency: LatencySettings
    training_settings: TrainingSettings = TrainingSettings()
    target: TargetId = "cpu"
    target_options: dict[str, Any] = {}
    seed: int
    # Name -> version of what the worker at work has for targets; each worker sets its own.
    compilers: dict[str, str] = Field(default={}, exclude=True)

    @property
    def stem(self) -> str:
        """The model's name as a part of file names."""
        stem = MODEL_SUFFIX.sub("", self.model_name)
        return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:60] or "model"

    def convert_key(self) -> str:
        return convert_key(
            self.model_sha256, self.model_format, self.input_shapes, fixed_batch=self.fixed_batch
        )

    @property
    def fixed_batch(self) -> bool:
        return PROFILES[self.target].fixed_batch

    def c_name(self, variant: Variant) -> str:
        """What the C array of a variant is called, and its files: the source names its header."""
        # Cut where the model's name is long: the variant's tells the files of a job apart.
        return identifier(self.stem[:30]) + "_" + identifier(variant.name)

    def _target(self, variant: Variant) -> dict[str, Any] | None:
        """What of the target determines a variant beside its .tflite."""
        compiler = PROFILES[self.target].compiler
        if compiler is None:
            return None
        is_micro = family(self.target) == "microcontroller"
        options = options_of(self.target, self.target_options)
        return {
            "id": self.target,
            "options": options.model_dump(exclude={"timeout_s"}) if options else {},
            "compiler": compiler.name,
            "version": self.compilers.get(compiler.name),
            "c_name": self.c_name(variant) if is_micro else None,
        }

    def _read(self, source: Source | None) -> dict[str, Any] | None:
        if source is None:
            return None
        return {
            "sha256": source.sha256,
            "part": source.part.model_dump(),
            "preprocessing": self.preprocessing.model_dump(),
        }

    def baseline_key(self) -> str:
        return fingerprint(
            "baseline",
            float_model=self.convert_key(),
            evaluation=self._read(self.evaluation),
            evaluation_settings=self.evaluation_settings,
            latency=self.latency,
            tools=tools(),
        )

    def calibration_key(self, options: CalibrationOptions) -> str:
        return fingerprint(
            "calibrate",
            float_model=self.convert_key(),
            data=self._read(self.calibration),
            options=options,
            tools=tools(),
        )

    def train_key(self, steps: Sequence[Training]) -> str:
        """The key of what training by `steps`, one after another, leaves. That of each step covers
        those before it, so that recipes which begin alike share their beginning."""
        key = self.convert_key()
        for step in steps:
            key = fingerprint(
                "train",
                model=key,
                step=step.model_dump(mode="json", exclude=set(AFTER_TRAINING)),
                data=self._read(self.training),
                settings=self.training_settings,
                tools=tools() | training_tools(),
            )
        return key

    def calibration_for(self, variant: Variant) -> Source | None:
        """The samples that calibrate a variant, where it needs any: one that trains may take those
        that it trains on."""
        if not variant.needs_calibration:
            return None
        return self.calibration or (self.training if variant.needs_training else None)

    def variant_key(self, variant: Variant) -> str:
        return fingerprint(
            "variant",
            baseline=self.baseline_key(),
            recipe=[step.model_dump(mode="json") for step in variant.recipe],
            calibration=self._read(self.calibration_for(variant)),
            trained=self.train_key(variant.training) if variant.needs_training else None,
            target=self._target(variant),
            tools=tools(),
        )

    def manifest(
        self,
        variant: Variant,
        sha256: str,
        made_with: dict[str, str],
        trained: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Every input digest, option, seed and tool version: enough to make the bytes again.
        `trained`: what each stage of the training took and left."""
        training = {
            "data": self._read(self.training),
            "settings": self.training_settings.model_dump(mode="json"),
            "stages": trained,
        }
        return {
            "sha256": sha256,
            "model": {"sha256": self.model_sha256, "format": self.model_format},
            "input_shapes": self.input_shapes,
            "fixed_batch": self.fixed_batch,
            "target": self._target(variant) or {"id": self.target},
            "recipe": [step.model_dump(mode="json") for step in variant.recipe],
            "training": training if variant.needs_training else None,
            "calibration": self._read(self.calibration_for(variant)),
            "evaluation": self._read(self.evaluation),
            "evaluation_settings": self.evaluation_settings.model_dump(mode="json"),
            "latency_settings": self.latency.model_dump(mode="json", exclude={"lock_file"}),
            "seed": self.seed,
            "tools": tools() | (training_tools() if variant.needs_training else {}) | made_with,
        }


def convert_key(
    sha256: str, format_: str, input_shapes: dict[str, list[int]], *, fixed_batch: bool = False
) -> str:
    return fingerprint(
        "convert",
        model=sha256,
        format=format_,
        input_shapes=input_shapes,
        fixed_batch=fixed_batch,
        tools=tools(),
    )


def tools() -> dict[str, str]:
    """Versions of what makes the files."""
    return {name: metadata.version(name) for name in TOOLS}


def training_tools() -> dict[str, str]:
    """Versions of what trains, beside tools()."""
    return {name: metadata.version(name) for name in TRAINING_TOOLS}


def calibration_options(variant: Variant) -> CalibrationOptions | None:
    """The ranges of the model as it came that a variant needs collected: none where it trains,
    since what comes out of the training has ranges of its own."""
    if variant.needs_training:
        return None
    for step in variant.recipe:
        if step.technique in CALIBRATED and getattr(step, "engine", "litert") == "litert":
            options: CalibrationOptions = getattr(step, "calibration")  # noqa: B009
            return options
    return None


def settle(
    spec: JobSpec,
    *,
    model: tuple[str, str, str],
    input_shapes: dict[str, list[int]],
    sources: dict[str, Any],
    time_limit_s: float,
    threads: int,
) -> Plan:
    """The plan of a job; `model` is its (sha256, format, name)."""
    sha256, format_, name = model
    evaluation = spec.evaluation
    # No evaluation of the variants: training scores its epochs all the same.
    lesson_metric = "auto" if evaluation.metric == "none" else evaluation.metric
    return Plan(
        model_sha256=sha256,
        model_format=ModelFormat(format_),
        model_name=name,
        input_shapes=input_shapes,
        calibration=sources.get("calibration"),
        evaluation=sources.get("evaluation"),
        training=sources.get("training"),
        preprocessing=spec.preprocessing or Preprocessing(),
        evaluation_settings=EvaluationSettings(
            metric=evaluation.metric,
            max_samples=evaluation.max_samples,
            time_limit_s=evaluation.time_limit_s or time_limit_s,
            threads=threads,
        ),
        latency=LatencySettings(runs=spec.latency.runs, threads=spec.latency.threads),
        training_settings=TrainingSettings(
            distill=spec.training.distill, metric=lesson_metric, seed=spec.seed
        ),
        target=spec.target,
        target_options=spec.target_options,
        seed=spec.seed,
    )
