"""What the `litesmith` command shows: progress, tables, and errors told as what, where and next.

Results go to the standard output, progress and errors to the standard error. On what is no
terminal everything is plain lines without control characters.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from app.client import (
    ApiError,
    Client,
    Conflict,
    Event,
    InvalidRequest,
    InvalidUpload,
    Job,
    LimitReached,
    LitesmithError,
    NotAllowed,
    NotFound,
    Unreachable,
)
from app.domain.table import (
    HEADINGS,
    NOTES,
    budget_checks,
    budget_text,
    details,
    problem_text,
    rows,
    size_text,
    text_table,
)

# Exit codes: 0 well; 1 the work failed or broke a budget; 2 what was asked is wrong; 3 no service.
FAILED, WRONG, NO_SERVICE, INTERRUPTED = 1, 2, 3, 130
# What the table's own gaps take more than those of the plain text.
EDGES = 6
STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "skipped": "yellow"}


@dataclass(frozen=True)
class Target:
    """Which service the command talks to."""

    url: str
    api_key: str | None


class Interrupted(Exception):
    """Ctrl-C while a job that goes on without us was watched."""

    def __init__(self, job_id: str | None) -> None:
        super().__init__(job_id)
        self.job_id = job_id


def clean(text: object) -> str:
    """Text from elsewhere, without what could drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in str(text))


def out(text: object = "") -> None:
    """One line of the result."""
    typer.echo(clean(text))


def say(text: object) -> None:
    """One line of progress or of an error."""
    typer.echo(clean(text), err=True)


def stop(message: str, code: int = WRONG, hint: str | None = None) -> typer.Exit:
    """Tell an error; raise what this returns."""
    say(f"litesmith: {message}")
    if hint:
        say(f"  next: {hint}")
    return typer.Exit(code)


@contextmanager
def connect(context: typer.Context) -> Iterator[Client]:
    """The client for a command; what goes wrong in the block is told and becomes an exit code."""
    target: Target = context.obj
    try:
        with Client(target.url, target.api_key) as client:
            yield client
    except Interrupted as error:
        raise _interrupted(error.job_id) from None
    except KeyboardInterrupt:
        raise _interrupted(None) from None
    except ApiError as error:
        raise _api_error(error, target.url) from None
    except InvalidUpload as error:
        raise stop(str(error)) from None
    except Unreachable as error:
        raise stop(str(error), NO_SERVICE) from None
    except LitesmithError as error:
        raise stop(str(error), FAILED) from None
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        raise stop(f"cannot read or write{where}: {error.strerror or error}") from None


def _interrupted(job_id: str | None) -> typer.Exit:
    if not job_id:
        return stop("interrupted", INTERRUPTED)
    hint = f"`litesmith jobs watch {job_id}`, or `litesmith jobs cancel {job_id}` to end it"
    return stop(f"interrupted; the service goes on with {job_id}", INTERRUPTED, hint)


def _api_error(error: ApiError, url: str) -> typer.Exit:
    say(f"litesmith: {error.detail}")
    for entry in error.errors:
        say(f"  {entry.get('field')}: {entry.get('message')}")
    if isinstance(error, NotAllowed) and error.status == 401:
        # The service's own hint is about HTTP headers.
        say("  next: set LITESMITH_API_KEY to a key of this service; who runs it makes one")
    elif error.hint:
        say(f"  next: {error.hint}")
    reference = f", request {error.request_id}" if error.request_id else ""
    say(f"  ({error.code}, HTTP {error.status} from {url}{reference})")
    asked_wrong = isinstance(
        error, InvalidRequest | NotAllowed | NotFound | Conflict | LimitReached
    )
    return typer.Exit(WRONG if asked_wrong else NO_SERVICE)


class Watch:
    """Progress of uploads and of a job: bars on a terminal, otherwise a line for each change."""

    def __init__(self, quiet: bool = False) -> None:
        self.job_id: str | None = None
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._seen: dict[str, str] = {}
        self._started: dict[str, float] = {}
        if self._console.is_terminal and not quiet:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TextColumn("{task.fields[stage]}", markup=False),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars:
            self._bars.stop()
        if isinstance(error, KeyboardInterrupt) and self.job_id:
            raise Interrupted(self.job_id) from None

    def upload(self, path: Path, done: int, total: int) -> None:
        """An upload has come so far."""
        name = f"upload {path.name}"
        started = self._started.setdefault(name, time.monotonic())
        if self._bars:
            self._bar(name, done / total if total else 1.0, f"{size_text(done)}")
        elif done >= total and not self._quiet:
            say(f"{name}: {size_text(total)} sent in {time.monotonic() - started:.1f} s")

    def event(self, event: Event) -> None:
        """The service told of the job or of a variant."""
        data = event.data
        status = str(data.get("status") or "")
        if event.name in ("job", "end"):
            self.job_id = str(data.get("id") or "") or self.job_id
            name = f"job {self.job_id or ''}".strip()
        elif event.name == "variant":
            name = str(data.get("name") or data.get("id"))
        else:
            return
        stage = str(data.get("stage") or "") if status == "running" else status
        training = data.get("training") or {}
        # A training tells of every few steps: for what is no bar, its epochs are enough.
        seen = f"{stage} {training.get('epoch')} {training.get('score')}" if training else ""
        if training:
            stage = str(data.get("message"))
        elif data.get("message"):
            stage = f"{stage}: {data['message']}" if stage else str(data["message"])
        if self._bars:
            finished = status in ("succeeded", "partial", "failed", "cancelled", "skipped")
            self._bar(name, 1.0 if finished else float(data.get("progress") or 0.0), stage)
        elif stage and self._seen.get(name) != (seen or stage) and not self._quiet:
            self._seen[name] = seen or stage
            started = self._started.setdefault("job", time.monotonic())
            say(f"[{time.monotonic() - started:6.1f} s] {name}: {stage}")

    def _bar(self, name: str, fraction: float, stage: str) -> None:
        assert self._bars is not None
        name, stage = clean(name), clean(stage).replace("\n", " ")[:60]
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=1.0, stage=stage)
        self._bars.update(self._tasks[name], completed=fraction, stage=stage)


def show_job(job: Job) -> None:
    """The comparison table of a job, its notes in full, and its verdict."""
    plain = job.model_dump(mode="json")
    console = Console()
    if console.is_terminal:
        console.print(_rich_table(plain, console.width))
    else:
        out(text_table(plain))
    told = details(plain)
    if told:
        out()
    for name, text in told:
        out(f"{name}: {text}")
    out()
    if job.error:
        out(f"error: {problem_text(job.error.model_dump())}")
    checks = budget_checks(plain)
    for check in checks:
        out(budget_text(check))
    if job.verdict and checks:
        out(f"verdict: {job.verdict.verdict}")
    out(f"job {job.id}: {job.status}{_duration(job)}")


def _rich_table(job: dict[str, Any], width: int) -> Table:
    """The table for a terminal of that width: ratios and intervals go below their values where
    there is no room beside them."""
    lines = rows(job)
    narrow = max(map(len, text_table(job).splitlines()), default=0) + EDGES > width
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0 if narrow else 1)
    )
    for i, heading in enumerate(HEADINGS):
        table.add_column(
            _stacked(heading) if narrow else heading,
            justify="right" if 0 < i < NOTES else "left",
            no_wrap=i < NOTES,
        )
    for row in lines:
        cells = [
            Text(
                _stacked(clean(cell)) if narrow and i < NOTES else clean(cell),
                style="bold green" if i in row.best else "",
            )
            for i, cell in enumerate(row.cells)
        ]
        cells[0].stylize(STYLES.get(row.status, "") if row.status != "succeeded" else "")
        table.add_row(*cells)
    return table


def _stacked(text: str) -> str:
    return text.replace(" (", "\n(").replace("% interval", "%\ninterval").replace("pp [", "pp\n[")


def _duration(job: Job) -> str:
    if not (job.started_at and job.finished_at):
        return ""
    return f" in {(job.finished_at - job.started_at).total_seconds():.1f} s"


def show_list(headings: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Aligned columns with a heading; the last column is not cut."""
    shown = [list(headings), *([clean(cell) for cell in line] for line in lines)]
    widths = [max(len(line[i]) for line in shown) for i in range(len(headings))]
    for line in shown:
        out("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def show_fields(pairs: Sequence[tuple[str, object]]) -> None:
    """One fact a line; facts that are not there are left out."""
    known = [(name, value) for name, value in pairs if value not in (None, "", [], {})]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        out(f"{name.ljust(width)}  {value}")
