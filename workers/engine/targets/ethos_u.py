"""Compiles a .tflite file for an Arm Ethos-U NPU with Vela, and reads what Vela tells of it.

Vela (PyPI `ethos-u-vela`) folds what the NPU can run into custom operators `ethos-u` and leaves the
rest as it was, for the CPU. https://gitlab.arm.com/artificial-intelligence/ethos-u/ethos-u-vela
"""

import csv
import importlib.metadata
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from app.domain.ethos_u import (
    Accelerator,
    CpuOperator,
    EthosUOptions,
    EthosUReport,
    Platform,
    platform,
)
from app.domain.problems import Note, WorkError
from workers.engine import inspect_tflite
from workers.engine.inspect_tflite import Graph, Subgraph
from workers.engine.scan_tflite import COMPILED
from workers.engine.targets import commands
from workers.engine.targets.commands import Ended

NPU_OPERATOR = "ethos-u"
_QUANTIZED = frozenset({"int8", "uint8", "int16"})
_CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})
# Room for the compiled file and the log: a compiled file has about the size of its source.
_LEAST_ROOM = 64 * 2**20
_NAMED = 5  # operators told by name before "and N more"
_REASON = 120  # characters of a reason in a note; the report has all
_HINT = "Try another accelerator or `optimise`; if it persists, report it with the compiler's log."


@dataclass(frozen=True)
class EthosResult:
    """`content`: the compiled .tflite; `log`: what Vela wrote."""

    content: bytes
    report: EthosUReport
    log: str


def version() -> str | None:
    """Vela's version here; None where it is not installed."""
    try:
        return importlib.metadata.version("ethos-u-vela")
    except importlib.metadata.PackageNotFoundError:
        return None


def compile(
    content: bytes,
    accelerator: str,
    directory: Path,
    timeout_s: float = 300.0,
    options: EthosUOptions | None = None,
) -> EthosResult:
    """Compile for an accelerator such as "ethos-u55-128", in files of its own in `directory`.

    Vela runs in a process of its own: it crashes on some files, and its time grows with the model.
    A file of which nothing runs on the NPU comes back as Vela leaves it, with a note
    `nothing_mapped`; other notes are `left_on_cpu` and `axes_fixed`. Raises WorkError
    `unknown_accelerator`, `invalid_options`, `invalid_model`, `not_quantized`, `already_compiled`,
    `compiler_not_installed`, `compiler_timeout`, `compiler_crashed`, `compiler_failed`.
    """
    options = options or EthosUOptions()
    chosen = platform(accelerator, options)
    source = inspect_tflite.parse(content)
    check_not_compiled(source)
    _check_quantized(source)
    vela = version()
    if vela is None:
        raise WorkError(
            "compiler_not_installed",
            "Vela, the compiler for Ethos-U, is not installed on this worker.",
            "Install the package ethos-u-vela beside the worker.",
        )
    # Of a fixed name: Vela makes the names of what it writes from it.
    (directory / "model.tflite").write_bytes(content)
    ended = commands.run_python(
        "ethosu.vela",
        _arguments(accelerator, chosen, options),
        directory,
        directory / "vela.log",
        timeout_s=timeout_s,
        file_bytes=max(_LEAST_ROOM, 4 * len(content)),
    )
    _check_ended(ended, timeout_s)
    try:
        compiled = (directory / "model_vela.tflite").read_bytes()
        summary = directory / f"model_summary_{chosen.system_config}.csv"
        figures = _read_summary(summary.read_text())
        made = inspect_tflite.parse(compiled)
        _check_borders(source, made)
        left = _left_on_cpu(made, ended.log)
        report = EthosUReport(
            accelerator=cast(Accelerator, accelerator),
            vela_version=vela,
            optimise=options.optimise,
            size_bytes=len(compiled),
            cpu_operators=left,
            notes=_notes(source, left),
            **_shares(source, made, left),
            **_estimates(figures),
        )
    except (OSError, ValueError, KeyError, OverflowError, WorkError) as error:
        raise WorkError(
            "compiler_failed",
            f"What Vela wrote cannot be used: {type(error).__name__}: {error}. Its last words:"
            f" {ended.last_line()}",
            _HINT,
        ) from error
    return EthosResult(compiled, report, ended.log)


def check_not_compiled(graph: Graph) -> None:
    """Raises WorkError `already_compiled` for a file that a compiler has made for a chip."""
    for sub in graph.subgraphs:
        for op in sub.ops:
            if op.name in COMPILED:
                raise WorkError(
                    "already_compiled",
                    f"The file is compiled for {COMPILED[op.name]} already: it holds the operator"
                    f" {op.name}.",
                    "Give the quantized .tflite that it was compiled from.",
                )


def _check_quantized(graph: Graph) -> None:
    """A file none of whose operators makes integer activations has nothing for the NPU."""
    for sub in graph.subgraphs:
        for op in sub.ops:
            outputs = [sub.tensors[i] for i in op.outputs if i >= 0]
            integer = any(t.dtype in _QUANTIZED and t.scales.size for t in outputs)
            if integer and op.name not in _CONVERSIONS:
                return
    found = inspect_tflite.float_ops(graph)
    if found:
        operator, layer = found[0]
        raise WorkError(
            "not_quantized",
            f"The file computes in float (the first operator is {operator} at '{layer}'), and"
            " Ethos-U runs integers only.",
            "Quantize activations too: use the recipe int8 (or int16x8 for more precision).",
        )


def _arguments(accelerator: str, chosen: Platform, options: EthosUOptions) -> list[str]:
    arguments = ["model.tflite", "--output-dir", ".", "--config", "Arm/vela.ini"]
    arguments += ["--accelerator-config", accelerator]
    arguments += ["--system-config", chosen.system_config, "--memory-mode", chosen.memory_mode]
    arguments += ["--optimise", options.optimise.capitalize(), "--verbose-cycle-estimate"]
    if options.arena_cache_size is not None:
        arguments += ["--arena-cache-size", str(options.arena_cache_size)]
    return arguments


def _check_ended(ended: Ended, timeout_s: float) -> None:
    if ended.timed_out:
        raise WorkError(
            "compiler_timeout",
            f"Vela was stopped after {timeout_s:g} s.",
            "Use a smaller model, or give it more time.",
        )
    if "Failed to load TfLite model" in ended.log:
        raise WorkError(
            "invalid_model",
            "Vela cannot load the file: its contents are inconsistent.",
            "Make the file anew with TFLiteConverter.",
        )
    if ended.signal_name is not None:
        raise WorkError(
            "compiler_crashed",
            f"Vela crashed with {ended.signal_name}. Its last words: {ended.last_line()}",
            _HINT,
        )
    if ended.status != 0:
        _, told, reason = ended.log.partition("Compilation failed: ")
        reason = " ".join(reason.split())[:500] if told else ended.last_line()
        raise WorkError("compiler_failed", f"Vela cannot compile the file: {reason}", _HINT)


def _read_summary(text: str) -> dict[str, str]:
    """The one row of Vela's summary. Raises ValueError where it is no such table."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) != 1:
        raise ValueError(f"its summary has {len(rows)} rows")
    return rows[0]


def _estimates(figures: Mapping[str, str]) -> dict[str, Any]:
    """The report's figures from Vela's summary, which has memory in KiB and time in seconds."""

    def number(column: str, scale: int = 1) -> int:
        return round(float(figures[column]) * scale)

    rate = float(figures["inferences_per_second"])
    return {
        "system_config": figures["system_config"],
        "memory_mode": figures["memory_mode"],
        "clock_hz": number("core_clock"),
        "cycles": number("cycles_total"),
        "npu_cycles": number("cycles_npu"),
        "inference_ms": float(figures["inference_time"]) * 1000,
        "inferences_per_second": rate if math.isfinite(rate) else None,
        "sram_bytes": number("sram_memory_used", 1024),
        "dram_bytes": number("dram_memory_used", 1024),
        "on_chip_flash_bytes": number("on_chip_flash_memory_used", 1024),
        "off_chip_flash_bytes": number("off_chip_flash_memory_used", 1024),
        "macs": number("nn_macs"),
        "original_weights_bytes": number("total_original_weights"),
        "encoded_weights_bytes": number("total_npu_encoded_weights"),
    }


def _shares(source: Graph, made: Graph, left: list[CpuOperator]) -> dict[str, Any]:
    """What of the file given is not left over in the compiled one."""
    operators = _operators(source)
    macs, macs_left = inspect_tflite.macs(source), inspect_tflite.macs(made)
    return {
        "operators": operators,
        "npu_share": max(0.0, 1 - len(left) / operators) if operators else 0.0,
        "npu_macs_share": max(0.0, 1 - macs_left / macs) if macs else None,
    }


def _operators(graph: Graph) -> int:
    return sum(len(sub.ops) for sub in graph.subgraphs)


def _left_on_cpu(made: Graph, log: str) -> list[CpuOperator]:
    """The compiled file's operators that are not the NPU's, with what Vela said of each.

    Vela warns of each as "Warning (supported operators) operator: FLOOR, ofm: 'layer'", a line
    "Reason: ..." and, where there is more to say, lines up to an empty one.
    """
    left = []
    for sub in made.subgraphs:
        for op in sub.ops:
            if op.name == NPU_OPERATOR:
                continue
            layer = sub.layer(op)
            # By the layer known from the file: a name may hold quotes and line breaks.
            _, told, rest = log.partition(f", ofm: '{layer}'\nReason: ")
            reason = " ".join(rest.split("\n\n", 1)[0].split())[:500] if told else None
            left.append(CpuOperator(operator=op.name, layer=layer, reason=reason))
    return left


def _notes(source: Graph, left: list[CpuOperator]) -> list[Note]:
    notes = []
    operators = _operators(source)
    named = "; ".join(
        f"{op.operator} at '{op.layer}' ({(op.reason or 'no reason given')[:_REASON]})"
        for op in left[:_NAMED]
    )
    if len(left) > _NAMED:
        named += f"; and {len(left) - _NAMED} more"
    if len(left) >= operators:
        message = f"No operator runs on the NPU, so nothing is gained by it: {named}."
        notes.append(Note(code="nothing_mapped", message=message))
    elif left:
        message = f"{len(left)} of {operators} operators stay on the CPU: {named}."
        notes.append(Note(code="left_on_cpu", message=message))
    open_axes = _open_axes(source.main)
    if open_axes:
        message = f"The NPU needs fixed shapes: open sizes beside the batch became 1: {open_axes}."
        notes.append(Note(code="axes_fixed", message=message))
    return notes


def _open_axes(sub: Subgraph) -> str:
    inputs = [sub.tensors[i] for i in sub.inputs]
    return ", ".join(f"'{t.name}' {list(t.signature)}" for t in inputs if -1 in t.signature[1:])


def _check_borders(source: Graph, made: Graph) -> None:
    """Inputs and outputs must be as they were. Raises ValueError."""

    def borders(graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
        ends = (*graph.main.inputs, *graph.main.outputs)
        return [(graph.main.tensors[i].dtype, graph.main.tensors[i].shape) for i in ends]

    if borders(source) != borders(made):
        raise ValueError(
            f"inputs and outputs are {borders(made)} where the source's are {borders(source)}"
        )
