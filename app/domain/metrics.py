"""What is measured on a delivered file; every figure is read from that file."""

from pydantic import BaseModel, Field

from app.domain.edgetpu import EdgeTpuFigures
from app.domain.ethos_u import EthosUReport
from app.domain.micro import MicroReport


class Latency(BaseModel):
    """Warm invocation times of one interpreter, in milliseconds, interleaved with the baseline."""

    p50: float
    p90: float
    p99: float
    mean: float
    runs: int
    threads: int
    processor: str | None = None
    contended: bool = False


class LayerFigures(BaseModel):
    """One kernel (weights of a convolution, dense or matrix layer) as the file holds it."""

    name: str
    elements: int
    sparsity: float
    unique_weights: int


class Metrics(BaseModel):
    """The metrics of a variant, and of the baseline (the untouched float32 .tflite).

    Ratios are variant / baseline: smaller is better. What could not be measured is None, and a
    note of the variant says why.
    """

    size_bytes: int
    gzip_size_bytes: int
    size_ratio: float | None = None
    gzip_size_ratio: float | None = None

    metric: str | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    accuracy_drop_ci95: tuple[float, float] | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    mse: float | None = None
    mae: float | None = None
    samples_evaluated: int = 0

    latency_ms: Latency | None = None
    latency_ratio: float | None = None
    peak_memory_bytes: int | None = None
    macs: int | None = None
    parameters: int | None = None

    sparsity: float | None = Field(default=None, description="Share of zeros in the kernels.")
    unique_weights_max: int | None = Field(
        default=None,
        description="Distinct values in one output channel of a kernel, at most. Quantization and"
        " folded batch normalization scale each channel by a factor of its own.",
    )
    layers: list[LayerFigures] = Field(
        default=[], description="The kernels in the file's order, at most the 200 largest."
    )
    ops: dict[str, int] = {}
    integer_only: bool = False
    weight_dtypes: list[str] = []
    input_dtype: str | None = None
    output_dtype: str | None = None

    arena_bytes: int | None = Field(
        default=None, description="Tensor arena under TensorFlow Lite Micro."
    )
    flash_bytes: int | None = Field(default=None, description="The model as a C array.")
    edgetpu: EdgeTpuFigures | None = None
    ethos_u: EthosUReport | None = None
    micro: MicroReport | None = None
