"""Limits of single operators on the Edge TPU, beyond those that hold for all.

Sources: the limitations in the table of https://coral.ai/docs/edgetpu/models-intro/, and compiler
logs that users posted with their models in https://github.com/google-coral/edgetpu/issues. Where
release 16 maps what the table still excludes (softmax and dense layers over several rows, strided
slices), the logs are followed.
"""

from collections.abc import Callable

import numpy as np

from workers.engine.targets.edgetpu_use import Use, Verdict
from workers.engine.tensors import Tensor

MAX_SOFTMAX = 16_000
# 2**19 values are mapped, 3 * 2**20 are not (issues 31 and 597).
MAX_RESIZED = 2**21
# 64 x 128 is mapped, 256 x 128 is not (issue 461).
MAX_AVERAGED = 2**14
# Release 16 maps every transpose of YOLOv8 at 192 x 192, whose largest head has 24 x 24 x 144 =
# 82,944 values and is turned to channels first, and leaves out 28 x 28 x 255 = 199,920 values of
# YOLOv5s at 224 x 224, though channels stay where they are (the logs and export.md of
# https://github.com/jveitchmichaelis/edgetpu-yolo).
MAX_TRANSPOSED = 2**17
# The heads of EfficientDet-Lite2 (3.4 million values) are mapped, those of Lite3 (4.4 million)
# end in "large activation tensors" (issues 557, 651, 653) unless they are cut off by hand
# (issue 671). The table warns of reshapes of large tensors too.
MAX_HEAD = 2**22


def _convolution(use: Use) -> Verdict | None:
    dilation = use.option("dilationHFactor", 1), use.option("dilationWFactor", 1)
    if dilation[0] != dilation[1]:
        return Verdict("limitation", "its dilation differs between height and width")
    return None


def _dense(use: Use) -> Verdict | None:
    if use.option("weightsFormat"):
        return Verdict("limitation", "its weights are shuffled")
    # The table wants one row; the logs of release 16 hold mapped dense layers over many.
    if use.runtime < 14 and any(size > 1 for size in use.output.shape[:-1]):
        return Verdict("limitation", "its result has more than one row")
    return None


def _softmax(use: Use) -> Verdict | None:
    shape = use.output.shape
    if shape and shape[-1] > MAX_SOFTMAX:
        return Verdict("limitation", f"it runs over more than {MAX_SOFTMAX:,} values")
    if use.runtime < 14 and any(size > 1 for size in shape[:-1]):
        return Verdict("limitation", "it has more than one row")
    return None


def _concatenation(use: Use) -> Verdict | None:
    if _is_batch(use.option("axis"), use.output):
        return Verdict("limitation", "it joins along the batch")
    constants = [tensor for tensor in use.data if tensor.data is not None]
    zeros = all(_is_zero(tensor) for tensor in constants)
    if constants and (len(use.data) != 2 or not zeros):
        return Verdict("limitation", "a constant operand is allowed only as zeros beside one other")
    return _head(use)


def _head(use: Use) -> Verdict | None:
    """Long lists of boxes or scores; pictures are worked on in tiles and have no such limit."""
    listed = sum(size > 1 for size in use.output.shape) <= 2
    if listed and use.output.elements > MAX_HEAD:
        return Verdict("too_large", f"{use.output.elements:,} values")
    return None


def _reduction(use: Use) -> Verdict | None:
    source = use.source
    axes = {axis % max(1, len(source.shape)) for axis in use.integers(1)}
    if any(_is_batch(axis, source) for axis in axes):
        return Verdict("limitation", "it reduces the batch")
    if use.op.name != "MEAN":
        return None
    depth = len(source.shape) - 1
    if depth in axes and source.shape[depth] % 4:
        return Verdict("limitation", "a mean over channels needs a multiple of 4 of them")
    if depth in axes and use.runtime < 13:
        return Verdict("newer_runtime", "a mean over channels needs runtime 13")
    averaged = int(np.prod([source.shape[axis] for axis in axes], dtype=np.int64))
    if averaged > MAX_AVERAGED:
        return Verdict("limitation", f"each mean is over {averaged:,} values")
    return None


def _pad(use: Use) -> Verdict | None:
    source, amounts = use.source, use.integers(1)
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    padded = [axis for axis, pair in enumerate(pairs) if any(pair)]
    if any(_is_batch(axis, source) for axis in padded):
        return Verdict("limitation", "it pads the batch")
    if use.runtime < 13 and len(source.shape) - 1 in padded:
        return Verdict("newer_runtime", "padding channels needs runtime 13")
    return None


def _along_batch(place_of_axis: Callable[[Use], int]) -> Callable[[Use], Verdict | None]:
    def special(use: Use) -> Verdict | None:
        tensor = use.output
        if _is_batch(place_of_axis(use), tensor):
            return Verdict("limitation", "it works along the batch")
        return None

    return special


def _split_axis(use: Use) -> int:
    return next(iter(use.integers(0)), 0)


def _prelu(use: Use) -> Verdict | None:
    alpha = use.input(1)
    if alpha is not None and any(size > 1 for size in alpha.shape[:-1]):
        return Verdict("limitation", "its slope differs by place, not only by channel")
    return None


def _resize(use: Use) -> Verdict | None:
    source = use.source
    sizes = list(zip(source.shape[1:3], use.output.shape[1:3], strict=False))
    if use.op.name == "RESIZE_BILINEAR" and any(a == 1 and b > 1 for a, b in sizes):
        # With align_corners the step between samples is (1 - 1) / (n - 1) = 0.
        return Verdict("imprecise_resize", "it spreads a single value")
    if use.output.elements > MAX_RESIZED and any(a != b for a, b in sizes):
        return Verdict("limitation", f"its result has {use.output.elements:,} values")
    return None


def _strided_slice(use: Use) -> Verdict | None:
    if use.option("ellipsisMask") or use.option("newAxisMask"):
        return Verdict("limitation", "it uses an ellipsis or a new axis")
    # The table wants strides of 1; release 16 maps the slices by 2 that YOLOv5 starts with.
    strides = use.integers(3)
    if any(stride < 1 for stride in strides) or (use.runtime < 14 and set(strides) - {1}):
        return Verdict("limitation", "its strides are not 1")
    return None


def _squeeze(use: Use) -> Verdict | None:
    source = use.source
    leading = source.elements == int(np.prod(source.shape[-1:], dtype=np.int64))
    if use.runtime < 13 and not leading and use.output.shape[-1:] != source.shape[-1:]:
        return Verdict("newer_runtime", "removing inner dimensions needs runtime 13")
    return None


def _transpose(use: Use) -> Verdict | None:
    source = use.source
    order = [axis for axis in use.integers(1) if source.shape[axis] > 1]
    if order != sorted(order) and source.elements > MAX_TRANSPOSED:
        return Verdict("limitation", f"it moves {source.elements:,} values")
    return None


def _is_batch(axis: int, tensor: Tensor) -> bool:
    rank = len(tensor.shape)
    return rank >= 4 and axis % rank == 0


def _is_zero(tensor: Tensor) -> bool:
    values = tensor.values()
    point = tensor.zero_points[0] if tensor.zero_points.size else 0
    return bool(np.all(values == point))


SPECIAL: dict[str, Callable[[Use], Verdict | None]] = {
    "CONCATENATION": _concatenation,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _convolution,
    "FULLY_CONNECTED": _dense,
    "LOGISTIC": _head,
    "MEAN": _reduction,
    "PACK": _along_batch(lambda use: use.option("axis")),
    "PAD": _pad,
    "PRELU": _prelu,
    "REDUCE_MAX": _reduction,
    "REDUCE_MIN": _reduction,
    "RESHAPE": _head,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "SOFTMAX": _softmax,
    "SPLIT": _along_batch(_split_axis),
    "SQUEEZE": _squeeze,
    "STRIDED_SLICE": _strided_slice,
    "SUM": _reduction,
    "TRANSPOSE": _transpose,
}
