"""A .tflite's structure, checked before the interpreter, which trusts it, reads it.

The interpreter follows the file's offsets and indices without looking; one wrong byte there and
the process dies. Here every index and length is held against what it points into.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from app.domain.problems import WorkError

IDENTIFIER = b"TFL3"
MAX_SUBGRAPHS = 1000
# 64 GiB of one tensor is no model's; it is a damaged shape.
MAX_ELEMENTS = 2**34
REPEAT_HINT = "Upload the file again; check its size and checksum against the original."
# Custom operators that the LiteRT interpreter brings along.
KNOWN_CUSTOM = frozenset({"TFLite_Detection_PostProcess"})
# Operators that compilers leave for their chips.
COMPILED = {"ethos-u": "an Arm Ethos-U", "edgetpu-custom-op": "the Edge TPU"}

TYPE_NAMES: dict[int, str] = {
    value: name.lower() for name, value in vars(schema.TensorType).items() if name.isupper()
}
_BITS = {
    "float32": 32, "float16": 16, "int32": 32, "uint8": 8, "int64": 64, "bool": 8, "int16": 16,
    "complex64": 64, "int8": 8, "float64": 64, "complex128": 128, "uint64": 64, "uint32": 32,
    "uint16": 16, "int4": 4,
}  # fmt: skip
_QUANTIZED = frozenset({"int8", "uint8", "int16", "int4", "float16"})


def corrupt(message: str) -> WorkError:
    return WorkError("corrupt_file", f"the .tflite file is damaged: {message}", REPEAT_HINT)


def scan_tflite(content: bytes) -> Any:
    """The file's object tree (ModelT), every reference in it checked.

    Raises WorkError `corrupt_file`, or `unsupported_ops` naming custom operators.
    """
    model = check_structure(content)
    _check_operators(model)
    return model


def check_structure(content: bytes) -> Any:
    """The same for any operators, custom ones included. Raises WorkError `corrupt_file`."""
    if len(content) < 16 or content[4:8] != IDENTIFIER:
        raise corrupt("it does not start as a .tflite does")
    try:
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        _check(model, len(content))
    except WorkError:
        raise
    except Exception as error:
        # The reader raises whatever a wild offset leads to: struct, index, type, memory errors.
        raise corrupt(f"it cannot be read ({type(error).__name__}), it may be cut off") from None
    return model


def _check(model: Any, size: int) -> None:
    if model.version != 3:
        raise corrupt(f"its version is {model.version}, not 3")
    if not model.subgraphs or len(model.subgraphs) > MAX_SUBGRAPHS:
        raise corrupt("it holds no graph")
    buffers = model.buffers or []
    for index, buffer in enumerate(buffers):
        # Large files keep their data behind the flatbuffer, by offset.
        if buffer.offset > 1 and buffer.offset + buffer.size > size:
            raise corrupt(f"the data of buffer {index} lies beyond its end, it was cut off")
    for graph in model.subgraphs:
        _check_graph(model, graph, buffers)
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex >= len(model.subgraphs):
            raise corrupt("a signature names a graph that it does not hold")
        count = len(model.subgraphs[signature.subgraphIndex].tensors)
        for item in [*(signature.inputs or []), *(signature.outputs or [])]:
            if item.tensorIndex >= count:
                raise corrupt("a signature names a tensor that it does not hold")


def _check_graph(model: Any, graph: Any, buffers: list[Any]) -> None:
    tensors = graph.tensors or []
    for tensor in tensors:
        _check_tensor(tensor, buffers)
    count, codes = len(tensors), len(model.operatorCodes or [])
    _check_indices(graph.inputs, count, 0, "an input")
    _check_indices(graph.outputs, count, 0, "an output")
    if graph.outputs is None or not len(graph.outputs):
        raise corrupt("a graph of it has no output")
    for operator in graph.operators or []:
        if not 0 <= operator.opcodeIndex < codes:
            raise corrupt("an operator has a code that it does not hold")
        # -1 stands for an optional operand that is left out.
        _check_indices(operator.inputs, count, -1, "an operator's operand")
        _check_indices(operator.outputs, count, 0, "an operator's result")
        _check_indices(operator.intermediates, count, -1, "an operator's intermediate")


def _check_tensor(tensor: Any, buffers: list[Any]) -> None:
    name = (tensor.name or b"").decode("utf-8", "replace")
    if tensor.type not in TYPE_NAMES:
        raise corrupt(f"the tensor '{name}' has an unknown type")
    shape = [int(size) for size in _list(tensor.shape)]
    elements = 1
    for size in shape:
        elements *= size
    if any(size < 0 for size in shape) or elements > MAX_ELEMENTS:
        raise corrupt(f"the tensor '{name}' has the impossible shape {shape}")
    if not 0 <= tensor.buffer < max(len(buffers), 1):
        raise corrupt(f"the tensor '{name}' names a buffer that it does not hold")
    data = buffers[tensor.buffer].data if buffers else None
    bits = _BITS.get(TYPE_NAMES[tensor.type])
    if data is None or not len(data) or tensor.sparsity is not None or bits is None:
        return
    if len(data) != (elements * bits + 7) // 8:
        raise corrupt(f"the tensor '{name}' of shape {shape} holds {len(data)} bytes")


def _check_indices(values: Any, count: int, low: int, what: str) -> None:
    if any(not low <= int(value) < count for value in _list(values)):
        raise corrupt(f"{what} is a tensor that it does not hold")


def _list(values: Any) -> Iterable[Any]:
    return [] if values is None else values


def _check_operators(model: Any) -> None:
    names = {
        (code.customCode or b"").decode("utf-8", "replace")
        for code in model.operatorCodes or []
        if max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.CUSTOM
    }
    unknown = sorted(names - KNOWN_CUSTOM)
    if not unknown:
        return
    if compiled := sorted(names & COMPILED.keys()):
        raise WorkError(
            "already_compiled",
            f"the file is compiled for {COMPILED[compiled[0]]} already: it holds the operator"
            f" {compiled[0]}",
            "Upload the float32 model that it was made from.",
        )
    flex = [name.removeprefix("Flex") for name in unknown if name.startswith("Flex")]
    if flex:
        raise WorkError(
            "unsupported_ops",
            f"the model runs TensorFlow operators beside LiteRT's own: {', '.join(flex)}",
            "Convert it with built-in operators only (TFLITE_BUILTINS), without SELECT_TF_OPS.",
        )
    raise WorkError(
        "unsupported_ops",
        f"the model uses custom operators, which only its author's program has:"
        f" {', '.join(unknown)}",
        "Convert it with built-in operators only.",
    )


def check_float(model: Any) -> None:
    """Refuse a model that is quantized already. Raises WorkError `not_float32`."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            kind = TYPE_NAMES[tensor.type]
            quantization = tensor.quantization
            scaled = quantization is not None and len(list(_list(quantization.scale))) > 0
            data = model.buffers[tensor.buffer].data
            halved = kind == "float16" and data is not None and len(data) > 0
            if halved or (scaled and kind in _QUANTIZED):
                name = (tensor.name or b"").decode("utf-8", "replace")
                raise WorkError(
                    "not_float32",
                    f"the .tflite file is quantized already: its tensor '{name}' is {kind}",
                    "Upload the float32 model that it was made from.",
                )


def count_parameters(model: Any) -> int:
    """Floating constants of all graphs, each counted once; folded ones as they are stored."""
    counted: dict[int, int] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data) and TYPE_NAMES[tensor.type].startswith("float"):
                elements = np.prod([int(size) for size in _list(tensor.shape)], dtype=np.int64)
                counted[tensor.buffer] = int(elements)
    return sum(counted.values())


def has_depthwise(model: Any) -> bool:
    """Whether the file knows the depthwise convolution; files list what they use."""
    depthwise = schema.BuiltinOperator.DEPTHWISE_CONV_2D
    return any(
        max(code.builtinCode, code.deprecatedBuiltinCode) == depthwise
        for code in model.operatorCodes or []
    )
