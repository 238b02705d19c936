"""An analysis is made once, given again, given up, and forgotten."""

from datetime import timedelta
from pathlib import Path

import pytest

from app import queue, reconciler
from app.config import Settings
from app.db import Database
from app.domain.edgetpu import AnalysisOptions
from app.domain.problems import Problem
from app.services import analyses, garbage, tasks
from app.storage import Stored, open_storage, store_bytes
from app.tables import AnalysisRow, now

TENANT = "default"
FILE = Stored("ab" * 32, 7)
PROBLEM = Problem(code="attempts_exhausted", message="It died")


def create(
    database: Database,
    stored: Stored = FILE,
    options: AnalysisOptions | None = None,
    tenant: str = TENANT,
) -> tuple[str, str]:
    """The id and status of the analysis asked for."""
    with database.write() as session:
        row = analyses.create(
            session,
            tenant_id=tenant,
            stored=stored,
            options=options or AnalysisOptions(),
            request_id=None,
        )
        session.flush()
        return row.id, row.status


def end(database: Database, id_: str, problem: Problem | None) -> None:
    """What the worker writes when it is done."""
    with database.write() as session:
        claim = queue.claim(session, "inspect", "w", 60)
        assert claim is not None
        assert (claim.kind, claim.subject_id) == ("analyze", id_)
        queue.finish(session, claim)
        row = session.get_one(AnalysisRow, id_)
        if problem is None:
            analyses.analyzed(row, {"mapped": 1})
        else:
            analyses.refused(row, problem)


def test_the_same_bytes_and_options_are_analyzed_once(database: Database) -> None:
    first, _ = create(database)
    # While it is made, and once it is there, no other task comes.
    assert create(database) == (first, "analyzing")
    end(database, first, None)
    assert create(database) == (first, "ready")
    with database.read() as session:
        assert queue.waiting_queues(session) == []
    others = {
        create(database, Stored("cd" * 32, 7))[0],
        create(database, options=AnalysisOptions(multiple_subgraphs=True))[0],
        create(database, options=AnalysisOptions(compiler="14.1"))[0],
        create(database, tenant="other")[0],
    }
    assert len(others | {first}) == 5


def test_what_failed_is_looked_at_again(database: Database) -> None:
    first, _ = create(database)
    end(database, first, PROBLEM)
    assert create(database) == (first, "analyzing")
    with database.read() as session:
        assert session.get_one(AnalysisRow, first).error is None
        assert queue.waiting_queues(session) == ["inspect"]
    end(database, first, None)
    assert create(database) == (first, "ready")


def test_an_analysis_that_kills_its_workers_ends_with_a_problem(database: Database) -> None:
    id_, _ = create(database)
    with database.write() as session:
        tasks.lock_job(session, "analyze", id_)
        tasks.give_up(session, "analyze", id_, PROBLEM)
        tasks.give_up(session, "analyze", "ana_gone", PROBLEM)
    with database.read() as session:
        row = session.get_one(AnalysisRow, id_)
        assert (row.status, row.error) == ("invalid", PROBLEM.model_dump(exclude_none=True))


@pytest.mark.parametrize("problem", [None, PROBLEM])
def test_old_ones_are_forgotten_and_their_files_go_when_they_are_made(
    database: Database, tmp_path: Path, problem: Problem | None
) -> None:
    settings = Settings(data_dir=tmp_path, cache_retention_days=1)
    storage = open_storage(settings)
    id_, _ = create(database, store_bytes(storage, b"a"))

    def clean() -> tuple[int, bool]:
        with database.write() as session:
            session.get_one(AnalysisRow, id_).used_at = now() - timedelta(days=2)
            session.flush()
            reconciler.clean(session, settings)
        removed = len(garbage.collect(database, storage, grace=timedelta(seconds=-1)))
        with database.read() as session:
            return removed, session.get(AnalysisRow, id_) is not None

    assert clean() == (0, True)
    end(database, id_, problem)
    assert clean() == (1, False)
