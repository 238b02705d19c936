"""Measures a .tflite file under TensorFlow Lite Micro (TFLM, PyPI `tflite-micro`)."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.micro import OPERATORS, MicroReport
from app.domain.problems import Note, WorkError
from workers.engine import inspect_tflite
from workers.engine.evaluate import quantized
from workers.engine.inspect_tflite import Graph
from workers.engine.samples import Array, Batch
from workers.engine.targets import commands
from workers.engine.targets.commands import Ended
from workers.engine.targets.ethos_u import check_not_compiled

_PROBE = Path(__file__).with_name("micro_probe.py")
_SAMPLES = 20  # compared at most: TFLM's kernels are plain and slow
_ROOM = 16 * 2**20  # for the log, which the interpreter writes
_ALIGNMENT = 16
_FINE_STEPS = 256  # of 16 bits in one of 8 bits
# The interpreter's own words for an operator that its resolver does not know.
_LACKS = re.compile(r"Didn't find op for builtin opcode '(\w+)'")
# Python's words about an error; what the interpreter said before them says why.
_TRACEBACK = "Traceback (most recent call last)"


def version() -> str | None:
    """The version of TFLM's runtime here; None where it is not installed."""
    try:
        return importlib.metadata.version("tflite-micro")
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_operators(graph: Graph) -> list[str]:
    """The file's operators that TFLM has no kernel for, by the list of those it has.

    Custom operators count as missing: a firmware may register them, the runtime here cannot.
    """
    names = {op.name for sub in graph.subgraphs for op in sub.ops}
    return sorted(names - OPERATORS)


def flash_bytes(content: bytes) -> int:
    """What the C array takes; see `app.domain.micro.FLASH_COUNTS`."""
    return -(-len(content) // _ALIGNMENT) * _ALIGNMENT


def measure(
    content: bytes, sample: Batch | None, directory: Path, timeout_s: float = 120.0
) -> MicroReport:
    """Run the file in TFLM's interpreter, in files of its own in `directory`.

    `sample`: real values by input, [samples, ...]; at most 20 of them are compared with LiteRT's
    answers; without any, one of zeros is run, and nothing is said of the answers. The interpreter
    is native code that trusts its file: it runs in a process of its own, so that a crash or a hang
    is no more than the reason why the file does not run there. Raises WorkError `invalid_model`,
    `already_compiled`, `inputs_do_not_fit`, `runtime_not_installed`.
    """
    graph = inspect_tflite.parse(content)
    check_not_compiled(graph)
    tflm = version()
    if tflm is None:
        raise WorkError(
            "runtime_not_installed",
            "TensorFlow Lite Micro is not installed on this worker.",
            "Install the package tflite-micro beside the worker (Linux on x86-64).",
        )
    inputs = _inputs(graph, sample)
    model, given, result = (directory / f"micro.{kind}" for kind in ("tflite", "npz", "json"))
    model.write_bytes(content)
    with given.open("wb") as file:
        np.savez(file, allow_pickle=False, **inputs)
    result.unlink(missing_ok=True)
    ended = commands.run_python(
        str(_PROBE),
        [model.name, given.name, result.name],
        directory,
        directory / "micro.log",
        timeout_s=timeout_s,
        file_bytes=_ROOM,
    )
    found: dict[str, Any] = json.loads(result.read_bytes()) if result.exists() else {}
    report = MicroReport(
        runs="arena" in found,
        missing_operators=sorted({*missing_operators(graph), *_LACKS.findall(ended.log)}),
        flash_bytes=flash_bytes(content),
        tflm_version=tflm,
    )
    if not report.runs:
        report.reason = _reason(ended, timeout_s)
        return report
    report.arena_bytes = found["arena"]
    report.persistent_bytes = found.get("tail")
    report.nonpersistent_bytes = found.get("head")
    if sample is not None:
        outputs = {graph.main.tensors[i].dtype for i in graph.main.outputs}
        _compare(report, found, ended, timeout_s, _FINE_STEPS if "int16" in outputs else 1)
    return report


def _compare(
    report: MicroReport, found: dict[str, Any], ended: Ended, timeout_s: float, steps: int
) -> None:
    if ended.status != 0:
        message = f"The comparison with LiteRT ended early: {_reason(ended, timeout_s)}"
        report.notes.append(Note(code="comparison_ended", message=message))
    report.samples_compared = found.get("compared", 0)
    if not report.samples_compared:
        return
    report.steps_apart = round(found["apart"], 3)
    report.agrees = report.steps_apart <= steps
    if not report.agrees:
        message = (
            f"TFLM's answers are up to {report.steps_apart:g} steps apart from those of LiteRT's"
            f" reference kernels on {report.samples_compared} samples: accuracies measured with"
            " LiteRT may not hold on the device."
        )
        report.notes.append(Note(code="answers_differ", message=message))


def _reason(ended: Ended, timeout_s: float) -> str:
    """Why the probe ended before its end."""
    said = [line.strip() for line in ended.log.partition(_TRACEBACK)[0].splitlines()]
    words = "; ".join(line for line in said if line)[:500] or ended.last_line()
    if ended.timed_out:
        return f"It was stopped after {timeout_s:g} s: {words}"
    if ended.signal_name is not None:
        return f"The interpreter crashed with {ended.signal_name}: {words}"
    return words


def _inputs(graph: Graph, sample: Batch | None) -> dict[str, Array]:
    """Arrays as the file's inputs take them, each a batch as stored (mostly of one), by
    "INPUT_SAMPLE". Raises WorkError `inputs_do_not_fit`."""
    tensors = [graph.main.tensors[i] for i in graph.main.inputs]
    names = [graph.names.get(tensor.index, tensor.name) for tensor in tensors]
    if sample is None:
        return {f"{i}_0": np.zeros(t.shape, _dtype(t.dtype)) for i, t in enumerate(tensors)}
    if len(sample) != len(tensors):
        raise _unfit(f"the data has {list(sample)}, the model's inputs are {names}")
    by_name = set(sample) == set(names)
    given = [sample[name] for name in names] if by_name else list(sample.values())
    arrays = {}
    for place, (tensor, values) in enumerate(zip(tensors, given, strict=True)):
        rows = tensor.shape[0] if tensor.shape else 1
        if tensor.shape[1:] != values.shape[1:] or len(values) < rows:
            raise _unfit(
                f"input '{names[place]}' has shape {list(tensor.shape)}, the data"
                f" {list(values.shape)}"
            )
        scale = float(tensor.scales[0]) if tensor.scales.size else 0.0
        zero = int(tensor.zero_points[0]) if tensor.zero_points.size else 0
        detail = {"dtype": _dtype(tensor.dtype), "quantization": (scale, zero)}
        for turn in range(min(_SAMPLES, len(values) // rows)):
            part = quantized(values[turn * rows : (turn + 1) * rows], detail)
            arrays[f"{place}_{turn}"] = part.reshape(tensor.shape)
    return arrays


def _dtype(name: str) -> "np.dtype[Any]":
    try:
        return np.dtype(name)
    except TypeError as error:
        raise _unfit(f"TFLM is fed numbers here, not {name}") from error


def _unfit(message: str) -> WorkError:
    return WorkError(
        "inputs_do_not_fit",
        f"The data does not fit the model: {message}.",
        "Name and shape the dataset's arrays as the model's inputs.",
    )
