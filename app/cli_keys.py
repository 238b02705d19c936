"""`litesmith keys`: API keys, directly in the database, for whoever runs the service."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli_options import settings_of
from app.cli_output import out, say, show_list, stop

if TYPE_CHECKING:
    from app.db import Database

keys = typer.Typer(
    help="API keys of a service, made on its machine: works on its database.", no_args_is_help=True
)

DataDir = Annotated[Path | None, typer.Option(help="The service's folder (LITESMITH_DATA_DIR).")]
Tenant = Annotated[str, typer.Option(help="Whose key: tenants see nothing of each other.")]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What it is for, or who has it.")],
    tenant: Tenant = "default",
    scopes: Annotated[
        str, typer.Option(help="Comma-separated: read, write (includes read), admin (all).")
    ] = "read,write",
    expires_in_days: Annotated[
        float | None, typer.Option(min=0.001, max=3660, help="Without it, it never expires.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and show it: this once. The key alone goes to the standard output."""
    from app.principal import INCLUDED
    from app.services import keys as service
    from app.tables import now

    asked = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    if not asked or not set(asked) <= INCLUDED.keys():
        raise stop(f"--scopes: '{scopes}' must name read, write or admin")
    if not service.TENANT.fullmatch(tenant):
        raise stop(f"--tenant: '{tenant}' must be of a-z, 0-9, - and _, at most 63")
    if not (label := name.strip()) or not label.isprintable() or len(label) > 200:
        raise stop("--name: it must be printable text of at most 200 characters")
    expires_at = now() + timedelta(days=expires_in_days) if expires_in_days else None
    with open_database(data_dir) as database, database.write() as session:
        new = not service.of_tenant(session, tenant)
        row, text = service.create(session, tenant, label, asked, expires_at)
        service.sign_command(session, tenant, "create_key", row.id)
    say(f"{row.id}: tenant '{tenant}'{' (its first key)' if new else ''}, {', '.join(row.scopes)}")
    say("Keep it now: it is not shown again.")
    out(text)


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Of one tenant alone.")] = None,
    data_dir: DataDir = None,
) -> None:
    """List the keys of all tenants, newest first."""
    from app.services import keys as service

    with open_database(data_dir) as database, database.read() as session:
        rows = service.of_tenant(session, tenant)
    if not rows:
        say("there is no key yet; `litesmith keys create --name NAME` makes one")
        return
    show_list(
        ("id", "tenant", "key", "name", "scopes", "created", "expires", "last used", "status"),
        [
            (
                row.id,
                row.tenant_id,
                f"{row.prefix}…",
                row.name,
                ",".join(row.scopes),
                *(
                    moment.strftime("%Y-%m-%d %H:%M") if moment else "–"
                    for moment in (row.created_at, row.expires_at, row.last_used_at)
                ),
                service.standing(row),
            )
            for row in rows
        ],
    )


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="key_…, as `keys list` shows it.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key: it opens nothing from the next request on."""
    from app.services import keys as service
    from app.tables import KeyRow

    with open_database(data_dir) as database, database.write() as session:
        row = session.get(KeyRow, key_id)
        if row is None:
            raise stop(f"there is no key '{key_id}'", hint="`litesmith keys list` shows them")
        service.revoke(row)
        service.sign_command(session, row.tenant_id, "revoke_key", row.id)
    out(f"{row.id} ({row.name}) is revoked")


@contextmanager
def open_database(data_dir: Path | None) -> Iterator["Database"]:
    """The service's database; an embedded one that is not there yet is made."""
    from sqlalchemy import inspect
    from sqlalchemy.exc import OperationalError

    from app.db import Database, migrate
    from app.masking import mask
    from app.tables import Base

    settings = settings_of(data_dir=data_dir)
    if settings.database_url is None and not settings.root.exists():
        # As `litesmith serve` does, which may come later.
        migrate(settings)
    database = Database(settings.database)
    try:
        if Base.metadata.tables.keys() - set(inspect(database.engine).get_table_names()):
            raise stop(
                "the database lacks the tables of this version", hint="run `litesmith migrate`"
            )
        yield database
    except OperationalError as error:
        raise stop(f"the database does not answer: {mask(str(error.orig))}") from None
    finally:
        database.close()
