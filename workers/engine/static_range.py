"""What int8 and int16x8 share: ranges to integers, bias correction, input and output types."""

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from app.domain.options import Granularity
from app.domain.problems import Note, WorkError
from app.domain.recipes import Int8, Int16x8, Qat
from workers.engine import absorb, bias_correction, litert
from workers.engine import graph as tfl
from workers.engine.calibrate import Ranges
from workers.engine.techniques.request import Quantized, Request

# A range narrower than this is a dead layer's; any scale serves it, but none may be 0.
_NARROW = 1e-6
# Room that a bias may take up, by the bits of activations, so that accumulation on top of it
# cannot overflow: int32, and the 48 bits that kernels rescale of an int64.
_BIAS_LIMIT = {8: 2.0**29, 16: 2.0**45}


def quantize_static(
    request: Request, step: Int8 | Int16x8 | Qat, activation_bits: int
) -> Quantized:
    """8-bit weights and activations of `activation_bits`, from exact ranges.

    Raises WorkError: `calibration_missing`, `calibration_mismatch`, `unsupported_model`,
    `not_integer_only`, `cannot_run`.
    """
    if request.ranges is None:
        raise WorkError(
            "calibration_missing",
            f"{step.technique} needs calibration ranges and got none.",
            "Give calibration data.",
        )
    ranges = request.ranges
    model = tfl.read(request.float_model)
    graph = tfl.single_subgraph(model)
    ranges.check(model)
    tfl.name_uniquely(model)
    excluded, notes = litert.excluded(model, step.exclude)
    # What training fakes is per channel, but for dense layers.
    granularity: Granularity = "per_channel" if isinstance(step, Qat) else step.granularity
    dense = granularity if granularity == "per_tensor" else step.dense_granularity
    qsvs = _qsvs(model, graph, ranges)
    qsvs.update(_weights_for_biases(model, graph, ranges, granularity, dense, activation_bits))
    named = tfl.write(model)
    request.emit("quantize", 0.0, None)
    content = litert.quantize_static(
        named,
        qsvs,
        activation_bits,
        granularity,
        dense,
        excluded,
        float_input=step.input_type == "float32",
        float_output=step.output_type == "float32",
    )
    made = _absorbed(content, excluded)
    if activation_bits == 16:
        _widen_biases(made, model)
    notes += _float_notes(made, step.integer_only, set(excluded))
    content = tfl.write(made)
    request.emit("quantize", 1.0, None)
    if request.samples is not None:
        content, note = bias_correction.correct(
            content,
            named,
            ranges,
            request.samples.head(step.calibration.samples),
            step.bias_correction,
            request.threads,
            request.emit,
        )
        if step.bias_correction != "off":
            notes.append(note)
    if "uint8" in (step.input_type, step.output_type):
        made = tfl.read(content)
        _to_uint8(made, step.input_type == "uint8", step.output_type == "uint8")
        content = tfl.write(made)
    return Quantized(content, notes)


def _absorbed(content: bytes, excluded: list[str]) -> Any:
    """The file with float islands made integer, unless a runtime kernel is missing for one."""
    made = tfl.read(content)
    if not absorb.absorb(made, excluded):
        return made
    try:
        tfl.open_interpreter(tfl.write(made), 1).allocate_tensors()
    except (RuntimeError, ValueError):
        return tfl.read(content)
    return made


def _qsvs(model: Any, graph: Any, ranges: Ranges) -> dict[str, dict[str, Any]]:
    found = {}
    for index, low, high in zip(ranges.tensors, ranges.minima, ranges.maxima, strict=True):
        low, high = float(low), float(high)
        if max(abs(low), abs(high)) < _NARROW:
            high = _NARROW
        found[tfl.tensor_name(graph.tensors[index])] = litert.qsv(np.float32(low), np.float32(high))
    return found


def _weights_for_biases(
    model: Any, graph: Any, ranges: Ranges, granularity: str, dense: str, activation_bits: int
) -> dict[str, dict[str, Any]]:
    """Wider ranges for weights whose scale would push the bias out of its type.

    A bias is held in steps of input scale x weight scale, so a channel of tiny or zero weights
    (pruned, or dead after training) leaves no room for it.
    """
    wider: dict[str, dict[str, Any]] = {}
    for _, operator, name, _ in tfl.layers(model, graph):
        if name not in tfl.WEIGHTED:
            continue
        weight_at, bias_at, axis = tfl.WEIGHTED[name]
        if bias_at >= len(operator.inputs) or operator.inputs[bias_at] < 0:
            continue
        tensor = graph.tensors[operator.inputs[weight_at]]
        weight = tfl.constant(model, tensor)
        bias = tfl.constant(model, graph.tensors[operator.inputs[bias_at]])
        span = ranges.range_of(tfl.activation_of(operator, name))
        if weight is None or bias is None or span is None or tensor.type not in tfl.FLOATS:
            continue
        if activation_bits == 8:
            input_scale = max(max(span[1], 0.0) - min(span[0], 0.0), _NARROW) / 255
        else:
            input_scale = max(abs(span[0]), abs(span[1]), _NARROW) / 32767
        others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
        largest = np.abs(weight).max(axis=others)
        needed = 127 * np.abs(bias.reshape(-1)) / (input_scale * _BIAS_LIMIT[activation_bits])
        if np.all(needed <= largest):
            continue
        bound = np.maximum(largest, needed)
        if (dense if name == "FULLY_CONNECTED" else granularity) == "per_tensor":
            bound = np.broadcast_to(bound.max(), (1,) * weight.ndim)
        else:
            bound = np.expand_dims(bound, others)
        bound = bound.astype(np.float32)
        wider[tfl.tensor_name(tensor)] = litert.qsv(-bound, bound)
    return wider


def _widen_biases(made: Any, floats: Any) -> None:
    """Makes int64 biases anew from the float ones: litert-quantizer clips them to 32 bits."""
    graph, float_graph = made.subgraphs[0], floats.subgraphs[0]
    for position, twin in (tfl.weighted_pairs(made, floats) or {}).items():
        operator = graph.operators[position]
        name = tfl.operator_name(made, operator)
        weight_at, bias_at, _ = tfl.WEIGHTED[name]
        if bias_at >= len(operator.inputs) or operator.inputs[bias_at] < 0:
            continue
        bias = graph.tensors[operator.inputs[bias_at]]
        source = float_graph.operators[twin].inputs[bias_at]
        values = tfl.constant(floats, float_graph.tensors[source])
        if bias.type != schema.TensorType.INT64 or values is None:
            continue
        weight = graph.tensors[operator.inputs[weight_at]]
        activation = graph.tensors[tfl.activation_of(operator, name)]
        scales = np.asarray(weight.quantization.scale, np.float64)
        scales = scales * tfl.quantization(activation)[0]
        exact = np.round(values.reshape(-1).astype(np.float64) / scales).astype(np.int64)
        if np.array_equal(exact, np.asarray(tfl.constant(made, bias)).reshape(-1)):
            continue
        users = sum(bias.buffer == tensor.buffer for tensor in graph.tensors)
        if users == 1:
            made.buffers[bias.buffer].data = np.frombuffer(exact.tobytes(), np.uint8)
        else:
            bias.buffer = tfl.add_buffer(made, exact)


def _is_float(graph: Any, operator: Any) -> bool:
    indices = [*operator.inputs, *operator.outputs]
    return any(i >= 0 and graph.tensors[i].type in tfl.FLOATS for i in indices)


def _float_notes(model: Any, integer_only: bool, excluded: set[str]) -> list[Note]:
    """A note of the operators that stay float. Raises WorkError `not_integer_only`."""
    graph = model.subgraphs[0]
    floats: list[str] = []
    asked: list[str] = []
    all_float: list[tuple[str, str]] = []
    for _, operator, name, layer in tfl.layers(model, graph):
        if not _is_float(graph, operator):
            continue
        all_float.append((name, layer))
        if name in ("QUANTIZE", "DEQUANTIZE"):
            continue
        by_user = litert.operator_scope(graph, operator) in excluded
        (asked if by_user else floats).append(f"{name} '{layer}'")
    if integer_only and all_float:
        # A conversion at the edge says less than the operator that made it necessary.
        core = [item for item in all_float if item[0] not in ("QUANTIZE", "DEQUANTIZE")]
        name, layer = (core or all_float)[0]
        raise WorkError(
            "not_integer_only",
            f"{len(core or all_float)} operator(s) stay float, first {name} in layer '{layer}'.",
            'Replace that layer, try engine "converter", ask for integer input and output types,'
            " or drop integer_only.",
        )
    notes = []
    if floats:
        shown = ", ".join(floats[:10]) + (f" and {len(floats) - 10} more" if floats[10:] else "")
        notes.append(
            Note(code="float_ops", message=f"litert-quantizer leaves these float: {shown}.")
        )
    if asked:
        shown = ", ".join(asked[:10]) + (f" and {len(asked) - 10} more" if asked[10:] else "")
        notes.append(Note(code="excluded", message=f"Left float as asked: {shown}."))
    return notes


def _to_uint8(model: Any, inputs: bool, outputs: bool) -> None:
    """Puts a QUANTIZE between uint8 at the edge (zero point + 128) and int8 inside."""
    graph = model.subgraphs[0]
    for ends, wanted, is_input in ((graph.inputs, inputs, True), (graph.outputs, outputs, False)):
        for place in range(len(ends)) if wanted else []:
            inner = int(ends[place])
            tensor = graph.tensors[inner]
            if tensor.type != schema.TensorType.INT8:
                continue
            outer = _uint8_twin(tensor)
            graph.tensors.append(outer)
            added = len(graph.tensors) - 1
            # The edge keeps the name that callers know.
            tensor.name = tensor.name + b"_int8"
            operator = schema.OperatorT()
            operator.opcodeIndex = tfl.operator_code(
                model, schema.BuiltinOperator.QUANTIZE, version=2
            )
            operator.inputs, operator.outputs = [inner], [added]
            if is_input:
                operator.inputs, operator.outputs = [added], [inner]
                graph.operators.insert(0, operator)
            else:
                graph.operators.append(operator)
            ends[place] = added
            for signature in model.signatureDefs or []:
                for item in (signature.inputs if is_input else signature.outputs) or []:
                    if item.tensorIndex == inner:
                        item.tensorIndex = added


def _uint8_twin(tensor: Any) -> Any:
    twin = schema.TensorT()
    twin.__dict__.update(tensor.__dict__)
    twin.type = schema.TensorType.UINT8
    twin.quantization = schema.QuantizationParametersT()
    twin.quantization.scale = list(tensor.quantization.scale)
    twin.quantization.zeroPoint = [int(zero) + 128 for zero in tensor.quantization.zeroPoint]
    return twin
