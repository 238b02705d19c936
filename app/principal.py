"""Who acts: found once for a request, then it confines every query and signs every change.

`confine` is the one place where rows are filtered by tenant. What the api's own queries say of the
tenant besides is for the reader, and for the indexes.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria
from sqlalchemy.orm.interfaces import ORMOption

from app.db import Database
from app.logging import request_id
from app.tables import (
    DEFAULT_TENANT,
    ArtifactRow,
    AuditRow,
    DeliveryRow,
    EventRow,
    IdempotencyRow,
    Owned,
    QuotaRow,
    StepRow,
    TaskRow,
    TurnRow,
    VariantRow,
    new_id,
)

Scope = Literal["read", "write", "admin"]
# What concerns the whole service, not one tenant: for the admins of the first tenant. No key is
# made with it.
OPERATOR = "operator"
INCLUDED: dict[str, tuple[str, ...]] = {
    "read": ("read",),
    "write": ("write", "read"),
    "admin": ("admin", "write", "read"),
}
# What comes of a change to another row, which tells of it.
CONSEQUENCES = (VariantRow, ArtifactRow, TaskRow, AuditRow, DeliveryRow)


@dataclass(frozen=True)
class Principal:
    """The tenant that a request acts for, and what it may do; `key_id` is None where the service
    asks for no key."""

    tenant_id: str
    key_id: str | None
    scopes: frozenset[str]


def principal_of(tenant_id: str, key_id: str | None, scopes: Iterable[str]) -> Principal:
    """A principal with all that its scopes include."""
    granted = {one for scope in scopes for one in INCLUDED[scope]}
    if "admin" in granted and tenant_id == DEFAULT_TENANT:
        granted.add(OPERATOR)
    return Principal(tenant_id, key_id, frozenset(granted))


@dataclass(frozen=True)
class Acting:
    """Who does what, for the length of a request; `action` is the operation's id."""

    principal: Principal
    action: str


acting: ContextVar[Acting | None] = ContextVar("acting", default=None)


class OutOfTenant(Exception):
    """A row was to be written for another tenant than the one that acts: a fault of ours."""


@lru_cache(1024)
def _only(tenant_id: str) -> tuple[ORMOption, ...]:
    return tuple(
        with_loader_criteria(table, lambda row: row.tenant_id == tenant_id, include_aliases=True)
        for table in (Owned, EventRow, IdempotencyRow, QuotaRow, StepRow, TurnRow)
    )


def _filter(state: ORMExecuteState) -> None:
    """SELECT, UPDATE and DELETE see rows of the acting tenant alone, whatever they ask for.

    A statement that must count rows of all tenants says so by the execution option `all_tenants`.
    """
    doing = acting.get()
    if doing is None or state.execution_options.get("all_tenants"):
        return
    # What is loaded along with a row inherits its options.
    if not (state.is_relationship_load or state.is_column_load):
        state.statement = state.statement.options(*_only(doing.principal.tenant_id))


def _sign(session: Session, _context: Any, _instances: Any) -> None:
    """Write a row of the audit log for each subject that changes, in the transaction that changes
    it."""
    doing = acting.get()
    if doing is None:
        return
    tenant_id = doing.principal.tenant_id
    changed = [row for row in session.dirty if session.is_modified(row)]
    for row in (*session.new, *changed, *session.deleted):
        if getattr(row, "tenant_id", tenant_id) != tenant_id:
            raise OutOfTenant(f"{type(row).__name__} of '{row.tenant_id}', by '{tenant_id}'")
        if isinstance(row, Owned) and not isinstance(row, CONSEQUENCES):
            sign(session, doing.principal, doing.action, row.id)


def sign(session: Session, principal: Principal, action: str, subject: str) -> None:
    """Add to the audit log; once a transaction for the same subject."""
    signed: set[str] = session.info.setdefault("signed", set())
    if subject in signed:
        return
    signed.add(subject)
    session.add(
        AuditRow(
            id=new_id("aud"),
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            action=action,
            subject=subject,
            request_id=request_id.get(),
        )
    )


def note(session: Session, subject: str) -> None:
    """Sign a change to `subject` that shows in consequences alone."""
    doing = acting.get()
    if doing is not None:
        sign(session, doing.principal, doing.action, subject)


def confine(database: Database) -> None:
    """Hold the sessions of `database` to whoever acts."""
    event.listen(database.sessions, "do_orm_execute", _filter)
    event.listen(database.sessions, "before_flush", _sign)
