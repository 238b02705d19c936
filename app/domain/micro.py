"""Microcontrollers: what a .tflite file needs under TensorFlow Lite Micro (TFLM)."""

import re

from pydantic import BaseModel, Field

from app.domain.problems import Note

# The built-in operators that TFLM has a kernel for: found by asking the runtime of PyPI
# `tflite-micro` 0.dev20261023182759 for each operator of the schema. A kernel may still refuse
# some types: only a run tells.
OPERATORS = frozenset(
    {
        "ABS",
        "ADD",
        "ADD_N",
        "ARG_MAX",
        "ARG_MIN",
        "ASSIGN_VARIABLE",
        "AVERAGE_POOL_2D",
        "BATCH_MATMUL",
        "BATCH_TO_SPACE_ND",
        "BROADCAST_ARGS",
        "BROADCAST_TO",
        "CALL_ONCE",
        "CAST",
        "CEIL",
        "CONCATENATION",
        "CONV_2D",
        "COS",
        "CUMSUM",
        "DEPTHWISE_CONV_2D",
        "DEPTH_TO_SPACE",
        "DEQUANTIZE",
        "DIV",
        "DYNAMIC_UPDATE_SLICE",
        "ELU",
        "EMBEDDING_LOOKUP",
        "EQUAL",
        "EXP",
        "EXPAND_DIMS",
        "FILL",
        "FLOOR",
        "FLOOR_DIV",
        "FLOOR_MOD",
        "FULLY_CONNECTED",
        "GATHER",
        "GATHER_ND",
        "GREATER",
        "GREATER_EQUAL",
        "HARD_SWISH",
        "IF",
        "L2_NORMALIZATION",
        "L2_POOL_2D",
        "LEAKY_RELU",
        "LESS",
        "LESS_EQUAL",
        "LOG",
        "LOGICAL_AND",
        "LOGICAL_NOT",
        "LOGICAL_OR",
        "LOGISTIC",
        "LOG_SOFTMAX",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MEAN",
        "MINIMUM",
        "MIRROR_PAD",
        "MUL",
        "NEG",
        "NOT_EQUAL",
        "PACK",
        "PAD",
        "PADV2",
        "PRELU",
        "QUANTIZE",
        "READ_VARIABLE",
        "REDUCE_ALL",
        "REDUCE_MAX",
        "REDUCE_MIN",
        "RELU",
        "RELU6",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "REVERSE_V2",
        "ROUND",
        "RSQRT",
        "SELECT_V2",
        "SHAPE",
        "SIN",
        "SLICE",
        "SOFTMAX",
        "SPACE_TO_BATCH_ND",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SPLIT_V",
        "SQRT",
        "SQUARE",
        "SQUARED_DIFFERENCE",
        "SQUEEZE",
        "STRIDED_SLICE",
        "SUB",
        "SUM",
        "SVDF",
        "TANH",
        "TRANSPOSE",
        "TRANSPOSE_CONV",
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        "UNPACK",
        "VAR_HANDLE",
        "WHILE",
        "ZEROS_LIKE",
    }
)

FLASH_COUNTS = (
    "The model as stored, rounded up to 16 bytes. The code comes on top: TFLM's core takes about"
    " 16 KB on a Cortex-M3, and the kernels that the firmware registers theirs."
)
ARENA_COUNTS = (
    "Measured on a 64-bit host with TFLM's reference kernels. On a 32-bit core its structures are"
    " smaller; optimized kernels (CMSIS-NN, Ethos-U) may ask for scratch memory of their own."
)


class MicroReport(BaseModel):
    """What TFLM makes of a file; every figure is from a run of its interpreter.

    `arena_bytes`: an arena, aligned to 16 bytes, in which the file was allocated and run;
    `persistent_bytes` of it hold the interpreter's own structures, `nonpersistent_bytes` the
    tensors and scratch of an inference. All are None where it does not run there.
    `steps_apart`: the largest distance of an output from that of LiteRT's reference kernels, in
    quantization steps of the output (1e-4 of its range where it is computed in float). `agrees`
    is at most one step, of 8 bits where the output has 16. Both are None where nothing could be
    compared.
    """

    runs: bool
    reason: str | None = Field(default=None, description="Why it does not run, in TFLM's words.")
    missing_operators: list[str] = Field(
        default=[], description="Operators that TFLM has no kernel for."
    )
    arena_bytes: int | None = None
    persistent_bytes: int | None = None
    nonpersistent_bytes: int | None = None
    arena_counts: str = ARENA_COUNTS
    flash_bytes: int
    flash_counts: str = FLASH_COUNTS
    samples_compared: int = 0
    steps_apart: float | None = None
    agrees: bool | None = None
    tflm_version: str
    notes: list[Note] = []


def identifier(name: str) -> str:
    """A name that C takes, without what the language keeps for itself (leading and double
    underscores); its suffixes keep it apart from keywords."""
    found = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:100].rstrip("_")
    if not found:
        return "model"
    return f"model_{found}" if found[0].isdigit() else found
