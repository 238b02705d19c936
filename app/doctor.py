"""What `litesmith doctor` looks at: each part of this machine and of its settings, read only."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from sqlalchemy import make_url

from app import __version__
from app.config import Settings
from app.db import Database, newest_schema, schema_of
from app.masking import masking
from app.queue import Doorbell
from app.storage import open_storage

State = Literal["ok", "note", "wrong"]
PROBE_S = 60.0
_WORKER = ("tensorflow", "tf-keras", "keras", "ai-edge-litert", "litert-quantizer", "numpy")


@dataclass(frozen=True)
class Finding:
    """One part: `note` is worth knowing, `wrong` keeps the service from its work."""

    section: str
    part: str
    state: State
    told: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at every part, one after the other. Writes nothing, and needs no service to run."""
    yield from _machine()
    yield from _sandbox(settings)
    yield from _tools(settings)
    yield from _service(settings)


def _machine() -> Iterator[Finding]:
    python = f"{platform.python_version()}, {sys.executable}"
    yield Finding("machine", "litesmith", "ok", __version__)
    yield Finding("machine", "python", "ok", python)
    yield Finding("machine", "system", "ok", f"{platform.system()} {platform.release()}, "
                  f"{platform.machine()}, {os.cpu_count()} processors")  # fmt: skip
    for name in _WORKER:
        version = _version(name)
        told = version or "not installed: this machine can run no worker"
        yield Finding("machine", name, "ok" if version else "note", told)


def _sandbox(settings: Settings) -> Iterator[Finding]:
    """The same probe that a worker makes at its start."""
    if settings.sandbox == "off":
        yield Finding("sandbox", "all layers", "note", "off: LITESMITH_SANDBOX=off")
        return
    user = [] if settings.sandbox_user is None else [str(settings.sandbox_user)]
    tried = subprocess.run(
        [sys.executable, "-m", "workers.sandbox", "auto", *user],
        cwd=Path(__file__).resolve().parent.parent,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        capture_output=True,
        text=True,
        timeout=PROBE_S,
    )
    if tried.returncode != 0:
        told = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1]
        yield Finding("sandbox", "all layers", "wrong", f"the probe failed: {told[:200]}")
        return
    for layer, told in json.loads(tried.stdout).items():
        missing: State = "wrong" if settings.sandbox == "require" else "note"
        yield Finding("sandbox", layer, "ok" if told == "active" else missing, told)


def _tools(settings: Settings) -> Iterator[Finding]:
    for part, package in (("Vela (Ethos-U)", "ethos-u-vela"), ("TFLite Micro", "tflite-micro")):
        version = _version(package)
        yield Finding("compilers", part, "ok" if version else "note", version or "not installed")
    compiler = shutil.which(settings.edgetpu_compiler)
    told = compiler or "not found: models are checked by its rules, and not compiled"
    yield Finding("compilers", "Edge TPU", "ok" if compiler else "note", told)


def _service(settings: Settings) -> Iterator[Finding]:
    here = settings.root.exists()
    unstarted = f"{settings.root} is not there yet: `litesmith serve` makes it"
    checks: tuple[tuple[str, str | None, Callable[[Settings], str]], ...] = (
        ("database", settings.database_url, _database),
        ("storage", settings.storage_url, _storage),
        ("broker", settings.broker_url, _broker),
    )
    for part, configured, check in checks:
        if configured is None and not here:
            yield Finding("service", part, "note", unstarted)
            continue
        if part == "broker" and configured is None and not settings.broker_socket.exists():
            yield Finding("service", part, "note", "the bundled one, which no service runs now")
            continue
        try:
            yield Finding("service", part, "ok", check(settings))
        except Exception as error:
            # Whatever a part fails with is the answer here.
            told = " ".join(f"{type(error).__name__}: {error}".split())
            yield Finding("service", part, "wrong", masking(settings)(told)[:300])


def _database(settings: Settings) -> str:
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        raise FileNotFoundError(f"{url.database}: run `litesmith migrate` or `litesmith serve`")
    database = Database(settings.database)
    try:
        held, newest = schema_of(database), newest_schema()
    finally:
        database.close()
    if held != newest:
        raise RuntimeError(f"its schema is {held}, this version's {newest}: `litesmith migrate`")
    return f"{url.render_as_string(hide_password=True)}, schema {held}"


def _storage(settings: Settings) -> str:
    open_storage(settings).check()
    return settings.storage


def _broker(settings: Settings) -> str:
    Doorbell(settings.broker).check()
    return "answers"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
