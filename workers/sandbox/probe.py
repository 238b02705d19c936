"""Which layers hold on this machine, found by trying to break each in a process of its own."""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from workers.sandbox import ACTIVE, Confinement, Grant, Mode, confine, landlock, restrict

log = logging.getLogger(__name__)

SECONDS = 60.0
# Each layer, and what stands in for it in a report where it is missing.
LAYERS = {
    "environment": "the child sees the worker's environment",
    "privileges": "the child may gain privileges",
    "user": "the child runs as root: run the worker as another user, or set LITESMITH_SANDBOX_USER",
    "filesystem": "the child reaches every file of its user: Landlock from Linux 5.19 on is needed",
    "network": "the child may open connections: seccomp is needed",
    "processes": "the child may start processes: seccomp is needed",
    "limits": "the child's memory, files and processor time have no limits of their own",
}


class SandboxMissing(Exception):
    """A layer of the sandbox is required and cannot be had; the text says which, and why."""


def layers(mode: Mode, user: int | None = None) -> dict[str, str]:
    """Layer -> "active", or what is missing. Takes a tenth of a second."""
    if mode == "off":
        return dict.fromkeys(LAYERS, "off: LITESMITH_SANDBOX=off")
    command = [sys.executable, "-m", "workers.sandbox", mode.replace("require", "auto")]
    tried = subprocess.run(
        [*command, *([] if user is None else [str(user)])],
        cwd=Path(__file__).resolve().parent.parent.parent,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if tried.returncode != 0:
        told = tried.stderr.strip().splitlines()[-1:] or [f"status {tried.returncode}"]
        return dict.fromkeys(LAYERS, f"the probe failed: {told[0][:200]}")
    found: dict[str, str] = json.loads(tried.stdout)
    return found


def check(mode: Mode, user: int | None = None) -> dict[str, str]:
    """`layers`, told to the log. Raises SandboxMissing where one is missing that is required."""
    found = layers(mode, user)
    if lacking := missing(found):
        told = "; ".join(lacking)
        if mode == "require":
            raise SandboxMissing(f"LITESMITH_SANDBOX=require, and the sandbox is not whole: {told}")
        log.warning("the sandbox is not whole", extra={"missing": told})
    return found


def missing(found: dict[str, str]) -> list[str]:
    return [f"{layer}: {told}" for layer, told in found.items() if told != ACTIVE]


def attempt(mode: str, user: int | None) -> dict[str, str]:
    """Confine this process as a child's is, then try what each layer should stop."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        secret, work = home / "secret", home / "work"
        secret.write_text("secret")
        work.mkdir()
        if user is not None:
            os.chown(work, user, user)
        confinement = Confinement(str(work), str(home / "in"), user=user)
        # Removing the directory needs what the sandbox takes away.
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            found = _tried(confinement, secret) if mode != "off" else {}
            os.write(writer, json.dumps(found).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            text = told.read()
        os.waitpid(child, 0)
    results: dict[str, bool] = json.loads(text)
    return {layer: ACTIVE if results[layer] else why for layer, why in LAYERS.items()}


def _tried(confinement: Confinement, secret: Path) -> dict[str, bool]:
    confine(confinement)
    restrict(confinement, Grant(2**30, 2**30, SECONDS))
    return {
        # What the child's environment holds is settled where it is started.
        "environment": not any(name.startswith("LITESMITH_") for name in os.environ),
        "privileges": _without_privileges(),
        "user": os.getuid() != 0,
        "filesystem": landlock.abi() >= landlock.LEAST_ABI
        and _denied(lambda: secret.read_text())
        and _denied(lambda: secret.write_text(""))
        and _denied(lambda: os.listdir("/")),
        "network": all(_denied(partial(socket.socket, *kind)) for kind in _SOCKETS),
        "processes": _denied(os.fork)
        and _denied(lambda: os.execv(sys.executable, [sys.executable, "-c", ""])),
        "limits": _limited(),
    }


_SOCKETS = (
    (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),
    (socket.AF_INET6, socket.SOCK_DGRAM), (socket.AF_UNIX, socket.SOCK_STREAM),
)  # fmt: skip


def _denied(act: Callable[[], object]) -> bool:
    try:
        if act() == 0 and act is os.fork:
            os._exit(0)  # the child of a fork that went through
    except PermissionError:
        return True
    return False


def _without_privileges() -> bool:
    status = Path("/proc/self/status")
    if not status.exists():
        return False
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return fields["NoNewPrivs"].strip() == "1" and int(fields["CapEff"], 16) == 0


def _limited() -> bool:
    import resource

    limited = (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU)
    return all(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in limited)
