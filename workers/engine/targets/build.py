"""What a job's target gets beside the .tflite: compiled files, C arrays, and their figures."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain.edgetpu import (
    AnalysisOptions,
    CompileOptions,
    CompilerReport,
    EdgeTpuAnalysis,
    EdgeTpuFigures,
)
from app.domain.ethos_u import EthosUOptions
from app.domain.problems import Note
from app.domain.targets import family
from app.domain.work import TargetFile, TargetWork
from workers.engine.samples import Batch
from workers.engine.targets import edgetpu, edgetpu_compiler, ethos_u, micro
from workers.engine.targets.c_array import c_array

_MAX_NAME = 200
_NAMED = 5  # operators told by name before "and N more"


@dataclass(frozen=True)
class Built:
    """`figures`: what to add to the variant's metrics, by name."""

    files: list[TargetFile] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    tools: dict[str, str] = field(default_factory=dict)


def build(content: bytes, work: TargetWork, sample: Batch | None, directory: Path) -> Built:
    """Compile or run a finished .tflite as the target does, with files below `directory`/out.

    `sample`: real values by input, [samples, ...]. What the worker lacks the tool for is told by a
    note (`compiler_not_installed`, `runtime_not_installed`). Raises WorkError where a tool that is
    there fails on the file.
    """
    makers: dict[str, Callable[[], Built]] = {
        "edgetpu": functools.partial(_edgetpu, content, work, directory),
        "ethos-u": functools.partial(_ethos_u, content, work, directory),
        "microcontroller": functools.partial(_micro, content, work, sample, directory),
    }
    return makers[family(work.id)]()


def _edgetpu(content: bytes, work: TargetWork, directory: Path) -> Built:
    options = CompileOptions.model_validate(work.options)
    foreseen = AnalysisOptions(multiple_subgraphs=options.multiple_subgraphs)
    if work.version is not None:
        foreseen = foreseen.model_copy(update={"compiler": work.version})
    analysis = _short(edgetpu.analyze(content, foreseen.compiler, foreseen.multiple_subgraphs))
    if work.executable is None or work.version is None:
        figures = EdgeTpuFigures(
            mapped=analysis.mapped, cpu=analysis.cpu, measured_by="prediction", analysis=analysis
        )
        return Built(figures={"edgetpu": figures}, notes=_predicted(analysis))
    compiled = edgetpu_compiler.compile(
        content, options, directory / "out", work.executable, work.version
    )
    log = _write(directory, "edgetpu.log", f"{compiled.stdout}\n{compiled.log}".encode())
    files = [
        TargetFile(
            kind="edgetpu_tflite",
            path=str(path.relative_to(directory)),
            suffix=path.name.removeprefix("model"),
        )
        for path in compiled.files
    ]
    mapped, on_cpu = _counts(compiled.report)
    figures = EdgeTpuFigures(
        mapped=mapped,
        cpu=on_cpu,
        measured_by="compiler",
        compiler=compiled.report,
        analysis=analysis,
    )
    return Built(
        files=[*files, TargetFile(kind="compiler_log", path=log, suffix="_edgetpu.log")],
        figures={"edgetpu": figures},
        notes=_compiled(compiled.report, mapped, on_cpu),
        tools={"edgetpu_compiler": work.version},
    )


def _short(analysis: EdgeTpuAnalysis) -> EdgeTpuAnalysis:
    """Names of fused operators may run to thousands of characters."""
    ops = [op.model_copy(update={"layer": op.layer[:_MAX_NAME]}) for op in analysis.ops]
    return analysis.model_copy(update={"ops": ops})


def _counts(report: CompilerReport) -> tuple[int | None, int | None]:
    """Operators mapped and left, over all segments; None where the compiler did not say."""
    parts = report.segments or [report]
    mapped = [part.mapped for part in parts if part.mapped is not None]
    on_cpu = [part.cpu for part in parts if part.cpu is not None]
    return (sum(mapped) if mapped else None), (sum(on_cpu) if on_cpu else None)


def _predicted(analysis: EdgeTpuAnalysis) -> list[Note]:
    total = len(analysis.ops)
    notes = [
        Note(
            code="compiler_not_installed",
            message="The Edge TPU compiler is not installed on this worker: what maps is"
            f" predicted ({analysis.mapped} of {total} operators), and the .tflite is left for you"
            " to compile. Set LITESMITH_EDGETPU_COMPILER where it is installed.",
        )
    ]
    if analysis.failure is not None:
        message = f"The compiler would refuse the file: {analysis.failure.message}"
        notes.append(Note(code=analysis.failure.code, message=message))
    left = [f"{op.name} at '{op.layer[:80]}' ({op.message})" for op in analysis.ops if not op.maps]
    return notes + _left(left, analysis.mapped, analysis.cpu)


def _compiled(report: CompilerReport, mapped: int | None, on_cpu: int | None) -> list[Note]:
    rows = [row for part in (report.segments or [report]) for row in part.rows if not row.mapped]
    left = [f"{row.count} {row.operator} ({row.status})" for row in rows]
    return _left(left, mapped, on_cpu)


def _left(told: list[str], mapped: int | None, on_cpu: int | None) -> list[Note]:
    if not on_cpu:
        return []
    named = "; ".join(told[:_NAMED])
    if len(told) > _NAMED:
        named += f"; and {len(told) - _NAMED} more"
    if not mapped:
        message = f"No operator runs on the Edge TPU, so nothing is gained by it: {named}."
        return [Note(code="nothing_mapped", message=message)]
    message = f"{on_cpu} of {mapped + on_cpu} operators stay on the CPU: {named}."
    return [Note(code="left_on_cpu", message=message)]


def _ethos_u(content: bytes, work: TargetWork, directory: Path) -> Built:
    if ethos_u.version() is None:
        message = (
            "Vela, the compiler for Ethos-U, is not installed on this worker: the .tflite is left"
            " for you to compile."
        )
        return Built(notes=[Note(code="compiler_not_installed", message=message)])
    options = EthosUOptions.model_validate(work.options)
    made = ethos_u.compile(content, work.id, directory / "out", options.timeout_s, options)
    path = _write(directory, "ethos_u.tflite", made.content)
    log = _write(directory, "ethos_u.log", made.log.encode())
    return Built(
        files=[
            TargetFile(kind="ethos_u_tflite", path=path, suffix="_vela.tflite"),
            TargetFile(kind="compiler_log", path=log, suffix="_vela.log"),
        ],
        figures={"ethos_u": made.report},
        notes=made.report.notes,
        tools={"ethos-u-vela": made.report.vela_version},
    )


def _micro(content: bytes, work: TargetWork, sample: Batch | None, directory: Path) -> Built:
    figures: dict[str, Any] = {"flash_bytes": micro.flash_bytes(content)}
    notes, tools = [], {}
    if micro.version() is None:
        message = (
            "TensorFlow Lite Micro is not installed on this worker: the arena was not measured."
        )
        notes.append(Note(code="runtime_not_installed", message=message))
    else:
        report = micro.measure(content, sample, directory / "out")
        figures |= {"micro": report, "arena_bytes": report.arena_bytes}
        notes += report.notes
        tools["tflite-micro"] = report.tflm_version
        if not report.runs:
            notes.append(_does_not_run(report.missing_operators, report.reason))
    texts = c_array(content, work.c_name, figures.get("arena_bytes"))
    files = [
        TargetFile(
            kind="c_array",
            path=_write(directory, f"array{suffix}", text.encode()),
            suffix=suffix,
            file_name=f"{work.c_name}{suffix}",
        )
        for suffix, text in zip((".c", ".h"), texts, strict=True)
    ]
    return Built(files, figures, notes, tools)


def _does_not_run(missing: list[str], reason: str | None) -> Note:
    if missing:
        message = f"TensorFlow Lite Micro has no kernel for: {', '.join(missing)}."
        return Note(code="missing_operators", message=message)
    message = f"TensorFlow Lite Micro does not run the file: {reason}"
    return Note(code="does_not_run_on_target", message=message)


def _write(directory: Path, name: str, content: bytes) -> str:
    path = Path("out") / name
    (directory / path).write_bytes(content)
    return str(path)
