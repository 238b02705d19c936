"""What every resource needs: the parts of the service, who asks, safe ids."""

import logging
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from sqlalchemy import Select, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.api.access import from_this_machine, scope_of
from app.api.watch import Watcher
from app.config import Settings
from app.db import Database
from app.errors import ServiceError, not_found
from app.principal import OPERATOR, Acting, Principal, acting, principal_of
from app.queue import Doorbell
from app.services import keys
from app.storage import Storage
from app.tables import DEFAULT_TENANT, KeyRow, Owned

log = logging.getLogger(__name__)
NOBODY = Principal("", None, frozenset())
Row = TypeVar("Row", bound=Owned)
ID = re.compile(r"[a-z]{3}_[0-9a-z]{1,40}")


@dataclass(frozen=True)
class Parts:
    """What the process holds for as long as it runs."""

    settings: Settings
    database: Database
    storage: Storage
    doorbell: Doorbell
    watcher: Watcher


def parts(request: Request) -> Parts:
    found: Parts = request.app.state.parts
    return found


TheParts = Annotated[Parts, Depends(parts)]


async def principal(request: Request, parts: TheParts) -> Principal:
    """Who asks, with the scope that the operation needs. ServiceError 401, 403.

    Every operation of the application depends on it (see app.main), so that none is open by
    oversight. From here on queries are confined to the tenant and changes are signed
    (app.principal).
    """
    route = request.scope["route"]
    needed = scope_of(request.method, route.path)
    if needed is None:
        return NOBODY
    found = await _authenticated(request, parts)
    request.state.principal = found
    if needed not in found.scopes:
        raise ServiceError(
            403,
            "missing_scope",
            f"This needs a key with the scope '{needed}', and this one has: "
            f"{', '.join(sorted(found.scopes))}.",
            f"An admin of tenant '{DEFAULT_TENANT}' may do it."
            if needed == OPERATOR
            else "An admin makes another key: POST /v1/keys, or `litesmith keys create`.",
        )
    if needed != OPERATOR:
        acting.set(Acting(found, route.operation_id or route.name))
    return found


async def _authenticated(request: Request, parts: Parts) -> Principal:
    given = request.headers.get("authorization")
    settings = parts.settings
    if given is None:
        if settings.asks_for_keys:
            raise _unauthenticated("This needs an API key.", "")
        if not from_this_machine(request, settings.cors_origins):
            raise _unauthenticated(
                "This needs an API key: it came through a proxy, under another host name than"
                " localhost, or from a web page of another origin.",
                "",
            )
        return principal_of(DEFAULT_TENANT, None, ["admin"])
    kind, _, key = given.partition(" ")
    if kind.lower() != "bearer":
        raise _unauthenticated("The Authorization header holds no bearer token.", "")
    row = await run_in_threadpool(_row_of, parts, key.strip())
    if isinstance(row, keys.Refused):
        raise _unauthenticated(f"The API key {row.reason}.", ', error="invalid_token"')
    return principal_of(row.tenant_id, row.id, row.scopes)


def _row_of(parts: Parts, key: str) -> KeyRow | keys.Refused:
    with parts.database.read() as session:
        row = keys.authenticate(session, key)
    if isinstance(row, KeyRow) and keys.to_be_noted(row):
        try:
            with parts.database.write() as session:
                keys.note_use(session, row.id)
        except OperationalError as error:
            # A full disk must not end reading too.
            log.warning("the use of a key was not noted", extra={"error": str(error)})
    return row


def _unauthenticated(detail: str, more: str) -> ServiceError:
    return ServiceError(
        401,
        "unauthenticated",
        detail,
        "Send the header 'Authorization: Bearer ls_…'; `litesmith keys create` makes a key.",
        headers={"WWW-Authenticate": f'Bearer realm="litesmith"{more}'},
    )


ThePrincipal = Annotated[Principal, Depends(principal)]


async def tenant(principal: ThePrincipal) -> str:
    """The tenant that a request acts for."""
    return principal.tenant_id


Tenant = Annotated[str, Depends(tenant)]
Limit = Annotated[int, Query(ge=1, le=200, description="Items on a page.")]
Cursor = Annotated[
    str | None,
    Query(pattern=f"^{ID.pattern}$", description="`next_cursor` of the page before."),
]


def one(session: Session, table: type[Row], tenant_id: str, what: str, id_: str) -> Row:
    """The tenant's row of that id. ServiceError 404."""
    row = session.get(table, id_) if ID.fullmatch(id_) else None
    if row is None or row.tenant_id != tenant_id:
        raise not_found(what, id_[:80])
    return row


def page(
    session: Session,
    statement: Select[Row],
    table: type[Row],
    limit: int,
    cursor: str | None,
) -> tuple[list[Row], str | None]:
    """One page of a list, newest first, and the cursor of the next."""
    statement = statement.order_by(table.id.desc()).limit(limit + 1)
    if cursor is not None:
        statement = statement.where(table.id < cursor)
    rows = list(session.scalars(statement))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


def owned(table: type[Row], tenant_id: str) -> Select[Row]:
    return select(table).where(table.tenant_id == tenant_id)


def location(request: Request, route: str, **path: Any) -> str:
    return str(request.app.url_path_for(route, **path))
