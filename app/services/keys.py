"""API keys: made, found, revoked. The key itself is shown once and kept nowhere."""

import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

from sqlalchemy import inspect, make_url, or_, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.config import Settings
from app.db import Database
from app.principal import principal_of, sign
from app.tables import KeyRow, new_id, now

log = logging.getLogger(__name__)
KEY = re.compile(r"ls_[A-Za-z0-9_-]{51}")
TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
# "ls_" and 48 random bits, which find the row; the 256 bits that follow are the secret.
PREFIX_LENGTH = 11
# A last use that is noted more seldom than it happens costs no write on each request.
NOTED_EVERY = timedelta(minutes=1)


@dataclass(frozen=True)
class Refused:
    """Why a key opens nothing."""

    reason: str


def _digest(text: str) -> str:
    """SHA-256 suffices: a slow hash (bcrypt, argon2) makes up for passwords that can be guessed,
    and 256 random bits cannot be; on each request it would cost 100 ms for nothing."""
    return sha256(text.encode()).hexdigest()


def create(
    session: Session,
    tenant_id: str,
    name: str,
    scopes: Iterable[str],
    expires_at: datetime | None = None,
) -> tuple[KeyRow, str]:
    """A new key's row, and the key: nobody can tell it again."""
    text = f"ls_{secrets.token_urlsafe(6)}{secrets.token_urlsafe(32)}"
    row = KeyRow(
        id=new_id("key"),
        tenant_id=tenant_id,
        created_at=now(),
        name=name,
        prefix=text[:PREFIX_LENGTH],
        digest=_digest(text),
        scopes=sorted(set(scopes)),
        expires_at=expires_at,
    )
    session.add(row)
    return row, text


def authenticate(session: Session, text: str) -> KeyRow | Refused:
    """The row of a key that came with a request."""
    row = None
    if KEY.fullmatch(text):
        row = session.scalar(select(KeyRow).where(KeyRow.prefix == text[:PREFIX_LENGTH]))
    if row is None or not hmac.compare_digest(row.digest, _digest(text)):
        return Refused("is not known here")
    if (found := standing(row)) != "usable":
        return Refused(f"'{row.prefix}…' is {found}")
    return row


def to_be_noted(row: KeyRow) -> bool:
    return row.last_used_at is None or row.last_used_at < now() - NOTED_EVERY


def note_use(session: Session, key_id: str) -> None:
    session.execute(update(KeyRow).where(KeyRow.id == key_id).values(last_used_at=now()))


def revoke(row: KeyRow) -> None:
    """The key opens nothing from now on; its row stays, for the audit log."""
    row.revoked_at = row.revoked_at or now()


def of_tenant(session: Session, tenant_id: str | None) -> list[KeyRow]:
    """Keys, newest first; of all tenants for None."""
    statement = select(KeyRow).order_by(KeyRow.id.desc())
    if tenant_id is not None:
        statement = statement.where(KeyRow.tenant_id == tenant_id)
    return list(session.scalars(statement))


def standing(row: KeyRow) -> str:
    if row.revoked_at is not None:
        return "revoked"
    expired = row.expires_at is not None and row.expires_at <= now()
    return "expired" if expired else "usable"


def sign_command(session: Session, tenant_id: str, action: str, key_id: str) -> None:
    """Add to the tenant's audit log what the command on the service's machine did."""
    sign(session, principal_of(tenant_id, None, []), action, key_id)


NO_TABLES = "Not started: the database lacks tables.\n  next: `litesmith migrate`"


def any_usable(session: Session) -> bool:
    unexpired = or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > now())
    usable = select(KeyRow.id).where(KeyRow.revoked_at.is_(None), unexpired)
    return session.scalar(usable.limit(1)) is not None


def refusal(settings: Settings) -> str | None:
    """Why the api must not start: it asks for keys, and there is none that it could accept."""
    if not settings.asks_for_keys:
        return None
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        return NO_TABLES
    database = Database(settings.database)
    try:
        if not inspect(database.engine).has_table(KeyRow.__tablename__):
            return NO_TABLES
        with database.read() as session:
            if any_usable(session):
                return None
    except OperationalError as error:
        # It may come back, and until then no key is accepted either.
        log.warning("the database does not answer yet", extra={"error": str(error)})
        return None
    finally:
        database.close()
    same = f" --data-dir {settings.root}" if settings.database_url is None else ""
    without = (
        "listen on 127.0.0.1, where none is needed from this machine"
        if settings.auth == "auto"
        else "unset LITESMITH_AUTH"
    )
    return (
        f"Not started: every request to {settings.host}:{settings.port} needs an API key, and there"
        " is none yet.\n"
        f"  next: `litesmith keys create --name NAME --scopes admin{same}`, or {without}"
    )
