"""The database: engine, sessions, migrations. SQLite and PostgreSQL by URL alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from app.config import Settings

# What is raised where the database does not answer, or ended while it was asked.
AWAY = (OperationalError, InterfaceError, PoolTimeout)
# Between attempts to lock what a migration changes: those who wait behind it go on meanwhile.
MIGRATE_PAUSES_S = (0.5, 1, 2, 4, 8, 8, 8, 8)
MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


class DatabaseBusy(Exception):
    """A migration got no turn; the text says what to do."""


class Database:
    """An engine and the two kinds of transactions over it.

    On SQLite, `write` begins by taking the write lock: a transaction that reads first and writes
    later would fail at once when another one wrote in between, whatever its busy timeout.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(immediate=True)
        self.sessions = sessionmaker(expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self.sessions(bind=self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end, and rolls back on any exception."""
        with self.sessions(bind=self._writer) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=40)
    engine = create_engine(parsed, connect_args={"timeout": 30}, pool_size=10, max_overflow=40)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        # BEGIN is sent by the listener below; the driver's own would come too late for IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "foreign_keys=ON",
            "busy_timeout=30000",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def insert(session: Session, table: type[DeclarativeBase]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can say what to do on a conflict, in the words of the session's database."""
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def schema_of(database: Database) -> str | None:
    """The revision that the database is at; None where it was never migrated."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


@cache
def newest_schema() -> str | None:
    """The revision that this version needs."""
    return ScriptDirectory(str(MIGRATIONS)).get_current_head()


def migrate(settings: Settings) -> None:
    """Bring the database to the newest revision; makes the SQLite file where there is none. May be
    called by several processes at once, and while others work: they take turns, and nobody is kept
    waiting for long (see migrations/env.py). Raises DatabaseBusy."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.attributes["database_url"] = settings.database
    for pause_s in (0, *MIGRATE_PAUSES_S):
        time.sleep(pause_s)
        try:
            command.upgrade(config, "head")
            return
        except OperationalError as error:
            if not _waited_for_lock(error):
                raise
    raise DatabaseBusy(
        "The migration got no lock on what a long transaction uses; nothing was changed."
        " End what runs in the database for so long, then migrate again."
    )


def _waited_for_lock(error: OperationalError) -> bool:
    not_available = getattr(error.orig, "sqlstate", None) == "55P03"
    return not_available or "database is locked" in str(error.orig)
