"""The runner over children that misbehave: each becomes an error with a code and a hint."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from running import until

from app.domain.problems import WorkError
from app.domain.work import Event
from workers import outcome, runner
from workers.outcome import LOG_LINES, Killed, log_tail
from workers.runner import Child, Kind, Limits, Site, Spares, Stopped
from workers.sandbox import Confinement

ENOUGH = Limits(deadline_s=60, memory_bytes=2**30)
PROLOGUE = """
import json, os, signal, sys, time
events = os.fdopen(int(sys.argv[1]), "w", buffering=1)
directory = json.loads(sys.argv[2])["directory"]
sys.stdin.readline()
log = open(os.path.join(directory, "log.txt"), "w", buffering=1)
def send(stage, progress=0.5, message=None):
    events.write(json.dumps({"stage": stage, "progress": progress, "message": message}) + "\\n")
def write(name, value):
    with open(os.path.join(directory, name), "w") as file:
        json.dump(value, file)
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type["Behaving"]:
    """Makes children that run a few lines of Python in place of the engine."""
    Behaving.monkeypatch, Behaving.site = monkeypatch, Site(tmp_path)
    return Behaving


class Behaving:
    monkeypatch: pytest.MonkeyPatch
    site: Site

    def __new__(cls, code: str) -> Child:  # type: ignore[misc]
        text = PROLOGUE + textwrap.dedent(code)

        def command(kind: Kind, event_fd: int, confinement: Confinement) -> list[str]:
            told = json.dumps(asdict(confinement))
            return [sys.executable, "-c", text, str(event_fd), told]

        cls.monkeypatch.setattr(runner, "command", command)
        return Child("light", cls.site)


def gone(child: Child) -> bool:
    return child.process.poll() is not None


def run(child: Child, limits: Limits = ENOUGH) -> tuple[object, list[Event]]:
    events: list[Event] = []
    result = runner.run(child, limits, events.append, lambda: False)
    assert gone(child)
    return result, events


def failure(child: Child, limits: Limits = ENOUGH) -> WorkError:
    with pytest.raises(WorkError) as caught:
        run(child, limits)
    assert gone(child)
    assert caught.value.hint
    return caught.value


def test_a_result_and_its_events_come_through(child: type[Behaving], tmp_path: Path) -> None:
    made = child("""
        send("ready", 0)
        for n in range(200):
            send("evaluate", n / 200, "n" * 1000)
        write("result.json", {"answer": 42})
    """)
    result, events = run(made)
    assert result == {"answer": 42}
    # Those that came last may be lost with the child: the result says it all.
    assert {event.stage for event in events} == {"evaluate"}


def test_its_own_error_is_told_as_it_is(child: type[Behaving], tmp_path: Path) -> None:
    made = child("""write("error.json", {"code": "unsupported_op", "message": "m", "hint": "h"})""")
    error = failure(made)
    assert (error.code, error.message, error.hint) == ("unsupported_op", "m", "h")
    assert error.final


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(3)", "child_failed"),
        ("sys.exit(0)", "child_failed"),
        ("raise RuntimeError('x')", "child_failed"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "child_crashed"),
        ("os.abort()", "child_crashed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "out_of_memory"),
        ("os._exit(137)", "out_of_memory"),
        ("events.write('no json\\n'); time.sleep(60)", "child_failed"),
        ("events.write('[' * 100000 + '\\n'); time.sleep(60)", "child_failed"),
        ("write('result.json', {}); os.kill(os.getpid(), signal.SIGSEGV)", "child_crashed"),
    ],
)
def test_every_end_without_a_result_has_a_code(
    child: type[Behaving], tmp_path: Path, code: str, expected: str
) -> None:
    made = child(f"print('the last words', file=log)\n{code}")
    error = failure(made)
    assert (error.code, error.final) == (expected, False)
    assert log_tail(made.directory) == "the last words"


def test_a_signal_of_the_system_for_want_of_memory_is_told_from_any_other(
    child: type[Behaving], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "os.kill(os.getpid(), signal.SIGKILL)"
    assert isinstance(failure(child(code)), Killed)
    counted = iter([3, 4])
    for module in (runner, outcome):
        monkeypatch.setattr(module, "oom_kills", lambda: next(counted))
    error = failure(child(code))
    assert not isinstance(error, Killed)
    assert error.code == "out_of_memory"


def test_a_child_that_was_dead_before_its_work_is_no_hang(
    child: type[Behaving], tmp_path: Path
) -> None:
    made = child("")
    made.process.kill()
    made.process.wait()
    assert failure(made).code == "out_of_memory"


def test_too_much_memory_ends_it(child: type[Behaving], tmp_path: Path) -> None:
    made = child("hoard = b'x' * (300 << 20)\ntime.sleep(60)")
    error = failure(made, Limits(60, 128 << 20))
    assert (error.code, error.final) == ("out_of_memory", False)
    assert "128 MiB" in error.message


def test_its_descendants_count_and_go_with_it(child: type[Behaving], tmp_path: Path) -> None:
    made = child("""
        import subprocess
        hoard = "import time; hoard = b'x' * (300 << 20); time.sleep(60)"
        inner = subprocess.Popen([sys.executable, "-c", hoard])
        write("inner", inner.pid)
        time.sleep(60)
    """)
    assert failure(made, Limits(60, 200 << 20)).code == "out_of_memory"
    inner = int((made.directory / "inner").read_text())
    until(lambda: not _lives(inner), "the descendant is gone")


def test_a_hang_ends_at_its_deadline(child: type[Behaving], tmp_path: Path) -> None:
    made = child("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    error = failure(made, Limits(0.3, 2**30))
    assert (error.code, error.final) == ("deadline_exceeded", True)
    assert "0.3 s" in error.message


def test_a_stop_ends_it(child: type[Behaving], tmp_path: Path) -> None:
    made, stop = child("send('evaluate'); time.sleep(60)"), threading.Event()
    with pytest.raises(Stopped):
        runner.run(made, ENOUGH, lambda event: stop.set(), stop.is_set)
    assert gone(made)


def test_an_error_of_the_listener_ends_it_too(child: type[Behaving], tmp_path: Path) -> None:
    made = child("send('evaluate'); time.sleep(60)")

    def fail(event: Event) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        runner.run(made, ENOUGH, fail, lambda: False)
    assert gone(made)


def test_the_log_keeps_its_last_lines(tmp_path: Path) -> None:
    assert log_tail(tmp_path) is None
    lines = [f"line {number} " + "x" * 1000 for number in range(100)]
    (tmp_path / "log.txt").write_bytes("\n".join(lines).encode() + b"\n\xff")
    tail = log_tail(tmp_path)
    assert tail is not None
    assert len(tail.splitlines()) == LOG_LINES
    assert "line 99" in tail
    assert max(map(len, tail.splitlines())) == 500


def test_a_child_knows_nothing_of_the_service(
    monkeypatch: pytest.MonkeyPatch, child: type[Behaving], tmp_path: Path
) -> None:
    monkeypatch.setenv("LITESMITH_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    made = child("write('result.json', dict(os.environ))")
    result, _ = run(made)
    assert "secret" not in str(result)


def test_spares_are_kept_ready_and_used_once(child: type[Behaving], tmp_path: Path) -> None:
    child("").kill()
    spares = Spares({"light": 1, "tensorflow": 0}, Behaving.site)
    try:
        until(lambda: spares.counts()["light"] == 1, "a spare is ready")
        first = spares.take("light")
        assert spares.counts()["light"] == 0
        second = spares.take("light")
        assert first.process.pid != second.process.pid
        spares.refill()
        until(lambda: spares.counts()["light"] == 1, "a spare is ready again")
        waiting = spares.take("light")
        waiting.kill()
        for used in (first, second):
            used.kill()
    finally:
        spares.close()


def test_a_spare_that_died_is_not_given_out(child: type[Behaving]) -> None:
    child("").kill()
    spares = Spares({"light": 1, "tensorflow": 0}, Behaving.site)
    try:
        until(lambda: spares.counts()["light"] == 1, "a spare is ready")
        (found,) = [p for p in psutil.Process().children() if "-c" in p.cmdline()]
        found.kill()
        until(lambda: found.status() == psutil.STATUS_ZOMBIE, "it is dead")
        fresh = spares.take("light")
        assert fresh.process.pid != found.pid
        assert not gone(fresh)
        fresh.kill()
    finally:
        spares.close()


def test_a_child_dies_with_its_worker(tmp_path: Path) -> None:
    """The real child, its parent killed in a way that lets it say nothing."""
    script = """
    import sys, time
    from pathlib import Path
    from workers.runner import Child, Site
    child = Child("light", Site(Path(sys.argv[1])))
    print(child.process.pid, flush=True)
    child.read_events(60)
    print("ready", flush=True)
    time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    maps = Path(f"/proc/{pid}/maps")
    if maps.exists():
        assert "tensorflow" not in maps.read_text()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until(lambda: not _lives(pid), "the child is gone", 5)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
