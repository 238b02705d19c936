"""API keys: made, found, revoked. The key itself is shown once and kept nowhere."""

import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from app.principal import Scope
from app.tables import KeyRow, new_id, now

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
    scopes: Sequence[Scope],
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
    if row.revoked_at is not None:
        return Refused(f"'{row.prefix}…' was revoked")
    if row.expires_at is not None and row.expires_at <= now():
        return Refused(f"'{row.prefix}…' has expired")
    return row


def to_be_noted(row: KeyRow) -> bool:
    return row.last_used_at is None or row.last_used_at < now() - NOTED_EVERY


def note_use(session: Session, key_id: str) -> None:
    session.execute(update(KeyRow).where(KeyRow.id == key_id).values(last_used_at=now()))


def revoke(row: KeyRow) -> None:
    """The key opens nothing from now on; its row stays, for the audit log."""
    row.revoked_at = row.revoked_at or now()


def any_usable(session: Session) -> bool:
    unexpired = or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > now())
    usable = select(KeyRow.id).where(KeyRow.revoked_at.is_(None), unexpired)
    return session.scalar(usable.limit(1)) is not None
