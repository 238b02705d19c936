"""Running edgetpu_compiler, Google's proprietary program for x86-64 Linux, where it is installed.

Its options: https://coral.ai/docs/edgetpu/compiler/#usage. It runs in a process group and a
directory of its own, with limits on time and on what it may write, as it is known to compile
forever on some models (https://github.com/google-coral/edgetpu/issues/270).
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.domain.edgetpu import CompileOptions, CompilerReport
from app.domain.problems import WorkError
from workers.engine import scan_tflite
from workers.engine.targets import commands
from workers.engine.targets import edgetpu_versions as versions
from workers.engine.targets.edgetpu_failures import INTERNAL_ERROR, translate
from workers.engine.targets.edgetpu_report import parse_log, parse_stdout

__all__ = ["Compiled", "compile", "parse_log", "parse_stdout"]

MIB = 2**20
MAX_PRINTED_BYTES = 4 * MIB
# A compiled file is little larger than its source, even in several segments.
MAX_WRITTEN_BYTES = 256 * MIB
WRITTEN_PER_INPUT_BYTE = 4
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Compiled:
    """`files`: the compiled model, or its segments in order; `log`: the .log files' text."""

    files: list[Path]
    log: str
    stdout: str
    report: CompilerReport


def compile(
    content: bytes,
    options: CompileOptions,
    directory: Path,
    executable: str,
    version: str,
) -> Compiled:
    """Compile a fully quantized .tflite into files below `directory`.

    `executable`: its path; `version`: its release, such as "16.0.384591198". A second run follows
    an internal error of the compiler, which it is known to get past
    (https://github.com/google-coral/edgetpu/issues/211).
    Raises WorkError with the cause and the next step; see edgetpu_failures.
    """
    arguments = _arguments(options, version)
    limit = MAX_WRITTEN_BYTES + WRITTEN_PER_INPUT_BYTE * len(content)
    for attempt in (1, 2):
        work = Path(tempfile.mkdtemp(prefix="edgetpu-", dir=directory))
        (work / "model.tflite").write_bytes(content)
        command = [executable, *arguments, "-o", str(work), str(work / "model.tflite")]
        code, text = _run(command, work, options.timeout_s, limit)
        if attempt == 1 and INTERNAL_ERROR in text and not parse_stdout(text).success:
            continue
        break
    report = parse_stdout(text)
    if not report.success:
        raise translate(text, code)
    files = sorted(work.glob("model*_edgetpu.tflite"), key=_segment)
    _check_files(files, options, text)
    logs = [path.read_text(errors="replace") for path in _logs(files)]
    _complete(report, logs)
    return Compiled(files=files, log="\n".join(logs), stdout=text, report=report)


def _arguments(options: CompileOptions, version: str) -> list[str]:
    newest = versions.release(version) >= 16
    if (options.search_delegate or options.delegate_search_step) and not newest:
        raise WorkError(
            "option_unsupported",
            f"search_delegate needs release 16 of the Edge TPU compiler; installed is {version}.",
            "Install release 16, or leave search_delegate out.",
        )
    arguments = ["-s"]
    if options.min_runtime_version is not None:
        arguments += ["-m", str(options.min_runtime_version)]
    if options.num_segments is not None:
        arguments += ["-n", str(options.num_segments)]
    if options.multiple_subgraphs:
        arguments += ["-a"]
    if options.search_delegate:
        arguments += ["-d"]
        if options.delegate_search_step is not None:
            arguments += ["-k", str(options.delegate_search_step)]
    if newest:  # which otherwise gives up after 180 s of its own
        arguments += ["-t", str(max(1, int(options.timeout_s)))]
    return arguments


def _run(
    command: Sequence[str], directory: Path, timeout: float, max_written: int
) -> tuple[int, str]:
    """Exit status and what was printed, control characters left out.

    Raises WorkError `compiler_not_installed`, `compiler_timeout` or `compiler_wrote_too_much`.
    """
    if not os.access(command[0], os.X_OK):
        raise WorkError(
            "compiler_not_installed",
            f"The Edge TPU compiler '{command[0]}' cannot be started.",
            "Install edgetpu-compiler (x86-64 Linux) and name it in LITESMITH_EDGETPU_COMPILER.",
        )
    with tempfile.TemporaryFile(dir=directory) as printed:
        process = subprocess.Popen(
            commands.confined(max_written, "exec", *command),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=commands.environment() | {"LC_ALL": "C"},
        )
        try:
            _watch(process, printed.fileno(), directory, timeout, max_written)
        finally:
            # Its children too, and before it is reaped: until then its number is no one else's.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if code == -signal.SIGXFSZ or _is_too_much(printed.fileno(), directory, max_written):
            raise _wrote_too_much()
        printed.seek(0)
        text = printed.read(MAX_PRINTED_BYTES).decode("utf-8", "replace")
    return code, "".join(char for char in text if char.isprintable() or char in "\n\t")


def _watch(
    process: subprocess.Popen[bytes],
    printed: int,
    directory: Path,
    timeout: float,
    max_written: int,
) -> None:
    """Returns when the program has ended, without reaping it."""
    until = time.monotonic() + timeout
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            raise WorkError(
                "compiler_timeout",
                f"The Edge TPU compiler did not end within {timeout:g} s and was stopped.",
                "Allow more time, or make the model or its input smaller.",
            )
        if _is_too_much(printed, directory, max_written):
            raise _wrote_too_much()
        time.sleep(_POLL_SECONDS)


def _is_too_much(printed: int, directory: Path, max_written: int) -> bool:
    return os.fstat(printed).st_size > MAX_PRINTED_BYTES or _written(directory) >= max_written


def _wrote_too_much() -> WorkError:
    return WorkError(
        "compiler_wrote_too_much",
        "The Edge TPU compiler was stopped because it printed or wrote far more than a compiled"
        " model.",
        "Try again; if it stays, compile this model by hand and look at what it writes.",
    )


def _written(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # temporary files come and go
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _segment(path: Path) -> tuple[int, str]:
    """Orders model_segment_10_of_12_edgetpu.tflite behind segment 2."""
    numbers = [int(part) for part in path.stem.split("_") if part.isdigit()]
    return (numbers[0] if numbers else 0, path.name)


def _logs(files: list[Path]) -> list[Path]:
    return [path for path in (file.with_suffix(".log") for file in files) if path.is_file()]


def _check_files(files: list[Path], options: CompileOptions, text: str) -> None:
    expected = options.num_segments or 1
    if len(files) != expected:
        raise WorkError(
            "compiler_no_output",
            "The Edge TPU compiler reported success, but wrote"
            f" {len(files)} of {expected} compiled files.",
            "Try again; check that the disk is not full.",
        )
    for file in files:
        try:
            scan_tflite.check_structure(file.read_bytes())
        except WorkError as error:
            raise WorkError(
                "compiler_output_unreadable",
                f"The Edge TPU compiler wrote '{file.name}', which is no model: {error.message}.",
                "Try again; check that the disk is not full.",
            ) from error


def _complete(report: CompilerReport, logs: list[str]) -> None:
    """Rows from the .log: on the screen some releases leave out what is mapped."""
    parts = report.segments or [report]
    for part, log in zip(parts, logs, strict=False):
        rows = parse_log(log).rows
        if sum(row.count for row in rows) > sum(row.count for row in part.rows):
            part.rows = rows
