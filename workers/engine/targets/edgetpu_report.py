"""Reading what edgetpu_compiler prints and what it writes into its .log, releases 2 to 16.

The grammar is described in https://coral.ai/docs/edgetpu/compiler/#usage; the differences between
releases are taken from outputs that users posted in https://github.com/google-coral/edgetpu/issues.
"""

import re

from app.domain.edgetpu import CompilerReport, CompilerRow, ReasonCode

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"([\d.]+) ?(B|KiB|MiB|GiB)$")
# Pasted into a post, a row may be quoted (">") and its columns may be one space or tab apart.
_ROW = re.compile(r"^[\s>]*([A-Z][A-Z0-9_]+)\s+(\d+)\s+(\S.*?)\s*$")
_VERSION = re.compile(r"Edge TPU Compiler version (\S+)")
_COMPILED = re.compile(r"Models? compiled successfully in (\d+) ms")
_INPUT = re.compile(r"^[\s>]*Input model:", re.MULTILINE)
_RUNTIME = re.compile(r"[Mm]in(?:imum|_)?\s?runtime[_ ]version:?\s+(\d+)")

_SIZES = {
    "input size": "input_bytes",
    "output size": "output_bytes",
    "on-chip memory used for caching model parameters": "on_chip_bytes",
    "on-chip memory remaining for caching model parameters": "on_chip_remaining_bytes",
    "off-chip memory used for streaming uncached model parameters": "off_chip_bytes",
}
_NUMBERS = {
    "number of edge tpu subgraphs": "subgraphs",
    "total number of operations": "ops",
    "number of operations that will run on edge tpu": "mapped",
    "number of operations that will run on cpu": "cpu",
}
_NAMES = {
    "input": "input",
    "input model": "input",
    "output": "output",
    "output model": "output",
}
# Before release 14 it told what was there in all, not what was left.
_AVAILABLE = "on-chip memory available for caching model parameters"

# A part of the status in lower case -> the reason.
_STATUSES: tuple[tuple[str, ReasonCode], ...] = (
    ("mapped to edge tpu", "mapped"),
    ("unsupported data type", "unsupported_type"),
    ("version not supported", "unsupported_version"),
    ("runtime version", "newer_runtime"),
    ("unsupported rank", "unsupported_rank"),
    # Of releases before 16: "Only Strided-Slice with unitary strides supported" and "For example,
    # a fully-connected or softmax layer with 2D output" (google-coral/edgetpu issue 27).
    ("unitary strides", "limitation"),
    ("2d output", "limitation"),
    ("not constant", "not_constant"),
    ("dynamic", "dynamic_tensor"),
    ("precise", "imprecise_resize"),
    ("more than one subgraph", "after_cpu"),
    ("intermediate tensor", "after_cpu"),
    ("unspecified limitation", "limitation"),
    ("too large", "too_large"),
    ("operation not supported", "unsupported_operation"),
)


def parse_stdout(text: str) -> CompilerReport:
    """What the program printed. Of several segments or models, the sums, and each of them.

    Text that is no output of the compiler gives `success` False and None everywhere.
    """
    starts = [match.start() for match in _COMPILED.finditer(text)]
    inputs = [match.start() for match in _INPUT.finditer(text)]
    if len(starts) == 1 and len(inputs) > 1:
        # Models that were compiled together share one line of success.
        starts += inputs[1:]
    version = _VERSION.search(text)
    if not starts:
        return CompilerReport(version=version.group(1) if version else None, success=False)
    ends = [*starts[1:], len(text)]
    head = text[: starts[0]]
    # What a search for a delegate failed with before the success belongs to no report.
    reports = [_block(text[a:b]) for a, b in zip(starts, ends, strict=True)]
    for report in reports:
        report.version = version.group(1) if version else None
        report.min_runtime_version = report.min_runtime_version or _runtime(head)
    # A segment that failed after others were compiled is a failure of the whole.
    if "Compilation failed!" in text[starts[-1] :]:
        reports[-1].success = False
    return reports[0] if len(reports) == 1 else _summed(reports)


def parse_log(text: str) -> CompilerReport:
    """A .log of the compiler: version, files and the table of operators."""
    report = _block(text)
    version = _VERSION.search(text)
    report.version = version.group(1) if version else None
    report.success = bool(report.rows)
    return report


def reason_of(status: str) -> ReasonCode:
    """Our code for a status as the compiler words it."""
    lower = status.lower()
    return next((code for part, code in _STATUSES if part in lower), "unknown")


def _block(text: str) -> CompilerReport:
    found: dict[str, int | str] = {}
    rows = []
    available = None
    for line in text.splitlines():
        key, _, value = (part.strip(" \t>") for part in line.partition(":"))
        key = key.lower()
        if key in _SIZES and (size := _bytes(value)) is not None:
            found[_SIZES[key]] = size
        elif key == _AVAILABLE:
            available = _bytes(value)
        elif key in _NUMBERS and value.isdigit():
            found[_NUMBERS[key]] = int(value)
        elif key in _NAMES and value:
            found[_NAMES[key]] = value
        elif row := _ROW.match(line):
            rows.append(_row(row))
    report = CompilerReport.model_validate({"success": True, "rows": rows, **found})
    compiled = _COMPILED.search(text)
    report.compile_ms = int(compiled.group(1)) if compiled else None
    report.min_runtime_version = _runtime(text)
    if available is not None and report.on_chip_bytes is not None:
        report.on_chip_remaining_bytes = available - report.on_chip_bytes
    return _counted(report)


def _counted(report: CompilerReport) -> CompilerReport:
    """Fills in what the compiler leaves out: it counts only where something runs on the CPU."""
    if report.mapped is None and report.rows:
        report.mapped = sum(row.count for row in report.rows if row.mapped)
        report.cpu = sum(row.count for row in report.rows if not row.mapped)
        report.ops = report.ops or report.mapped + report.cpu
    elif report.mapped is None and report.ops is not None:
        report.mapped, report.cpu = report.ops, 0
    return report


def _row(match: re.Match[str]) -> CompilerRow:
    operator, count, status = match.groups()
    reason = reason_of(status)
    return CompilerRow(
        operator=operator,
        count=int(count),
        status=status,
        reason=reason,
        mapped=reason == "mapped",
    )


def _summed(reports: list[CompilerReport]) -> CompilerReport:
    def total(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    fields = ("compile_ms", "input_bytes", "output_bytes", "on_chip_bytes", "off_chip_bytes")
    counts = ("subgraphs", "ops", "mapped", "cpu")
    merged: dict[tuple[str, str], CompilerRow] = {}
    for row in (row for report in reports for row in report.rows):
        same = merged.setdefault((row.operator, row.status), row.model_copy(update={"count": 0}))
        same.count += row.count
    first = reports[0]
    return CompilerReport.model_validate(
        {
            "version": first.version,
            "success": all(report.success for report in reports),
            "min_runtime_version": first.min_runtime_version,
            "rows": list(merged.values()),
            "segments": reports,
            **{name: total([getattr(r, name) for r in reports]) for name in fields + counts},
        }
    )


def _bytes(text: str) -> int | None:
    match = _SIZE.match(text)
    return round(float(match.group(1)) * _UNITS[match.group(2)]) if match else None


def _runtime(text: str) -> int | None:
    match = _RUNTIME.search(text)
    return int(match.group(1)) if match else None
