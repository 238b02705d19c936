"""Migrations beside others that migrate, and under load."""

import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from running import LITESMITH, Postgres, environment
from sqlalchemy import text

from app import db
from app.config import Settings
from app.db import MIGRATIONS, Database, DatabaseBusy, migrate, newest_schema, schema_of


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.database()


def test_many_may_migrate_at_once(empty: str) -> None:
    started = [
        subprocess.Popen(
            [str(LITESMITH), "migrate"],
            env=environment(database_url=empty),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    database = Database(empty)
    assert schema_of(database) == newest_schema()
    database.close()


def to_revision(url: str, revision: str) -> Database:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = url
    command.upgrade(config, revision)
    return Database(url)


def test_a_database_of_another_version_is_told(empty: str) -> None:
    fresh = Database(empty)
    assert schema_of(fresh) is None
    fresh.close()
    old = to_revision(empty, "0001")
    assert schema_of(old) == "0001" != newest_schema()
    old.close()


def test_a_migration_waits_for_a_long_reader_but_lets_others_work(postgres: Postgres) -> None:
    """Who reads `variants` in a long transaction keeps its columns from being changed. Whoever
    comes after the migration would wait behind it: it gives way, again and again."""
    url = postgres.database()
    database = to_revision(url, "0001")
    with ThreadPoolExecutor() as pool, database.read() as reader:
        reader.execute(text("SELECT count(*) FROM variants"))
        migrated = pool.submit(migrate, Settings(database_url=url))
        for _ in range(10):
            with database.read() as other:
                other.execute(text("SET LOCAL statement_timeout = '10s'"))
                other.execute(text("SELECT count(*) FROM variants"))
            time.sleep(0.2)
        assert not migrated.done()
        reader.rollback()
        migrated.result(timeout=30)
    assert schema_of(database) == newest_schema()
    with database.read() as reader:
        reader.execute(text("SELECT count(*) FROM variants"))
    database.close()


def test_a_migration_that_gets_no_turn_says_so_and_changes_nothing(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "MIGRATE_PAUSES_S", ())
    url = postgres.database()
    database = to_revision(url, "0001")
    with database.read() as reader:
        reader.execute(text("SELECT count(*) FROM variants"))
        with pytest.raises(DatabaseBusy, match="migrate again"):
            migrate(Settings(database_url=url))
    assert schema_of(database) == "0001"
    database.close()


def test_a_sqlite_migration_waits_for_a_writer_and_not_for_a_reader(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    database = to_revision(url, "0001")
    with database.read() as reader:
        reader.execute(text("SELECT count(*) FROM variants"))
        with database.write() as writer:
            writer.execute(text("UPDATE workers SET seen_at = seen_at"))
            thread = threading.Thread(target=migrate, args=(Settings(database_url=url),))
            thread.start()
            time.sleep(0.3)
            assert thread.is_alive()
        thread.join(30)
        assert not thread.is_alive()
    assert schema_of(database) == newest_schema()
    database.close()
