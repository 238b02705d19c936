"""Whose task comes next, on both databases: fair between tenants, nobody starves, always fast."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update

from app import queue, turns
from app.db import Database
from app.tables import TaskRow, now


def add(
    database: Database, tenant: str, count: int = 1, *, priority: int = 0, waited_s: float = 0
) -> list[str]:
    """Tasks of a tenant named TENANT-PRIORITY-NUMBER, due since `waited_s` ago."""
    subjects = [f"{tenant}{priority:+d}.{number}" for number in range(count)]
    since = now() - timedelta(seconds=waited_s)
    with database.write() as session:
        for number, subject in enumerate(subjects):
            queue.enqueue(session, "k", subject, "fast", tenant_id=tenant, priority=priority)
            session.flush()
            session.execute(
                update(TaskRow)
                .where(TaskRow.subject_id == subject)
                .values(available_at=since + timedelta(microseconds=number))
            )
    return subjects


def served(database: Database, count: int, *, done: bool = True) -> list[str]:
    """The subjects of the next claims; each ends before the next is made unless `done` is false."""
    found = []
    for _ in range(count):
        with database.write() as session:
            claim = queue.claim(session, "fast", "w", 60)
            if claim is None:
                break
            found.append(claim.subject_id)
            if done:
                queue.finish(session, claim)
    return found


def test_one_job_does_not_wait_for_another_tenants_thousand(database: Database) -> None:
    add(database, "a", 1000, waited_s=60)
    assert served(database, 3) == ["a+0.0", "a+0.1", "a+0.2"]
    add(database, "b")
    assert served(database, 3) == ["b+0.0", "a+0.3", "a+0.4"]


def test_tenants_take_turns(database: Database) -> None:
    add(database, "a", 4, waited_s=60)
    add(database, "b", 2)
    add(database, "c", 2)
    assert served(database, 8) == [
        "a+0.0", "b+0.0", "c+0.0", "a+0.1", "b+0.1", "c+0.1", "a+0.2", "a+0.3",
    ]  # fmt: skip


def test_priority_does_not_take_from_other_tenants(database: Database) -> None:
    add(database, "a", 3, priority=10)
    add(database, "b", 1, priority=-10)
    assert served(database, 4) == ["a+10.0", "b-10.0", "a+10.1", "a+10.2"]


def test_who_runs_less_comes_first(database: Database) -> None:
    add(database, "a", 2)
    assert served(database, 2, done=False) == ["a+0.0", "a+0.1"]
    add(database, "b", 3)
    add(database, "a", 2, priority=10)
    assert served(database, 5, done=False) == ["b+0.0", "b+0.1", "a+10.0", "b+0.2", "a+10.1"]


def test_low_priority_gets_its_turn_after_a_while(database: Database) -> None:
    """A low task waits for the normal ones that became due up to 10 minutes after it, no longer."""
    add(database, "a", 1, priority=-10, waited_s=11 * turns.AGING_S)
    add(database, "a", 2, priority=0, waited_s=turns.AGING_S / 2)
    add(database, "a", 1, priority=10, waited_s=0)
    assert served(database, 4) == ["a+10.0", "a-10.0", "a+0.0", "a+0.1"]


def test_under_a_steady_stream_of_urgent_work_low_work_still_runs(database: Database) -> None:
    add(database, "a", 1, priority=-10, waited_s=0)
    found: list[str] = []
    for minute in range(30):
        # Ten urgent tasks come each minute, and ten tasks are done in it: the queue stays full.
        with database.write() as session:
            for row in session.scalars(select(TaskRow)):
                row.available_at -= timedelta(minutes=1)
        fresh = [f"m{minute}.{number}" for number in range(10)]
        with database.write() as session:
            for subject in fresh:
                queue.enqueue(session, "k", subject, "fast", tenant_id="a", priority=10)
        found += served(database, 10)
    assert "a-10.0" in found
    # Two levels of ten points, a minute a point.
    assert found.index("a-10.0") // 10 in (19, 20, 21)


def test_a_woken_task_keeps_its_place(database: Database) -> None:
    with database.write() as session:
        queue.enqueue(session, "k", "first", "fast", tenant_id="a")
    with database.write() as session:
        claim = queue.claim(session, "fast", "w", 60)
        assert claim is not None
        queue.postpone(session, claim, 600)
    with database.write() as session:
        queue.enqueue(session, "k", "second", "fast", tenant_id="a")
    with database.write() as session:
        queue.wake(session, "k", ["first"])
    assert served(database, 2) == ["first", "second"]


def test_the_position_counts_who_comes_before(database: Database) -> None:
    add(database, "a", 5, waited_s=60)
    add(database, "b", 1)
    add(database, "c", 3, priority=10)
    served(database, 1, done=False)
    with database.read() as session:
        (mine,) = session.scalars(select(TaskRow).where(TaskRow.tenant_id == "b"))
        # One runs; then one of a and one of c may have their turn first.
        assert turns.before(session, mine) == 3
        last = session.scalars(select(TaskRow).where(TaskRow.subject_id == "a+0.4")).one()
        assert turns.before(session, last) == 1 + 3 + 1 + 3


def fill(database: Database, tenants: int, each: int) -> None:
    """Many waiting tasks, by one statement."""
    numbers = (
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < :last)"
        if database.engine.dialect.name == "sqlite"
        else "WITH n(i) AS (SELECT generate_series(0, :last))"
    )
    insert = (
        "INSERT INTO tasks (id, tenant_id, created_at, kind, subject_id, queue, priority, status,"
        " attempt, lost, available_at)"
    )
    rows = (
        f"SELECT 'tsk_' || i, 'tenant' || (i % {tenants}), :at, 'k', 's' || i, 'fast',"
        " (i % 3 - 1) * 10, 'queued', 0, 0, :at FROM n"
    )
    at = (now() - timedelta(hours=1)).replace(tzinfo=None)
    value: Any = at.isoformat(" ") if database.engine.dialect.name == "sqlite" else at
    with database.write() as session:
        session.execute(
            text(f"{insert} {numbers} {rows}"), {"last": tenants * each - 1, "at": value}
        )
    with database.write() as session:
        session.execute(text("ANALYZE tasks"))


@pytest.mark.parametrize("tenants", [1, 20])
def test_a_claim_reads_the_index_however_long_the_queue_is(
    database: Database, tenants: int
) -> None:
    fill(database, tenants, 100_000 // tenants)
    with database.read() as session:
        dialect = database.engine.dialect
        statement = turns._oldest("fast").compile(
            dialect=dialect, compile_kwargs={"literal_binds": True}
        )
        word = "EXPLAIN QUERY PLAN" if dialect.name == "sqlite" else "EXPLAIN"
        connection = session.connection()
        plan = [str(row) for row in connection.exec_driver_sql(f"{word} {statement}")]
    reads = [line for line in plan if "tasks" in line]
    assert reads, plan
    # By this index alone, from the first column to the last: another would read tasks in numbers.
    assert all("tasks_due" in line for line in reads), plan
    assert not [line for line in reads if "SCAN tasks" in line], plan
    found = served(database, 2 * tenants)
    # Each tenant twice, in turns.
    assert len(found) == 2 * tenants
    owners = [int(subject[1:]) % tenants for subject in found]
    assert sorted(owners[:tenants]) == sorted(owners[tenants:]) == list(range(tenants))
