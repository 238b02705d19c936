"""litert-quantizer, asked the way this service asks for things."""

import contextlib
import io
import re
import warnings
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from litert_quantizer import qtyping, quantizer, recipe_manager

from app.domain.options import Granularity
from app.domain.problems import Note, WorkError
from workers.engine import graph as tfl
from workers.engine.names import found_by

_GRANULARITY = {
    "per_channel": qtyping.QuantGranularity.CHANNELWISE,
    "per_tensor": qtyping.QuantGranularity.TENSORWISE,
}
_NO_QUANTIZE = recipe_manager.AlgorithmName.NO_QUANTIZE
_NAMES = qtyping.TFLOperationName
# A scope of every operator that differs, as text, from the others: the manager keys by text.
_EVERY = ".*"
_EVERY_IO = "(?:.*)"
_SCOPE_LENGTH = 10_000  # litert-quantizer cuts scopes here


def excluded(model: Any, patterns: list[str]) -> tuple[list[str], list[Note]]:
    """The scopes (output names as litert-quantizer writes them) of layers that a pattern
    finds, and a note for each pattern that finds none."""
    found: dict[str, None] = {}
    notes = []
    for pattern in patterns:
        matches = [
            operator_scope(graph, operator)
            for graph in model.subgraphs
            for operator in graph.operators
            if found_by(pattern, _names(model, graph, operator))
        ]
        found.update(dict.fromkeys(matches))
        if not matches:
            notes.append(
                Note(
                    code="exclude_matched_nothing",
                    message=f"No layer's name contains '{pattern}', so it excludes nothing.",
                )
            )
    return list(found), notes


def _output_names(graph: Any, operator: Any) -> list[str]:
    return [tfl.tensor_name(graph.tensors[index]) for index in operator.outputs if index >= 0]


def _names(model: Any, graph: Any, operator: Any) -> list[str]:
    """All that an operator's layer is called by: the last one's output has the signature's name,
    and its kernel the layer's."""
    kernels = [
        tfl.tensor_name(graph.tensors[index])
        for index in operator.inputs
        if index >= 0 and tfl.constant(model, graph.tensors[index]) is not None
    ]
    return _output_names(graph, operator) + kernels


def operator_scope(graph: Any, operator: Any) -> str:
    return "".join(f"{name};" for name in _output_names(graph, operator))[:_SCOPE_LENGTH]


def quantize_dynamic(
    content: bytes, granularity: Granularity, excluded: list[str], float_depthwise: bool
) -> bytes:
    """8-bit weights; everything else stays float."""
    tool = _open(content)
    tool.add_dynamic_config(_EVERY, _NAMES.ALL_SUPPORTED, 8, _GRANULARITY[granularity])
    if float_depthwise:
        tool.update_quantization_recipe(
            _EVERY, _NAMES.DEPTHWISE_CONV_2D, algorithm_key=_NO_QUANTIZE
        )
    _exclude(tool, excluded)
    return _run(tool, None)


def quantize_static(
    content: bytes,
    qsvs: dict[str, dict[str, Any]],
    activation_bits: int,
    granularity: Granularity,
    dense_granularity: Granularity,
    excluded: list[str],
    float_input: bool,
    float_output: bool,
) -> bytes:
    """8-bit weights and integer activations by ranges, given by tensor name."""
    tool = _open(content)

    def static(scope: str, operation: Any, kernels: Granularity = granularity) -> None:
        tool.add_static_config(scope, operation, activation_bits, 8, _GRANULARITY[kernels])

    static(_EVERY, _NAMES.ALL_SUPPORTED)
    static(_EVERY, _NAMES.FULLY_CONNECTED, dense_granularity)
    _exclude(tool, excluded)
    # Last, as an exclusion by the name of an output's tensor finds the virtual OUTPUT as well.
    for operation, stays_float in ((_NAMES.INPUT, float_input), (_NAMES.OUTPUT, float_output)):
        if stays_float:
            tool.update_quantization_recipe(_EVERY_IO, operation, algorithm_key=_NO_QUANTIZE)
        else:
            static(_EVERY_IO, operation)
    return _run(tool, qsvs)


def has_integer_weights(model: Any) -> bool:
    return any(
        tensor.type == schema.TensorType.INT8 and tfl.constant(model, tensor) is not None
        for graph in model.subgraphs
        for tensor in graph.tensors
    )


def _open(content: bytes) -> Any:
    return quantizer.Quantizer(content)


def _exclude(tool: Any, excluded: list[str]) -> None:
    for scope in excluded:
        tool.update_quantization_recipe(
            f"^{re.escape(scope)}$", _NAMES.ALL_SUPPORTED, algorithm_key=_NO_QUANTIZE
        )


def _run(tool: Any, qsvs: dict[str, dict[str, Any]] | None) -> bytes:
    try:
        # Some of its progress bars cannot be turned off otherwise.
        # Biases that it clips to 32 bits are made anew (see static_range).
        with (
            contextlib.redirect_stderr(io.StringIO()),
            np.errstate(invalid="ignore"),
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):
            result = tool.quantize(qsvs, enable_progress_bar=False, enable_progress_report=False)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise WorkError(
            "unsupported_model",
            f"litert-quantizer cannot quantize this model: {error}",
            'Exclude the layer that the message names, or ask for engine "converter".',
        ) from error
    return bytes(result.quantized_model)


def qsv(low: Any, high: Any) -> dict[str, Any]:
    """A range as litert-quantizer reads it: arrays that broadcast against the tensor."""
    return {"min": np.atleast_1d(low), "max": np.atleast_1d(high)}
