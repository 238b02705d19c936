"""The child process: imports what the work needs, waits for one directory, does it, and exits.

Started ahead of need by workers.runner, so that no job waits for an import. It serves exactly one
piece of work: no state of one user's file can reach another's. Protocol: its arguments tell where
it is confined to; one line on standard input tells what the work there may use, and that it begins;
events go as JSON lines to the file descriptor given as argument; `result.json` or `error.json` in
the directory is the outcome. End of standard input means that the
worker has died: the child ends at once. The sandbox is around it from its first lines on
(docs/sandbox.md).
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Literal

import app  # noqa: F401  # found before the directory that it lies in is closed
from workers import sandbox

Kind = Literal["light", "tensorflow"]
# prctl(2); kills the child even while it holds the interpreter lock inside a long native call.
PR_SET_PDEATHSIG = 1
# Descendants whose own parent has ended become this process's children: none is lost sight of.
PR_SET_CHILD_SUBREAPER = 36


def main(kind: str, event_fd: int, confinement: sandbox.Confinement) -> int:
    faulthandler.enable()
    sandbox.confine(confinement)
    if sys.platform == "linux":
        # After it may have become another user, which clears the first.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    _preload(kind)
    events = os.fdopen(event_fd, "w", buffering=1)
    _send(events, {"stage": "ready", "progress": 0.0})
    line = sys.stdin.readline()
    if not line:
        return 0
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sandbox.restrict(confinement, sandbox.Grant(**json.loads(line)))
    return _serve(Path(confinement.directory), events)


def _preload(kind: str) -> None:
    from app.domain import work  # noqa: F401
    from workers.engine import pipeline  # noqa: F401

    if kind == "tensorflow":
        from workers.engine import convert

        convert.warm_up()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _send(events: IO[str], event: dict[str, object]) -> None:
    events.write(json.dumps(event) + "\n")


def _serve(directory: Path, events: IO[str]) -> int:
    from pydantic import TypeAdapter

    from app.domain.problems import NO_ROOM, WorkError
    from app.domain.work import NO_ROOM_STATUS, Event, TrainingProgress, Work
    from workers.engine import pipeline
    from workers.engine.samples import Message

    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(directory)

    def emit(stage: str, progress: float, message: Message = None) -> None:
        training = message if isinstance(message, TrainingProgress) else None
        text = None if message is None else str(message)
        event = Event(stage=stage, progress=progress, message=text, training=training)
        _send(events, event.model_dump())

    adapter: TypeAdapter[Work] = TypeAdapter(Work)
    spec = adapter.validate_json((directory / "spec.json").read_bytes())
    try:
        result = pipeline.run(spec, directory, emit)
        _write(directory / "result.json", result.model_dump_json())
    except WorkError as error:
        _write(directory / "error.json", error.problem().model_dump_json())
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        # A status, no file: there may be no room for one.
        return NO_ROOM_STATUS
    except MemoryError:
        traceback.print_exc()
        return 137
    return 0


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    status = main(sys.argv[1], int(sys.argv[2]), sandbox.Confinement(**json.loads(sys.argv[3])))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's shutdown: TensorFlow's takes seconds, and can crash.
    os._exit(status)
