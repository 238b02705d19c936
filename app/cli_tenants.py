"""`litesmith tenants`: their limits, directly in the database, for whoever runs the service."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli_keys import open_database
from app.cli_options import settings_of, size_bytes
from app.cli_output import out, show_list, stop

tenants = typer.Typer(
    help="Limits of tenants, on the service's machine: works on its database.",
    no_args_is_help=True,
)

DataDir = Annotated[Path | None, typer.Option(help="The service's folder (LITESMITH_DATA_DIR).")]
Tenant = Annotated[str, typer.Argument(metavar="NAME")]
WORDS = "A number, `none`, or `default` for what the settings say."


@tenants.command("show")
def show(tenant: Tenant, data_dir: DataDir = None) -> None:
    """Show what a tenant uses, and its limits."""
    from app.services import quotas

    settings = settings_of(data_dir=data_dir)
    with open_database(data_dir) as database, database.read() as session:
        found = quotas.usage(session, settings, tenant)
    used, limits = found.used, found.limits
    rows = [
        ("storage bytes", used.storage_bytes, limits.max_storage_bytes),
        ("concurrent jobs", used.concurrent_jobs, limits.max_concurrent_jobs),
        ("jobs today", used.jobs_today, limits.max_jobs_per_day),
        ("queued jobs", used.queued_jobs, limits.max_queued_jobs),
    ]
    show_list(
        ("", "USED", "LIMIT"),
        [(name, value, "none" if limit is None else limit) for name, value, limit in rows],
    )


@tenants.command("set")
def set_limits(
    tenant: Tenant,
    max_storage: Annotated[
        str | None, typer.Option(help="Size (500MB, 10GiB), `none` or `default`.")
    ] = None,
    max_concurrent_jobs: Annotated[str | None, typer.Option(help=WORDS)] = None,
    max_jobs_per_day: Annotated[str | None, typer.Option(help=WORDS)] = None,
    max_queued_jobs: Annotated[str | None, typer.Option(help=WORDS)] = None,
    data_dir: DataDir = None,
) -> None:
    """Change limits of a tenant; they hold from the next request on."""
    from app.services import keys, quotas

    given = {
        "max_storage_bytes": max_storage,
        "max_concurrent_jobs": max_concurrent_jobs,
        "max_jobs_per_day": max_jobs_per_day,
        "max_queued_jobs": max_queued_jobs,
    }
    values = {name: _limit(name, text) for name, text in given.items() if text is not None}
    if not values:
        raise stop("name a limit to change", hint="`litesmith tenants set --help` shows them")
    if not keys.TENANT.fullmatch(tenant):
        raise stop(f"'{tenant}' must be of a-z, 0-9, - and _, at most 63")
    with open_database(data_dir) as database, database.write() as session:
        quotas.set_limits(session, tenant, values)
        keys.sign_command(session, tenant, "set_limits", tenant)
    out(f"tenant '{tenant}': {', '.join(f'{name} {given[name]}' for name in values)}")


def _limit(name: str, text: str) -> int | None:
    from app.services.quotas import UNLIMITED

    if text == "default":
        return None
    if text == "none":
        return UNLIMITED
    if name == "max_storage_bytes":
        return size_bytes(text, "max-storage")
    if not text.isdecimal():
        raise stop(f"--{name.replace('_', '-')}: '{text}' is no number, `none` or `default`")
    return int(text)
