"""The options of each technique, with their defaults; GET /v1/techniques shows their schema."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Engine = Literal["litert", "converter"]
BlockSide = Annotated[int, Field(ge=1, le=64)]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerPatterns(Options):
    """Layers to leave alone, by name."""

    exclude: list[str] = Field(
        default=[],
        max_length=100,
        description="Regular expressions; a layer whose name one of them finds is left as it is.",
    )

    @field_validator("exclude")
    @classmethod
    def _patterns_compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if len(pattern) > 200:
                raise ValueError("a pattern of `exclude` has at most 200 characters")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        return patterns


class LayerOptions(LayerPatterns):
    """Options shared by everything that quantizes layer by layer; excluded layers stay float."""

    engine: Engine = Field(
        default="litert",
        description="`converter` asks TensorFlow's own quantizer (Keras and SavedModel only).",
    )

    @model_validator(mode="after")
    def _converter_can(self) -> Self:
        """TFLiteConverter quantizes whole models, by ranges of its own finding."""
        if self.engine == "converter":
            for option in self.converter_cannot():
                raise ValueError(
                    f"engine 'converter' cannot honour {option}; leave one of them out"
                )
        return self

    def converter_cannot(self) -> list[str]:
        """The options given that TFLiteConverter's quantizer does not have."""
        return ["exclude"] if self.exclude else []


Granularity = Literal["per_channel", "per_tensor"]
DenseGranularity = Annotated[
    Granularity,
    Field(description="Of fully connected layers, where other kernels are per_channel."),
]


class Float16Options(LayerOptions):
    pass


class DynamicRangeOptions(LayerOptions):
    granularity: Granularity = "per_channel"
    depthwise: Literal["float", "int8"] = Field(
        default="float",
        description="Depthwise weights: left float they cost few bytes and keep the accuracy.",
    )


class CalibrationOptions(Options):
    samples: int = Field(default=100, ge=1, le=10_000)
    method: Literal["min_max", "percentile"] = "min_max"
    percentile: float = Field(default=99.99, gt=50, le=100)


class IntegerOptions(LayerOptions):
    """Options shared by the recipes that need calibration."""

    granularity: Granularity = "per_channel"
    dense_granularity: DenseGranularity = "per_channel"
    calibration: CalibrationOptions = CalibrationOptions()
    bias_correction: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="`auto` keeps it only where it lowers the error on the calibration outputs.",
    )
    integer_only: bool = Field(
        default=False,
        description="Fail the variant, naming the operator, when any part of the file stays float.",
    )

    def converter_cannot(self) -> list[str]:
        given = super().converter_cannot()
        if self.calibration.method != "min_max":
            given.append("calibration.method 'percentile'")
        if self.bias_correction == "on":
            given.append("bias_correction 'on'")
        return given


class Int8Options(IntegerOptions):
    input_type: Literal["int8", "uint8", "float32"] = "int8"
    output_type: Literal["int8", "uint8", "float32"] = "int8"


class Int16x8Options(IntegerOptions):
    input_type: Literal["int16", "float32"] = "int16"
    output_type: Literal["int16", "float32"] = "int16"


class TrainOptions(LayerPatterns):
    """Options shared by the techniques that train; the best epoch on held-out samples is kept."""

    epochs: int = Field(default=4, ge=1, le=1000)
    batch_size: int = Field(default=32, ge=1, le=65_536)
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    patience: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Stop once so many epochs brought no better score on the held-out samples.",
    )
    time_limit_s: float = Field(
        default=3600,
        gt=0,
        le=86_400,
        description="Training ends at the first batch past this, and keeps what it has reached.",
    )


class PruneOptions(TrainOptions):
    sparsity: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of zeros over all kernels of convolutions, dense and embedding layers,"
        " depthwise ones and those of `exclude` left out.",
    )
    spare_share: float = Field(
        default=0.025,
        ge=0,
        le=0.5,
        description="The smallest kernels, together at most this share of the weights, are left"
        " dense: they save nothing and cost the most accuracy. The others are pruned the more.",
    )
    schedule: Literal["polynomial", "constant"] = Field(
        default="polynomial",
        description="`polynomial` rises to the sparsity over the first half of the training.",
    )
    block: tuple[BlockSide, BlockSide] | None = Field(
        default=None, description="[height, width] of blocks pruned as one; dense layers only."
    )
    m_by_n: tuple[BlockSide, BlockSide] | None = Field(
        default=None,
        description="[2, 4]: 2 zeros in every 4 weights that follow each other; sets the sparsity.",
    )
    sparse_encoding: bool = Field(
        default=False,
        description="Store zeros in no space, so that the float file itself shrinks.",
    )

    @model_validator(mode="after")
    def _one_pattern(self) -> Self:
        if self.block is not None and self.m_by_n is not None:
            raise ValueError("block and m_by_n are different patterns; take one of them")
        if self.m_by_n is not None:
            zeros, of = self.m_by_n
            if zeros >= of:
                raise ValueError("m_by_n is [zeros, of]: less zeros than weights")
            if "sparsity" in self.model_fields_set and abs(self.sparsity - zeros / of) > 1e-9:
                raise ValueError(f"m_by_n [{zeros}, {of}] means a sparsity of {zeros / of:g}")
        return self

    @property
    def target_sparsity(self) -> float:
        return self.m_by_n[0] / self.m_by_n[1] if self.m_by_n else self.sparsity


class ClusterOptions(TrainOptions):
    epochs: int = Field(default=2, ge=1, le=1000)
    learning_rate: float = Field(default=1e-4, gt=0, le=10)
    clusters: int = Field(
        default=16, ge=2, le=256, description="Distinct weights of each kernel, zero included."
    )
    centroids: Literal["kmeans++", "linear", "density", "random"] = Field(
        default="kmeans++", description="Where the clusters' values start."
    )
    per_channel: bool = Field(
        default=False,
        description="Clusters of its own for each output channel of a convolution. Slow to begin:"
        " the clusters are started channel by channel.",
    )


class QatOptions(TrainOptions):
    """The default 8-bit scheme: int8 weights (symmetric, per channel) and activations."""

    dense_granularity: DenseGranularity = "per_channel"
    epochs: int = Field(default=3, ge=1, le=1000)
    learning_rate: float = Field(default=1e-4, gt=0, le=10)
    calibration: CalibrationOptions = Field(
        default=CalibrationOptions(),
        description="For the tensors whose range no fake quantization learned.",
    )
    bias_correction: Literal["auto", "on", "off"] = "off"
    input_type: Literal["int8", "uint8", "float32"] = "int8"
    output_type: Literal["int8", "uint8", "float32"] = "int8"
    integer_only: bool = Field(
        default=False,
        description="Fail the variant, naming the operator, when any part of the file stays float.",
    )
