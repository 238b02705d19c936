"""Runs attacks in children that are confined as the real one is, with nothing scanned before."""

import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from app.domain.problems import WorkError
from workers import runner
from workers.outcome import log_tail
from workers.runner import Child, Kind, Limits, Site
from workers.sandbox import Confinement, landlock

needs_landlock = pytest.mark.skipif(
    landlock.abi() < landlock.LEAST_ABI, reason="this kernel has no Landlock to attack"
)
ENOUGH = Limits(deadline_s=120, memory_bytes=4 * 2**30, disk_bytes=2**30)

# As workers/child.py, with the attack in the engine's place.
PROLOGUE = """
import json, os, signal, socket, sys, threading, time
from pathlib import Path
import app
from workers import sandbox
confinement = sandbox.Confinement(**json.loads(sys.argv[2]))
sandbox.confine(confinement)
{preload}
sandbox.restrict(confinement, sandbox.Grant(**json.loads(sys.stdin.readline())))
os.chdir(confinement.directory)
log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
def tried(act):
    '''What an attempt came to: "denied", another error's name, or "done"'''
    try:
        act()
    except PermissionError:
        return "denied"
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
    return "done"
def result(value):
    Path("result.json").write_text(json.dumps(value))
"""
TENSORFLOW = """
from workers.engine import convert
convert.warm_up()
"""


class Attacks:
    """Starts children that run a few lines of Python, confined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
        self.monkeypatch, self.site, self.python = monkeypatch, site, sys.executable

    @contextmanager
    def child(self, code: str, preload: str = "", **options: Any) -> Iterator[Child]:
        text = PROLOGUE.format(preload=preload) + code

        def command(kind: Kind, event_fd: int, confinement: Confinement) -> list[str]:
            told = json.dumps(asdict(confinement))
            return [self.python, "-c", text, str(event_fd), told]

        self.monkeypatch.setattr(runner, "command", command)
        made = Child("light", self.site, **options)
        try:
            yield made
        finally:
            made.close()

    def run(
        self,
        code: str,
        limits: Limits = ENOUGH,
        preload: str = "",
        tools: bool = False,
        files: dict[str, bytes] | None = None,
        **options: Any,
    ) -> Any:
        """What the code handed to `result`."""
        with self.child(textwrap.dedent(code) + "\nos._exit(0)", preload, **options) as made:
            for name, content in (files or {}).items():
                (made.inputs / name).write_bytes(content)
            try:
                found = runner.run(made, limits, lambda event: None, lambda: False, tools=tools)
            except WorkError:
                print(log_tail(made.directory))
                raise
            return found["result"] if set(found) == {"result"} else found


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, owner and content of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        told = (status.st_mode, status.st_uid, hashlib.sha256(content).hexdigest())
        found[str(path.relative_to(folder))] = told
    return found


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}
