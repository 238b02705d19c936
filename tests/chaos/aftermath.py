"""What must be true of the database and the storage once all jobs have ended."""

from datetime import timedelta
from pathlib import Path

from monkey import Figures
from running import until
from sqlalchemy import func, select

from app.config import Settings
from app.db import Database
from app.services import garbage
from app.storage import open_storage
from app.tables import ArtifactRow, EventRow, JobRow, StepRow, TaskRow


def check(folder: Path, database_url: str, figures: Figures) -> None:
    """No task left, no row twice, no event missing; every object referred to is there, and the
    clean-up removes all that nothing refers to."""
    database = Database(database_url)
    try:
        until(lambda: _tasks(database) == 0, "no task is left")
        _check_rows(database)
        _check_objects(database, folder, figures)
    finally:
        database.close()


def _tasks(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(TaskRow)) or 0


def _check_rows(database: Database) -> None:
    with database.read() as session:
        by = (ArtifactRow.variant_id, ArtifactRow.kind, ArtifactRow.file_name)
        twice = select(*by).group_by(*by).having(func.count() > 1)
        assert session.execute(twice).all() == []
        counted = select(EventRow.job_id, func.count(), func.max(EventRow.seq))
        counts = {row[0]: (row[1], row[2]) for row in session.execute(counted.group_by("job_id"))}
        for id_, last in session.execute(select(JobRow.id, JobRow.event_seq)):
            assert counts[id_] == (last, last)


def _check_objects(database: Database, folder: Path, figures: Figures) -> None:
    storage = open_storage(Settings(data_dir=folder))
    root = folder / "objects"
    figures.half_written = len(list((root / "spool").iterdir()))
    with database.read() as session:
        # A step that a cancelled job began and nobody went on with.
        assert session.scalars(select(StepRow).where(StepRow.status == "ready")).first()
        kept = garbage.referred(session).keys()
    figures.unreferenced = len(garbage.collect(database, storage, timedelta(0)))
    objects = {path.name for path in root.glob("??/*") if path.parent.name != "spool"}
    assert objects == kept
    figures.objects = len(objects)
