"""What to change in a model so that more of it maps to the Edge TPU.

Only for operators that are the cause themselves, not for what merely follows one, and only
changes that lead to what the rules accept (see edgetpu_rules).
"""

from collections.abc import Iterable

from app.domain.edgetpu import EdgeTpuAdvice, EdgeTpuOp, ReasonCode

# Operators that do not exist there, and what does the same or nearly.
_REPLACEMENTS = {
    "DIV": "Divide by a constant as a multiplication by its inverse (MUL).",
    "ELU": "Replace ELU by RELU and train on.",
    "GELU": "Replace GELU by RELU and train on.",
    "HARD_SWISH": "Replace HARD_SWISH by RELU6 (as MobileNetV3 minimalistic does) and train on.",
    "LEAKY_RELU": "Replace LEAKY_RELU by RELU, or by PRELU with one slope a channel.",
    "LOG_SOFTMAX": "Replace LOG_SOFTMAX by SOFTMAX and take the logarithm outside.",
    "MIRROR_PAD": "Replace MIRROR_PAD by PAD with zeros.",
    "PADV2": "Replace PADV2 by PAD with zeros.",
    "POW": "Replace a square by MUL of the tensor with itself.",
    "SPACE_TO_BATCH_ND": "Convert with a newer TensorFlow, which writes a dilated convolution as"
    " one operator instead of SPACE_TO_BATCH_ND.",
    "SPLIT_V": "Split into parts of one size (SPLIT), or take them by STRIDED_SLICE.",
    "SQUARE": "Replace SQUARE by MUL of the tensor with itself.",
    "UNPACK": "Take the parts by STRIDED_SLICE.",
}
_REASONS: dict[ReasonCode, str] = {
    "dynamic_tensor": "Fix the batch to 1 and every other size of the inputs, and convert again.",
    "imprecise_resize": "Broadcast the single value by ADD or MUL, or leave out the resize.",
    "newer_runtime": "Compile with a newer release, and update the runtime on the device.",
    "not_constant": "Make the weights constants of the model instead of inputs.",
    "too_large": "Make the input smaller, or compile with search_delegate.",
}
_USES = {
    "CONCATENATION": "Take constants and activation functions out of the concatenation.",
    "MEAN": "Average in steps: a smaller average pooling first, then the mean.",
    "RESIZE_BILINEAR": "Resize to fewer values, or leave the last resize to the program.",
    "RESIZE_NEAREST_NEIGHBOR": "Resize to fewer values, or leave the last resize to the program.",
    "TRANSPOSE": "Keep channels innermost (NHWC) throughout, so that nothing large is transposed.",
}


def advise(ops: Iterable[EdgeTpuOp]) -> list[EdgeTpuAdvice]:
    """Advice for what does not map, equal advice once, in order of the first operator."""
    found: dict[tuple[ReasonCode, str, str], list[str]] = {}
    for op in ops:
        message = None if op.maps else _advice(op)
        if message is not None:
            found.setdefault((op.reason, op.name, message), []).append(op.layer)
    return [
        EdgeTpuAdvice(reason=reason, operator=operator, layers=layers, message=message)
        for (reason, operator, message), layers in found.items()
    ]


def _advice(op: EdgeTpuOp) -> str | None:
    match op.reason:
        case "unsupported_operation":
            return _REPLACEMENTS.get(op.name)
        case "unsupported_version":
            if op.name.startswith("RESIZE"):
                return "Compile with release 16, or resize without half_pixel_centers."
            if op.name == "FULLY_CONNECTED":
                return (
                    "Quantize dense layers per tensor, and give them inputs of two dimensions"
                    " (Flatten or Reshape before them); both write a lower version."
                )
            return "Convert with TensorFlow 2.8 or before, which writes a lower version."
        case "unsupported_rank":
            return "Fix the batch to 1 and keep to three sizes over 1 (height, width, channels)."
        case "unsupported_type" if op.name in ("QUANTIZE", "DEQUANTIZE"):
            return "Convert with integer inputs and outputs (inference type int8 or uint8)."
        case "limitation" if op.name == "QUANTIZE":
            return "Convert with integer inputs and outputs (inference type int8 or uint8)."
        case "limitation":
            return _USES.get(op.name)
        case _:
            return _REASONS.get(op.reason)
