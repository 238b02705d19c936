"""`litesmith gc | backup | restore`: what the operator does with the stored files."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli_options import settings_of
from app.cli_output import FAILED, out, stop
from app.domain.table import size_text

if TYPE_CHECKING:
    from app.backup import Copied

DataDir = Annotated[Path | None, typer.Option(help="Folder for the database and files.")]


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file in use, and compare its digest.")
    ] = False,
    grace_hours: Annotated[
        float,
        typer.Option(min=0, help="Spare what is younger: the row of an upload comes last."),
    ] = 1.0,
    data_dir: DataDir = None,
) -> None:
    """Remove stored files that nothing refers to, and tell which are missing or damaged.

    The service does the first by itself, every ten minutes. Exit code 1 where a file that is in
    use is missing or damaged.
    """
    from app.db import Database
    from app.services import garbage
    from app.storage import open_storage

    given = settings_of(data_dir=data_dir)
    database, storage = Database(given.database), open_storage(given)
    grace = timedelta(hours=grace_hours)
    found = garbage.survey(database, storage, grace, verify=verify)
    removed = found.orphans if dry_run else garbage.collect(database, storage, grace)
    database.close()
    size = size_text(sum(file.size_bytes for file in removed))
    word = "would be removed" if dry_run else "removed"
    out(f"unreferenced: {len(removed)} files, {size}, {word}")
    for orphan in found.orphans if dry_run else ():
        out(f"  {orphan.sha256} {size_text(orphan.size_bytes)}")
    for what, files in (("missing", found.missing), ("damaged", found.damaged)):
        if what == "missing" or verify:
            out(f"{what}: {len(files)} files")
        for file in files:
            out(f"  {file.sha256} {size_text(file.size_bytes)}")
    if found.missing or found.damaged:
        raise typer.Exit(FAILED)


def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it.")],
    data_dir: DataDir = None,
) -> None:
    """Back up a service of SQLite and local files; it may run meanwhile.

    A directory that has a backup already gets what is new. Exit code 1 where a file that is in use
    is damaged or gone.
    """
    from app.backup import NotPossible
    from app.backup import backup as back_up

    try:
        _tell(back_up(settings_of(data_dir=data_dir), directory))
    except NotPossible as error:
        raise stop(str(error)) from None


def restore(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A backup.")
    ],
    data_dir: DataDir = None,
) -> None:
    """Make a backup the data of a new service; start that afterwards."""
    from app.backup import NotPossible
    from app.backup import restore as bring_back

    try:
        _tell(bring_back(settings_of(data_dir=data_dir), directory))
    except NotPossible as error:
        raise stop(str(error)) from None


def _tell(copied: "Copied") -> None:
    size = size_text(copied.size_bytes)
    out(f"database and {copied.files} files of {size}, {copied.new} of them copied now")
    for stored in copied.lost:
        out(f"  damaged or gone: {stored.sha256} {size_text(stored.size_bytes)}")
    if copied.lost:
        raise typer.Exit(FAILED)
