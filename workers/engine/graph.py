"""Reading and writing .tflite graphs through the schema's object tree, without TensorFlow."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils

from app.domain.problems import WorkError
from workers.engine.samples import Array, Batch

TYPE_NAMES: dict[int, str] = {
    value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")
}
OPERATOR_NAMES: dict[int, str] = {
    value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")
}
FLOATS = frozenset({schema.TensorType.FLOAT32, schema.TensorType.FLOAT16})

# Operators with a bias per output channel: where their weight and bias stand among the inputs,
# and the weight's axis of output channels.
WEIGHTED: dict[str, tuple[int, int, int]] = {
    "CONV_2D": (1, 2, 0),
    "DEPTHWISE_CONV_2D": (1, 2, 3),
    "FULLY_CONNECTED": (1, 2, 0),
    "TRANSPOSE_CONV": (1, 3, 0),
}


def read(content: bytes) -> Any:
    """The object tree (ModelT) of a .tflite; buffers are views of `content`."""
    try:
        model = flatbuffer_utils.read_model_from_bytearray(content)
        for buffer in model.buffers:
            if isinstance(buffer.data, bytes | bytearray | memoryview):
                buffer.data = np.frombuffer(buffer.data, np.uint8)
        return model
    except Exception as error:
        raise WorkError(
            "invalid_model",
            f"The file is no readable .tflite: {error}",
            "Upload the file again, or make it anew with TFLiteConverter.",
        ) from error


class _AlignedBuffer(schema.BufferT):  # type: ignore[misc]
    """A buffer on a 16-byte boundary, as the format wants it and the object tree forgets."""

    def Pack(self, builder: Any) -> int:  # noqa: N802
        if self.data is not None:
            payload = np.ascontiguousarray(self.data).tobytes()
            builder.StartVector(1, len(payload), 16)
            builder.head -= len(payload)
            builder.Bytes[builder.head : builder.head + len(payload)] = payload
            data = builder.EndVector()
        schema.BufferStart(builder)
        if self.data is not None:
            schema.BufferAddData(builder, data)
        return int(schema.BufferEnd(builder))


def write(model: Any) -> bytes:
    """The bytes of an object tree, with all constants inside it on 16-byte boundaries."""
    kept = model.buffers
    model.buffers = []
    for buffer in kept:
        aligned = _AlignedBuffer()
        aligned.data = buffer.data
        model.buffers.append(aligned)
    try:
        return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    finally:
        model.buffers = kept


def drop_unused_buffers(model: Any) -> None:
    """Removes the buffers that no tensor or metadata uses any more; the first stays, empty."""
    users = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    users += model.metadata or []
    places = {0: 0}
    kept = [model.buffers[0]]
    for user in users:
        if user.buffer not in places:
            places[user.buffer] = len(kept)
            kept.append(model.buffers[user.buffer])
        user.buffer = places[user.buffer]
    model.buffers = kept


def operator_name(model: Any, operator: Any) -> str:
    """The built-in operator's schema name, or a custom operator's own name."""
    code = model.operatorCodes[operator.opcodeIndex]
    if code.customCode:
        return text_of(code.customCode)
    return OPERATOR_NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")


def operator_code(model: Any, builtin: int, version: int) -> int:
    """The index of an operator code in the model, which is added where it is missing."""
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin and not code.customCode:
            code.version = max(code.version, version)
            return index
    added = schema.OperatorCodeT()
    added.builtinCode = builtin
    added.deprecatedBuiltinCode = min(builtin, 127)
    added.version = version
    model.operatorCodes.append(added)
    return len(model.operatorCodes) - 1


def text_of(name: bytes) -> str:
    """A name in the file as text that the database can keep: without NUL."""
    return name.decode("utf-8", "replace").replace("\0", "\ufffd")


def tensor_name(tensor: Any) -> str:
    return text_of(tensor.name or b"")


def layer_name(graph: Any, operator: Any) -> str:
    """What a layer is called here: the name of its operator's (first) output tensor."""
    return tensor_name(graph.tensors[operator.outputs[0]]) if len(operator.outputs) else ""


def shape_of(tensor: Any) -> list[int]:
    return [] if tensor.shape is None else [int(size) for size in tensor.shape]


def constant(model: Any, tensor: Any) -> Array | None:
    """The values of a constant tensor, or None where it is computed."""
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return None
    dtype = np.dtype(TYPE_NAMES[tensor.type].lower())
    return np.frombuffer(data, dtype=dtype).reshape(shape_of(tensor))


def add_buffer(model: Any, values: Array) -> int:
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def single_subgraph(model: Any) -> Any:
    """The model's only subgraph; a model with control flow is refused.

    Raises WorkError `unsupported_model`.
    """
    if len(model.subgraphs) != 1:
        raise WorkError(
            "unsupported_model",
            f"The model has {len(model.subgraphs)} subgraphs (control flow such as WHILE or IF),"
            " whose inner ranges cannot be collected from the outside.",
            'Ask for engine "converter", or unroll the loop (for example RNN(unroll=True)).',
        )
    return model.subgraphs[0]


def name_uniquely(model: Any) -> None:
    """Gives tensors that share a name, or have none, one of their own; indices stay."""
    seen: set[str] = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            name = base = tensor_name(tensor) or "tensor"
            turn = 1
            while name in seen:
                name = f"{base}_{turn}"
                turn += 1
            seen.add(name)
            tensor.name = name.encode()


def input_names(content_or_model: Any) -> dict[int, list[str]]:
    """Input tensor index -> the names that a sample's array may go by."""
    model = content_or_model
    graph = model.subgraphs[0]
    names: dict[int, list[str]] = {}
    for index in graph.inputs:
        name = tensor_name(graph.tensors[index])
        bare = name.removeprefix("serving_default_").split(":")[0]
        names[int(index)] = [name, bare]
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex == 0:
            for item in signature.inputs or []:
                if item.tensorIndex in names:
                    names[item.tensorIndex].insert(0, text_of(item.name))
    return names


def feed(names: Mapping[int, list[str]], batch: Batch) -> dict[int, Array]:
    """A batch by input tensor index instead of by name. Raises WorkError `input_mismatch`."""
    if len(names) == 1 and len(batch) == 1:
        return {next(iter(names)): next(iter(batch.values()))}
    fed: dict[int, Array] = {}
    for index, candidates in names.items():
        found = next((name for name in candidates if name in batch), None)
        if found is None:
            raise WorkError(
                "input_mismatch",
                f"The data has no array for the model's input '{candidates[0]}';"
                f" it has: {', '.join(batch)}.",
                "Name the arrays as the model's inputs are named.",
            )
        fed[index] = batch[found]
    return fed


def open_interpreter(content: bytes, threads: int, kernels: str = "default") -> Interpreter:
    """An interpreter; `kernels`: "default" (XNNPACK) or "preserve" (built-in ones, all tensors)."""
    if kernels == "default":
        return Interpreter(model_content=content, num_threads=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that keeping all tensors takes memory
        return Interpreter(
            model_content=content,
            num_threads=threads,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )


def resize(interpreter: Interpreter, indices: Iterable[int], factor: int) -> None:
    """Multiplies the first axis of inputs by `factor` and allocates."""
    if factor > 1:
        shapes = {d["index"]: d["shape"] for d in interpreter.get_input_details()}
        for index in indices:
            shape = [int(size) for size in shapes[index]]
            interpreter.resize_tensor_input(index, [shape[0] * factor, *shape[1:]])
    interpreter.allocate_tensors()


def is_batchable(content: bytes) -> bool:
    """Whether all of a graph scales with the first axis of its inputs, as a doubled run shows."""
    model = read(content)
    graph = model.subgraphs[0]
    floats = [
        int(index)
        for operator in graph.operators
        for index in operator.outputs
        if graph.tensors[index].type in FLOATS
    ]
    if any(not shape_of(graph.tensors[index]) for index in graph.inputs):
        return False
    if any(shape_of(graph.tensors[index])[0] != 1 for index in graph.inputs):
        return False
    try:
        interpreter = open_interpreter(content, 1, "preserve")
        resize(interpreter, graph.inputs, 2)
        # Shapes that the graph computes are known after a run only.
        interpreter.invoke()
    except (RuntimeError, ValueError):
        return False
    for index in floats:
        shape = list(interpreter.tensor(index)().shape)
        before = shape_of(graph.tensors[index])
        if not before or not shape or shape[0] != 2 or shape[1:] != before[1:]:
            return False
    return True


def layers(model: Any, graph: Any) -> Iterator[tuple[int, Any, str, str]]:
    """(position, operator, operator name, layer name) in execution order."""
    for position, operator in enumerate(graph.operators):
        yield position, operator, operator_name(model, operator), layer_name(graph, operator)


def weighted_pairs(model: Any, floats: Any) -> dict[int, int] | None:
    """Position of each operator with weights -> position of its twin in the float file.

    They are paired by order, as names repeat and quantization adds operators between them; None
    where that fails.
    """
    own, theirs = (
        [(at, name) for at, _, name, _ in layers(some, some.subgraphs[0]) if name in WEIGHTED]
        for some in (model, floats)
    )
    if [name for _, name in own] != [name for _, name in theirs]:
        return None
    return {at: twin for (at, _), (twin, _) in zip(own, theirs, strict=True)}


def activation_of(operator: Any, name: str) -> int:
    """The tensor that an operator with weights works on."""
    return int(operator.inputs[2 if name == "TRANSPOSE_CONV" else 0])


def quantization(tensor: Any) -> tuple[float, int]:
    """(scale, zero point) of a tensor quantized as a whole; (0.0, 0) where it is not."""
    found = tensor.quantization
    if found is None or found.scale is None or not len(found.scale):
        return 0.0, 0
    return float(found.scale[0]), int(found.zeroPoint[0])


def with_sizes(content: bytes, shapes: list[list[int]]) -> bytes:
    """A file of open sizes with the sizes that its tensors have for inputs of `shapes` (in the
    graph's order; the batch axis may stay open, -1). Raises WorkError `dynamic_shape`."""
    model = read(content)
    graph = single_subgraph(model)
    any_open = any(shape and shape[0] == -1 for shape in shapes)
    try:
        interpreter = open_interpreter(content, 1, "preserve")
        for index, shape in zip(graph.inputs, shapes, strict=True):
            interpreter.resize_tensor_input(int(index), [1 if n == -1 else n for n in shape])
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise WorkError(
            "dynamic_shape",
            f"The model does not take inputs of the shapes {shapes}: {error}",
            "Give other sizes in the spec's input_shapes.",
        ) from error
    details = {int(detail["index"]): detail for detail in interpreter.get_tensor_details()}
    for index, tensor in enumerate(graph.tensors):
        if constant(model, tensor) is None and index in details:
            signature = tensor.shapeSignature
            open_batch = any_open and signature is not None and signature[0] == -1
            tensor.shape = [int(n) for n in details[index]["shape"]]
            tensor.shapeSignature = [-1, *tensor.shape[1:]] if open_batch else None
    return write(model)
