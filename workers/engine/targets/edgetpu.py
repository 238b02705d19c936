"""What the Edge TPU compiler will make of a .tflite file, told without it.

The compiler hands operators to a delegate of TensorFlow Lite and keeps one part: the first of the
parts that TensorFlow Lite's partitioning makes of the operators that map
(tensorflow/lite/graph_info.cc). What needs the result of anything outside runs on the CPU, however
well it would map; what needs none is inside, wherever it stands in the order.
"""

from app.domain.edgetpu import DEFAULT_COMPILER, EdgeTpuAnalysis, EdgeTpuMemory, EdgeTpuOp
from app.domain.problems import Problem, WorkError
from workers.engine import inspect_tflite, scan_tflite
from workers.engine.inspect_tflite import Op, Subgraph
from workers.engine.targets import edgetpu_rules as rules
from workers.engine.targets import edgetpu_versions as versions
from workers.engine.targets.edgetpu_advice import advise
from workers.engine.targets.edgetpu_use import MESSAGES, Verdict
from workers.engine.targets.ethos_u import check_not_compiled
from workers.engine.tensors import Tensor

COMPILED = "edgetpu-custom-op"
MIB = 2**20
# The chip has 8 MiB for parameters and intermediate results together. Posted logs leave 7.5 to
# 7.9 MiB for the parameters of small and middle-sized models, and some 6.9 MiB where some of
# them are streamed, as streaming takes memory of its own.
CACHE_BYTES = int(7.7 * MIB)
CACHE_BYTES_STREAMING = int(6.9 * MIB)
_QUANTIZED = frozenset({"int8", "uint8"})


def analyze(
    content: bytes, compiler: str = DEFAULT_COMPILER, multiple_subgraphs: bool = False
) -> EdgeTpuAnalysis:
    """Predict, operator by operator of the main graph, what maps to the Edge TPU.

    `compiler`: the release of edgetpu_compiler; `multiple_subgraphs`: its option -a.
    Raises WorkError `corrupt_file`, `invalid_model`, `already_compiled` or `not_quantized`.
    """
    scan_tflite.check_structure(content)
    whole = inspect_tflite.parse(content)
    check_not_compiled(whole)
    graph = whole.main
    _check_quantized(graph)
    verdicts = [_verdict(graph, op, compiler) for op in graph.ops]
    parts = partition(graph, [verdict is None for verdict in verdicts])
    first = min((part for part in parts if part is not None), default=None)
    ops = []
    for index, (op, verdict, part) in enumerate(zip(graph.ops, verdicts, parts, strict=True)):
        if verdict is None and part != first and not multiple_subgraphs:
            verdict = Verdict("after_cpu")
        ops.append(
            EdgeTpuOp(
                index=index,
                name=op.name,
                layer=graph.layer(op),
                maps=verdict is None,
                reason=verdict.reason if verdict else "mapped",
                message=verdict.message if verdict else MESSAGES["mapped"],
            )
        )
    mapped = [op for op, told in zip(graph.ops, ops, strict=True) if told.maps]
    count = len({part for part in parts if part is not None})
    return EdgeTpuAnalysis(
        compiler=compiler,
        ops=ops,
        mapped=len(mapped),
        cpu=len(ops) - len(mapped),
        subgraphs=count if multiple_subgraphs else min(count, 1),
        memory=memory(graph, mapped),
        advice=advise(ops),
        failure=_failure(graph, compiler),
    )


def partition(graph: Subgraph, maps: list[bool]) -> list[int | None]:
    """The part that each mappable operator belongs to, numbered in order; None on the CPU.

    TensorFlow Lite's algorithm: the first operator decides the kind of the first part, which
    takes every operator of that kind that needs none of the other; kinds alternate from there.
    In an order in which operands come first, that puts an operator into the earliest part of its
    kind that is not before those of its operands.
    """
    epochs: dict[int, int] = {}
    parts: list[int | None] = []
    for op, kind in zip(graph.ops, maps, strict=True):
        epoch = max((epochs.get(index, 0) for index in op.inputs), default=0)
        if kind != (maps[0] if epoch % 2 == 0 else not maps[0]):
            epoch += 1
        epochs.update(dict.fromkeys(op.outputs, epoch))
        parts.append(epoch // 2 if kind else None)
    return parts


def memory(graph: Subgraph, mapped: list[Op]) -> EdgeTpuMemory:
    """Parameters as they are laid out for the chip, and how many of them its memory holds.

    A layer's parameters are cached as a whole or streamed as a whole.
    """
    sizes = [parameter_bytes(graph, op) for op in mapped]
    total = sum(sizes)
    capacity = CACHE_BYTES if total <= CACHE_BYTES else CACHE_BYTES_STREAMING
    cached = 0
    for size in sizes:
        if cached + size <= capacity:
            cached += size
    return EdgeTpuMemory(
        parameter_bytes=total,
        on_chip_bytes=cached,
        on_chip_remaining_bytes=capacity - cached,
        off_chip_bytes=total - cached,
    )


def parameter_bytes(graph: Subgraph, op: Op) -> int:
    """What an operator's parameters take on the chip, in bytes.

    Fitted to compiled files: values in fours of output and input channels, with 16 bytes beside
    for each output channel (bias and scale; 8 for dense layers), about 52 for a channel of a
    depthwise kernel, 64 for an operator without weights.
    """

    def constant(place: int) -> Tensor | None:
        return graph.constant(op.inputs[place]) if place < len(op.inputs) else None

    kernel = constant(1)
    shape = kernel.shape if kernel is not None else ()
    match op.name:
        case "CONV_2D" | "TRANSPOSE_CONV" if len(shape) == 4:
            return _fours(shape[0]) * (shape[1] * shape[2] * _fours(shape[3]) + 16)
        case "FULLY_CONNECTED" if len(shape) == 2:
            return _fours(shape[0]) * (_fours(shape[1]) + 8)
        case "DEPTHWISE_CONV_2D" if len(shape) == 4:
            return _fours(shape[3]) * max(52, _fours(shape[1] * shape[2]) + 16)
    held = [graph.constant(index) for index in op.inputs]
    data = [t.data for t in held if t is not None and t.dtype in _QUANTIZED and t.data is not None]
    return 64 + sum(len(values) for values in data)


def _verdict(graph: Subgraph, op: Op, compiler: str) -> Verdict | None:
    try:
        return rules.check(graph, op, compiler)
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WorkError(
            "invalid_model",
            f"The operator {op.name} ('{graph.layer(op)}') has operands that it cannot have:"
            f" {error}.",
            "Export the model again, and check that it runs in the interpreter.",
        ) from error


def _fours(count: int) -> int:
    return -(-count // 4) * 4


def _check_quantized(graph: Subgraph) -> None:
    computed = [graph.tensors[index] for op in graph.ops for index in op.outputs]
    computed += [graph.tensors[index] for index in graph.inputs]
    if any(tensor.dtype in _QUANTIZED and tensor.scales.size for tensor in computed):
        return
    constants = [t for t in graph.tensors if t.data is not None and t.dtype in _QUANTIZED]
    if any(tensor.dtype == "int16" and tensor.scales.size for tensor in computed):
        what = "its activations are 16-bit"
    elif any(tensor.scales.size for tensor in constants):
        what = "only its weights are 8-bit, it computes in float"
    else:
        what = "it computes in float"
    raise WorkError(
        "not_quantized",
        f"The Edge TPU runs 8-bit integer models only, and this one is not: {what}.",
        'Quantize it fully first: a job with the technique "int8" and calibration data.',
    )


def _failure(graph: Subgraph, compiler: str) -> Problem | None:
    for op in graph.ops:
        limit = versions.loaded_version(op.name, compiler)
        if limit is not None and op.version > limit:
            return Problem(
                code="op_version_unsupported",
                message=f"Compiler {compiler} cannot read the file: '{graph.layer(op)}' is"
                f" {op.name} version {op.version}, and it knows versions up to {limit}.",
                hint="Convert with an older TensorFlow (2.8 or before), or quantize dense layers"
                " per tensor; both write lower versions.",
            )
    for op in graph.ops:
        if rules.has_dynamic_result(graph, op):
            return Problem(
                code="dynamic_tensors",
                message="The compiler takes constant sizes only, and that of"
                f" '{graph.layer(op)}' ({op.name}) is computed while the model runs.",
                hint="Fix all input sizes, the batch to 1, and convert again.",
            )
    return None
