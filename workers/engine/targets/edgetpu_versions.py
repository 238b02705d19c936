"""Which operators, in which versions, each release of the Edge TPU compiler knows.

Sources: the table of supported operations in https://coral.ai/docs/edgetpu/models-intro/ and the
compiler's releases in https://coral.ai/software/; versions of the operators from the kernels that
TensorFlow Lite registered at the time of each release
(tensorflow/lite/core/kernels/register.cc) and the refusals that users posted
(https://github.com/google-coral/edgetpu/issues 147, 210, 420, 631, 845).
"""

from app.domain.edgetpu import DEFAULT_COMPILER

# Compiler release -> the newest Edge TPU runtime that it compiles for.
_RUNTIMES = {16: 14, 15: 13, 14: 13, 2: 12, 1: 10}

# Operator -> the runtime that it needs at least.
SUPPORTED: dict[str, int] = {
    "ADD": 10,
    "AVERAGE_POOL_2D": 10,
    "CONCATENATION": 10,
    "CONV_2D": 10,
    "DEPTHWISE_CONV_2D": 10,
    "EXPAND_DIMS": 13,
    "FULLY_CONNECTED": 10,
    "L2_NORMALIZATION": 10,
    "LOGISTIC": 10,
    "LSTM": 14,
    "MAXIMUM": 10,
    "MAX_POOL_2D": 10,
    "MEAN": 10,
    "MINIMUM": 10,
    "MUL": 10,
    "PACK": 13,
    "PAD": 10,
    "PRELU": 13,
    # The table says 13; files made for runtime 12 hold it inside their mapped part all the same.
    "QUANTIZE": 12,
    # The table says 14; release 14.1, for runtime 13, maps it
    # (https://github.com/maxbbraun/thermal-face/issues/2).
    "REDUCE_MAX": 13,
    "REDUCE_MIN": 14,
    "RELU": 10,
    "RELU6": 10,
    "RELU_N1_TO_1": 10,
    "RESHAPE": 10,
    "RESIZE_BILINEAR": 10,
    "RESIZE_NEAREST_NEIGHBOR": 10,
    "RSQRT": 14,
    "SLICE": 10,
    "SOFTMAX": 10,
    "SPACE_TO_DEPTH": 10,
    "SPLIT": 10,
    "SQUARED_DIFFERENCE": 14,
    "SQUEEZE": 10,
    "STRIDED_SLICE": 10,
    "SUB": 10,
    "SUM": 13,
    "TANH": 10,
    "TRANSPOSE": 14,
    "TRANSPOSE_CONV": 13,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": 14,
}

# Operator -> the highest version that the compiler's own interpreter loads. A higher one makes
# it refuse the whole file. Only those that newer converters have gone past.
_LOADED_16 = {
    "ADD": 4,
    "AVERAGE_POOL_2D": 3,
    "BATCH_MATMUL": 4,
    "CONV_2D": 5,
    "DEPTHWISE_CONV_2D": 6,
    "DEQUANTIZE": 5,
    "EXP": 1,
    "FULLY_CONNECTED": 9,
    "MEAN": 3,
    "MUL": 6,
    "PAD": 4,
    "QUANTIZE": 3,
    "SUB": 5,
    "TRANSPOSE": 6,
    "TRANSPOSE_CONV": 3,
}
_LOADED_14 = _LOADED_16 | {"CONV_2D": 4, "FULLY_CONNECTED": 9}
_LOADED_2 = _LOADED_16 | {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "FULLY_CONNECTED": 7,
    "RESIZE_BILINEAR": 2,
    "RESIZE_NEAREST_NEIGHBOR": 2,
    "TRANSPOSE_CONV": 2,
}

# Operator -> the highest version that is mapped, where the interpreter loads higher ones.
# Version 3 of the resizes is the one with half_pixel_centers (or align_corners where integer),
# version 5 of the dense layer the one that keeps a third dimension; a file holds the highest
# version of an operator for all its uses. Refused as "Operation version not supported" by release
# 14.1 (https://github.com/google-coral/edgetpu/issues/420 and logs in public repositories).
_MAPPED_BEFORE_16 = {"FULLY_CONNECTED": 4, "RESIZE_BILINEAR": 2, "RESIZE_NEAREST_NEIGHBOR": 2}


def release(compiler: str) -> int:
    """The number of a release, "16.0.384591198" -> 16; an unreadable one is the newest."""
    number = compiler.split(".")[0]
    return int(number) if number.isdigit() else int(DEFAULT_COMPILER.split(".")[0])


def runtime_of(compiler: str) -> int:
    """The newest Edge TPU runtime that a compiler makes files for."""
    known = [number for number in _RUNTIMES if number <= release(compiler)]
    return _RUNTIMES[max(known, default=min(_RUNTIMES))]


def loaded_version(operator: str, compiler: str) -> int | None:
    """The highest version of an operator that the compiler loads; None where no limit is known."""
    number = release(compiler)
    table = _LOADED_16 if number >= 15 else _LOADED_14 if number >= 14 else _LOADED_2
    return table.get(operator)


def mapped_version(operator: str, compiler: str) -> int | None:
    """The highest version of an operator that is mapped; None where no limit is known."""
    return None if release(compiler) >= 16 else _MAPPED_BEFORE_16.get(operator)
