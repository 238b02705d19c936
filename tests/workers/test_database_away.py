"""A worker whose database goes away: what it runs is neither lost nor counted as its fault."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import queue
from app.config import Settings
from app.db import Database
from app.domain.work import Event
from app.tables import TaskRow
from workers import common
from workers.lease import Lease
from workers.worker import Worker


def away(*, invalidated: bool) -> OperationalError:
    error = OperationalError("SELECT 1", None, Exception("server closed the connection"))
    error.connection_invalidated = invalidated
    return error


@pytest.fixture
def worker(database: Database, tmp_path: Path) -> Iterator[Worker]:
    settings = Settings(
        data_dir=tmp_path,
        database_url=database.engine.url.render_as_string(hide_password=False),
        broker_url="redis+socket:///nonexistent/litesmith.sock",
        light_spares=0,
        tensorflow_spares=0,
        fast_slots=1,
    )
    made = Worker(settings, ["fast"])
    with database.write() as session:
        queue.enqueue(session, "prepare", "job_1", "fast", tenant_id="default")
    yield made
    made.close()


def task(worker: Worker) -> TaskRow:
    with worker.database.read() as session:
        return session.scalars(select(TaskRow)).one()


def run(worker: Worker, error: Exception) -> TaskRow:
    """The task after a run that ended with that error."""

    def handle(worker: Worker, lease: Lease) -> None:
        # What is given back is due at once: one run is enough here.
        worker.stopping.set()
        raise error

    worker.run_queue("fast", handle)
    return task(worker)


def test_a_connection_that_broke_is_no_fault_of_the_task(worker: Worker) -> None:
    row = run(worker, away(invalidated=True))
    assert (row.status, row.lost) == ("queued", 0)


def test_an_error_of_a_database_that_answers_counts(worker: Worker) -> None:
    row = run(worker, away(invalidated=False))
    assert (row.status, row.lost) == ("queued", 1)


def test_a_task_is_given_back_as_soon_as_the_database_answers(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = iter([True, True, True])
    writing = worker.writing

    @contextmanager
    def sometimes() -> Iterator[Session]:
        # From the run's end on; the claim came through.
        if worker.stopping.is_set() and next(refused, False):
            raise away(invalidated=False)
        with writing() as session:
            yield session

    monkeypatch.setattr(worker, "writing", sometimes)
    row = run(worker, away(invalidated=False))
    assert (row.status, row.lost) == ("queued", 0)
    assert next(refused, None) is None


def test_progress_that_cannot_be_written_ends_no_work(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Any:
        raise away(invalidated=False)

    monkeypatch.setattr(worker, "writing", refuse)
    claim = SimpleNamespace(kind="variant", subject_id="var_1")
    report = common.progress(worker, SimpleNamespace(claim=claim), "var_1")  # type: ignore[arg-type]
    report(Event(stage="train", progress=0.5))
    assert "progress not written" in caplog.text
