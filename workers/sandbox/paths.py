"""What a child needs of the file system: its code, libraries, a few facts of the machine."""

import os
import sys
import sysconfig
from pathlib import Path

_LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
    "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip
_MACHINE = (
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/fs/cgroup", "/dev/random",
    "/dev/urandom",
)  # fmt: skip
_NETWORK = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/host.conf",
    "/etc/services", "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero")


def readable(*, network: bool) -> list[str]:
    """Paths to read, with all below them; the directory that the source lies in is not among them,
    since the service's data may lie beside it."""
    import app

    packages = [Path(str(app.__file__)).parent, Path(__file__).parent.parent]
    roots = {package.parent for package in packages}
    installed = sysconfig.get_paths()
    code = [installed[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    code += [
        f"{prefix}/{lib}" for prefix in (sys.prefix, sys.base_prefix) for lib in ("lib", "lib64")
    ]
    code += [f"{sys.prefix}/pyvenv.cfg", *map(str, packages)]
    code += [entry for entry in sys.path if entry and Path(entry) not in roots]
    code += [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    return [*code, *_LIBRARIES, *_MACHINE, *(_NETWORK if network else ())]


def beside(tools: tuple[str, ...], directory: str) -> list[str]:
    """The folders of programs, where their libraries and data lie; none that holds `directory`, as
    it would hold those of other children too."""
    folders = {Path(tool).resolve().parent for tool in tools} | {Path(t).parent for t in tools}
    return [str(folder) for folder in folders if folder not in Path(directory).resolve().parents]


def executables(tools: tuple[str, ...]) -> list[str]:
    """What must be executable for `tools` to start: they, and what the kernel starts for them."""
    found: list[str] = []
    pending = list(tools)
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.append(path)
        pending += _starters(Path(path))
        # Google's compiler comes as a script beside a folder of its own loader and libraries.
        beside = Path(f"{path}_bin")
        if beside.is_dir():
            found.append(str(beside))
    return found


def _starters(path: Path) -> list[str]:
    """The dynamic loader of a program, the interpreter of a script."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return []
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n", 1)[0].decode("utf-8", "replace").split()
        if words and Path(words[0]).name == "env":
            directories = os.environ.get("PATH", os.defpath).split(":")
            words[1:] = [f"{directory}/{name}" for name in words[1:2] for directory in directories]
        return [word for word in words if Path(word).is_file()]
    if head.startswith(b"\x7fELF"):
        # The interpreter's path stands near the start of every dynamic program.
        end = head.find(b"\0", start := head.find(b"/lib"))
        loader = head[start:end].decode("ascii", "replace")
        return [loader] if 0 <= start < end and Path(loader).is_file() else []
    return []
