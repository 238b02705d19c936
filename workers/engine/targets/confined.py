"""Starts a Python module or file, or another program, under limits:
`confined.py PARENT BYTES WHAT ARGUMENT...`, `confined.py PARENT BYTES exec PROGRAM ARGUMENT...`.

Uses the standard library alone, so that it can be started with `python -I` from anywhere.
"""

import ctypes
import os
import resource
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(parent: int, file_bytes: int, what: str, *arguments: str) -> None:
    """Run `what` (a module's name, a path ending in .py, or `exec`) as the main program.

    It ends with the process `parent`, whose own end may be sudden; no file that it writes grows
    past `file_bytes`; it leaves no core dump.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if what == "exec":
        # Python ignores these, and what is ignored stays so.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execv(arguments[0], arguments)
    sys.argv = [what, *arguments]
    if what.endswith(".py"):
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
