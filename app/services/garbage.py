"""Compares stored objects with what rows refer to, and removes those that no row does any more."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import select, union_all
from sqlalchemy.orm import Session

from app.db import Database
from app.storage import Object, Storage, Stored, is_intact
from app.tables import AnalysisRow, ArtifactRow, DatasetRow, ModelRow, PartialRow, StepRow, now

# What is younger may be an upload whose row is not committed yet.
GRACE = timedelta(hours=1)


@dataclass(frozen=True)
class Survey:
    """`orphans`: objects that no row refers to and that are older than the grace. `missing`: what
    some row refers to and is not there; `damaged`: what is, and has another digest."""

    orphans: list[Object]
    missing: list[Stored]
    damaged: list[Stored]


def referred(session: Session) -> dict[str, int]:
    """Digest -> size of what some row of any tenant refers to."""
    wanted = [
        # A model of the catalog that is not made yet has no file.
        select(ModelRow.sha256, ModelRow.size_bytes).where(ModelRow.size_bytes > 0),
        select(DatasetRow.sha256, DatasetRow.size_bytes),
        select(ArtifactRow.sha256, ArtifactRow.size_bytes),
        # The file of an analysis is needed until that is made, and never after.
        select(AnalysisRow.sha256, AnalysisRow.size_bytes).where(AnalysisRow.status == "analyzing"),
        select(PartialRow.sha256, PartialRow.length).where(
            PartialRow.sha256.is_not(None), PartialRow.subject_id.is_(None)
        ),
    ]
    found: dict[str, int] = {}
    for digest, size in session.execute(union_all(*wanted)):
        found[str(digest)] = size
    for files in session.scalars(select(StepRow.files)):
        found |= {file["sha256"]: file["size_bytes"] for file in files.values()}
    return found


def survey(
    database: Database, storage: Storage, grace: timedelta = GRACE, *, verify: bool = False
) -> Survey:
    """What is there too much and too little; with `verify`, every object in use is read."""
    limit = now() - grace
    with database.read() as session:
        kept = referred(session)
    orphans, present = [], set()
    for found in storage.objects():
        if found.sha256 in kept:
            present.add(found.sha256)
        elif found.written_at < limit:
            orphans.append(found)
    missing = [Stored(*item) for item in kept.items() if item[0] not in present]
    there = [Stored(*item) for item in kept.items() if item[0] in present] if verify else []
    return Survey(orphans, missing, [file for file in there if not is_intact(storage, file)])


def collect(database: Database, storage: Storage, grace: timedelta = GRACE) -> list[Object]:
    """Remove the orphans, and return those that were.

    An upload writes its object first, young even where the same bytes were there, and commits its
    row within the grace. So what was committed after the rows were read here is too young to be
    removed; `delete` looks at the age once more, in turns with who writes objects.
    """
    limit = now() - grace
    orphans = survey(database, storage, grace).orphans
    return [found for found in orphans if storage.delete(found.sha256, written_before=limit)]
