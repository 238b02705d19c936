"""What the Edge TPU compiler really did with a model: its compiled file, or what it printed.

A folder may hold, for a model `X.tflite`, the compiled `X_edgetpu.tflite` (or `X-edgetpu.tflite`),
or texts: the .log or what the program printed, saved as `X.log`, `X_edgetpu.log`, `X_stdout.txt`
and the like, or under any name where the text itself names `X.tflite` as its input.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from app.domain.edgetpu import CompilerReport
from bench import edgetpu_package
from workers.engine import graph as flatfile
from workers.engine import inspect_tflite
from workers.engine.targets.edgetpu import COMPILED
from workers.engine.targets.edgetpu_compiler import parse_log, parse_stdout

_SUFFIX = re.compile(r"[_-]edgetpu$")
_TEXTS = (".log", ".txt", ".out")
# What may follow a model's name in that of a text.
_FOLLOWS = re.compile(r"([_-]edgetpu|[_-]stdout)?(\.(log|txt|out))+$", re.IGNORECASE)
_FAILED = re.compile(
    r"Compilation failed|Invalid model|Internal compiler error|not quantized", re.I
)

# How operators on the CPU are told apart: a compiled file names each operator's result, the
# table of a log counts those of a kind, and a log without a table counts all.
Detail = Literal["layer", "kind", "count"]


@dataclass(frozen=True)
class Truth:
    """`on_cpu`: (operator, result) with the detail "layer", else with empty fields.

    `compiler`: its release, where the text tells it; `failed`: it made no file.
    """

    detail: Detail
    on_cpu: Counter[tuple[str, str]]
    parts: int = 1
    parameter_bytes: int | None = None
    compiler: str | None = None
    failed: bool = False


def models(folder: Path) -> Iterator[Path]:
    """The files under a folder that were not compiled yet, going by their names."""
    files = (path for path in sorted(folder.rglob("*.tflite")) if path.is_file())
    return (path for path in files if not _SUFFIX.search(path.stem))


def truths(source: Path) -> list[Path]:
    """The files that tell the truth about a model, the most telling first."""
    beside = [path for path in sorted(source.parent.iterdir()) if path.is_file()]
    compiled = [
        path
        for path in beside
        if path.suffix == ".tflite" and path != source and _SUFFIX.sub("", path.stem) == source.stem
    ]
    texts = [path for path in beside if path.suffix.lower() in _TEXTS and _is_about(path, source)]
    readable = [(text, truth) for text in texts if (truth := logged(text, source)) is not None]
    # A failure beside a success belongs to another attempt.
    order = ("layer", "kind", "count")
    readable.sort(key=lambda pair: (pair[1].failed, order.index(pair[1].detail)))
    return compiled + [text for text, _ in readable]


def compiled(path: Path, source: bytes) -> Truth:
    """From a compiled file: what stays outside its custom operators runs on the CPU.

    Kinds are counted where it names results that the source does not have, as it was made from
    another export of the model.
    """
    content = path.read_bytes()
    model = flatfile.read(content)
    graph = inspect_tflite.parse(content).main
    packages = [
        edgetpu_package.read(bytes(bytearray(operator.customOptions)))
        for operator in model.subgraphs[0].operators
        if flatfile.operator_name(model, operator) == COMPILED
    ]
    size = sum(package.cached_bytes + package.streamed_bytes for package in packages)
    left = Counter((op.name, graph.layer(op)) for op in graph.ops if op.name != COMPILED)
    origin = inspect_tflite.parse(source).main
    if left <= Counter((op.name, origin.layer(op)) for op in origin.ops):
        return Truth("layer", left, len(packages), size)
    kinds: Counter[tuple[str, str]] = Counter()
    for (name, _), count in left.items():
        kinds[(kind(name), "")] += count
    return Truth("kind", kinds, len(packages), size)


def logged(path: Path, source: Path) -> Truth | None:
    """From a .log or what the compiler printed; None where the text is neither."""
    text = path.read_text(errors="replace")
    report = parse_stdout(text)
    if not report.success and not _FAILED.search(text):
        report = parse_log(text)
    report = _for_model(report, source)
    if not report.success:
        failed = bool(_FAILED.search(text))
        return Truth("count", Counter(), compiler=report.version, failed=True) if failed else None
    left: Counter[tuple[str, str]] = Counter()
    for row in report.rows:
        if not row.mapped:
            left[(row.operator, "")] += row.count
    if not report.rows:
        left[("", "")] = report.cpu or 0
    size = None
    if report.on_chip_bytes is not None and report.off_chip_bytes is not None:
        size = report.on_chip_bytes + report.off_chip_bytes
    detail: Detail = "kind" if report.rows else "count"
    return Truth(detail, left, report.subgraphs or 1, size, report.version)


def kind(operator: str) -> str:
    """An operator as a log calls it."""
    return operator if operator in _BUILTIN else "CUSTOM"


_BUILTIN = frozenset(flatfile.OPERATOR_NAMES.values())


def _is_about(path: Path, source: Path) -> bool:
    if path.name.startswith(source.stem) and _FOLLOWS.fullmatch(path.name, len(source.stem)):
        return True
    text = path.read_text(errors="replace")
    reports = [parse_stdout(text), parse_log(text)]
    return any(_names(each, source) for report in reports for each in (report, *report.segments))


def _for_model(report: CompilerReport, source: Path) -> CompilerReport:
    """The part about one model, where several were compiled together."""
    own: Iterable[CompilerReport] = (each for each in report.segments if _names(each, source))
    return next(iter(own), report)


def _names(report: CompilerReport, source: Path) -> bool:
    return report.input is not None and PurePosixPath(report.input).name == source.name
