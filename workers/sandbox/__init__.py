"""The sandbox of a child process, which the child puts around itself: docs/sandbox.md.

In two steps. `confine` comes first, before the libraries start threads that Landlock would not
reach, when only the child's own directory is known. `restrict` comes when the work is known, before
any file of it is opened; it reaches all threads. Standard library alone.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from workers.sandbox import landlock, limits, paths, seccomp

Mode = Literal["auto", "require", "off"]

ACTIVE = "active"


@dataclass(frozen=True)
class Confinement:
    """What a child is held to from its start.

    `inputs`: the directory that it reads its work from; `directory`: its own, to write in.
    `readable`, `writable`: paths elsewhere that it may read, and write. `tools`: programs that
    `Grant.tools` lets it start. `network`: it may open connections. `user`: the number of the user
    that it becomes, where it is started as root. `mode`: "require" raises where a layer cannot be
    had.
    """

    directory: str
    inputs: str
    mode: Mode = "auto"
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    network: bool = False
    user: int | None = None


@dataclass(frozen=True)
class Grant:
    """What one piece of work may use: bytes of memory and of any one file, seconds of each core;
    `tools`: it may start the programs of its confinement."""

    memory_bytes: int
    file_bytes: int
    seconds: float
    tools: bool = False


def confine(confinement: Confinement) -> None:
    """Give up privileges and all files but those needed; every layer that the platform has.

    Raises OSError for a layer that it has not, where the mode is "require".
    """
    if confinement.mode == "off":
        return
    with _as_far_as_possible(confinement):
        limits.before_work()
    if sys.platform != "linux":
        return
    with _as_far_as_possible(confinement):
        limits.drop_privileges(confinement.user)
    with _as_far_as_possible(confinement):
        landlock.restrict(
            landlock.Rules(
                read=[
                    *paths.readable(network=confinement.network),
                    *confinement.readable,
                    confinement.inputs,
                    *paths.beside(confinement.tools, confinement.directory),
                ],
                write=[confinement.directory, *confinement.writable, *paths.DEVICES],
                execute=paths.executables(confinement.tools),
                tcp=confinement.network,
            )
        )


def restrict(confinement: Confinement, grant: Grant) -> None:
    """Limit what the work uses, and filter system calls. Raises as `confine` does."""
    if confinement.mode == "off":
        return
    with _as_far_as_possible(confinement):
        limits.for_work(grant.memory_bytes, grant.file_bytes, grant.seconds)
    with _as_far_as_possible(confinement):
        seccomp.install(tools=grant.tools, network=confinement.network)


class _as_far_as_possible:  # noqa: N801
    """What a layer raises is let through only where it is required: the probe tells of it."""

    def __init__(self, confinement: Confinement) -> None:
        self._required = confinement.mode == "require"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        missing = (OSError, ValueError, AttributeError, ImportError)
        return kind is not None and issubclass(kind, missing) and not self._required
