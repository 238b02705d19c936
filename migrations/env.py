"""Runs migrations: against the service's own settings, or the URL that app.db.migrate passes."""

from alembic import context
from sqlalchemy import Connection, text

from app.config import Settings
from app.db import Database
from app.tables import Base

# Any number, the same for every process that migrates: "litesmith" in ASCII, cut to 63 bits.
TURN = int.from_bytes(b"litesmit") & (2**63 - 1)
# Who waits for a lock on a table makes all wait who come after it: not for longer than this.
LOCK_TIMEOUT = "2s"


def take_turns(connection: Connection) -> None:
    """Let one process migrate at a time; on SQLite, it has the write lock already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:turn)"), {"turn": TURN})
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))


url = context.config.attributes.get("database_url") or Settings().database
database = Database(url)
# The writing engine: on SQLite, two processes that migrate at once must take turns.
with database.engine.execution_options(immediate=True).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_type=True,
    )
    with context.begin_transaction():
        take_turns(connection)
        context.run_migrations()
database.close()
