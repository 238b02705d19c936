"""The compilers and runtimes of targets that this worker has."""

import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import tempfile

log = logging.getLogger(__name__)

EDGETPU = "edgetpu_compiler"
# PyPI's names of those that are Python packages.
_PACKAGES = ("ethos-u-vela", "tflite-micro")
_VERSION = re.compile(r"\bversion\s+(\d+(?:\.\d+)*)")
_VERSION_S = 20.0
_PRINTED_BYTES = 64 * 2**10


def find_edgetpu(name: str) -> str | None:
    """The absolute path of the Edge TPU's compiler: its name on PATH, or a path."""
    found = shutil.which(name)
    return os.path.abspath(found) if found else None


def installed(edgetpu_compiler: str) -> dict[str, str]:
    """Name -> version of each one that is here. `edgetpu_compiler`: its name on PATH, or path."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            log.info("not installed: %s", name)
    executable = find_edgetpu(edgetpu_compiler)
    if executable is not None and (version := _edgetpu_version(executable)) is not None:
        found[EDGETPU] = version
    return found


def _edgetpu_version(executable: str) -> str | None:
    """The release of an installed compiler, such as "16.0.384591198"; None where the program does
    not tell one within its time."""
    try:
        with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as printed:
            subprocess.run(
                [executable, "--version"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=_VERSION_S,
            )
            printed.seek(0)
            text = printed.read(_PRINTED_BYTES).decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the Edge TPU compiler '%s' cannot be used: %s", executable, error)
        return None
    told = _VERSION.search(text)
    if told is None:
        log.warning("'%s --version' told no version: %.300s", executable, text)
    return told and told[1]
