"""The queue on both databases: claims, leases, fencing, what the reconciler finds."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select, update
from sqlalchemy.orm import Session

from app import queue, reconciler
from app.db import Database
from app.domain.jobs import Status
from app.queue import Claim, Doorbell, LeaseLost
from app.services import jobs, tasks, uploads
from app.storage import Stored
from app.tables import JobRow, TaskRow, VariantRow, WorkerRow, new_id, now

NOBODY = "redis+socket:///nonexistent/litesmith.sock"
TENANT = "default"


def add(database: Database, subject: str, kind: str = "prepare", priority: int = 0) -> None:
    with database.write() as session:
        queue.enqueue(session, kind, subject, "fast", tenant_id=TENANT, priority=priority)


def claim(database: Database, worker: str = "w", lease_s: float = 60) -> Claim | None:
    with database.write() as session:
        return queue.claim(session, "fast", worker, lease_s)


def claimed(database: Database, worker: str = "w", lease_s: float = 60) -> Claim:
    found = claim(database, worker, lease_s)
    assert found is not None
    return found


def expire(database: Database) -> None:
    with database.write() as session:
        session.execute(update(TaskRow).values(lease_until=now() - timedelta(seconds=1)))


def due_now(database: Database) -> None:
    with database.write() as session:
        session.execute(update(TaskRow).values(available_at=now()))


def job(database: Database, variants: int = 2) -> JobRow:
    """A job under way: prepared, with a task for each variant."""
    with database.write() as session:
        row = JobRow(
            id=new_id("job"), tenant_id=TENANT, status="running", model_id="mdl_1",
            spec={"model": "mdl_1", "variants": ["int8"]}, event_seq=0,
        )  # fmt: skip
        row.variants = [
            VariantRow(
                id=new_id("var"), tenant_id=TENANT, position=position, name=f"v{position}",
                recipe=[], status="succeeded" if position < 0 else "queued", progress=0.0,
                notes=[], artifacts=[],
            )
            for position in range(-1, variants)
        ]  # fmt: skip
        session.add(row)
        session.flush()
        for variant in jobs.requested(row):
            queue.enqueue(session, "variant", variant.id, "fast", tenant_id=TENANT)
    return row


def statuses(database: Database, id_: str) -> tuple[str, list[str]]:
    with database.read() as session:
        row = jobs.get(session, TENANT, id_)
        return row.status, [str(variant.status) for variant in jobs.requested(row)]


def together(*calls: Callable[[], object]) -> None:
    """Run the calls at once; fails where one of them raised."""
    gate, errors = threading.Barrier(len(calls)), []

    def run(call: Callable[[], object]) -> None:
        gate.wait()
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_each_task_is_claimed_by_one_of_many(database: Database) -> None:
    for number in range(20):
        add(database, f"job_{number}")
    found: list[Claim] = []

    def work() -> None:
        while (one := claim(database)) is not None:
            found.append(one)

    together(*[work] * 4)
    assert sorted(one.subject_id for one in found) == sorted(f"job_{n}" for n in range(20))
    assert {one.attempt for one in found} == {1}


def test_the_most_urgent_comes_first_then_the_oldest(database: Database) -> None:
    for subject, priority in (("a", 0), ("b", 10), ("c", -10), ("d", 10)):
        add(database, subject, priority=priority)
    assert [claimed(database).subject_id for _ in range(4)] == ["b", "d", "a", "c"]
    assert claim(database) is None


def test_a_postponed_task_is_due_later(database: Database) -> None:
    add(database, "a")
    held = claimed(database)
    with database.write() as session:
        queue.postpone(session, held, 60)
    assert claim(database) is None
    with database.write() as session:
        queue.wake_busy(session, TENANT)
    assert claimed(database).attempt == 2


def test_a_run_that_lost_its_lease_can_write_nothing(database: Database) -> None:
    add(database, "a")
    stale = claimed(database)
    expire(database)
    reconciler.reconcile(database, max_attempts=3)
    due_now(database)
    fresh = claimed(database, "other")
    assert (fresh.attempt, fresh.lost) == (2, 1)
    for write in (
        lambda session: queue.renew(session, stale, 60),
        lambda session: queue.finish(session, stale),
        lambda session: queue.postpone(session, stale, 0),
    ):
        with pytest.raises(LeaseLost):
            _write_and(database, write)
    with database.write() as session:
        assert session.scalars(select(WorkerRow)).all() == []
        queue.finish(session, fresh)


def _write_and(database: Database, write: Callable[[Session], None]) -> None:
    with database.write() as session:
        session.add(WorkerRow(id="of the stale run", queues=[]))
        write(session)


def test_a_renewed_lease_is_not_taken_back(database: Database) -> None:
    add(database, "a")
    held = claimed(database)
    expire(database)
    with database.read() as session:
        (seen,) = queue.expired(session)
    with database.write() as session:
        queue.renew(session, held, 60)
    with database.write() as session:
        assert not queue.take_back(session, seen, 0)
    with database.write() as session:
        queue.finish(session, held)


def test_two_reconcilers_count_a_death_once(database: Database) -> None:
    add(database, "a")
    claimed(database)
    expire(database)
    together(*[lambda: reconciler.reconcile(database, 3)] * 2)
    with database.read() as session:
        assert session.scalars(select(TaskRow.lost)).all() == [1]


def test_a_lenient_reconciler_leaves_leases_alone(database: Database) -> None:
    """Of workers that could not renew them while the database was away."""
    add(database, "a")
    held = claimed(database)
    expire(database)
    assert reconciler.reconcile(database, 3, lenient=True) == []
    with database.write() as session:
        queue.renew(session, held, 60)


def test_a_task_that_lost_many_attempts_waits_a_minute_at_most() -> None:
    assert [queue.backoff(lost) for lost in (1, 2, 3, 1000)] == [2, 4, 8, 60]


def test_attempts_exhausted_fail_that_variant_alone(database: Database) -> None:
    row = job(database)
    doomed = claimed(database)
    for _ in range(3):
        expire(database)
        due_now(database)
        reconciler.reconcile(database, max_attempts=3)
        due_now(database)
        again = claim(database, "next")
        if again is not None and again.subject_id != doomed.subject_id:
            break
    assert statuses(database, row.id) == ("running", ["failed", "queued"])
    with database.read() as session:
        variant = session.get_one(VariantRow, doomed.subject_id)
        assert variant.error is not None
        assert variant.error["code"] == "attempts_exhausted"
        assert variant.error["hint"]


def test_the_reconciler_rings_for_what_no_doorbell_announced(database: Database) -> None:
    with database.write() as session:
        # The broker is away: that neither fails nor delays who submits.
        Doorbell(NOBODY).ring_after_commit(session)
        queue.enqueue(session, "prepare", "a", "fast", tenant_id=TENANT)
    assert reconciler.reconcile(database, 3) == ["fast"]
    claimed(database)
    assert reconciler.reconcile(database, 3) == []


def test_the_doorbell_rings_after_the_commit_only(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bell, rung = Doorbell(NOBODY), []
    monkeypatch.setattr(bell, "ring", lambda queues: rung.append(sorted(queues)))

    def fail(session: Session) -> None:
        bell.ring_after_commit(session)
        queue.enqueue(session, "prepare", "a", "fast", tenant_id=TENANT)
        raise LeaseLost

    with pytest.raises(LeaseLost):
        _write_and(database, fail)
    assert rung == []
    with database.write() as session:
        bell.ring_after_commit(session)
        queue.enqueue(session, "prepare", "a", "fast", tenant_id=TENANT)
        assert rung == []
    assert rung == [["fast"]]


def test_a_cancel_ends_what_waits_and_takes_the_lease_of_what_runs(database: Database) -> None:
    row = job(database)
    held = claimed(database)
    with database.write() as session:
        jobs.cancel(session, jobs.locked(session, TENANT, row.id))
    assert statuses(database, row.id) == ("cancelled", ["cancelled", "cancelled"])
    with pytest.raises(LeaseLost), database.write() as session:
        queue.renew(session, held, 60)
    assert claim(database) is None


def test_a_cancel_ends_a_job_whose_worker_died_while_it_prepared(database: Database) -> None:
    row = job(database)
    with database.write() as session:
        queue.drop(session, "variant", [variant.id for variant in row.variants])
        queue.enqueue(session, "prepare", row.id, "fast", tenant_id=TENANT)
        jobs.baseline(jobs.get(session, TENANT, row.id)).status = Status.running
    claimed(database)
    expire(database)
    reconciler.reconcile(database, 3)
    with database.write() as session:
        jobs.cancel(session, jobs.locked(session, TENANT, row.id))
    assert statuses(database, row.id)[0] == "cancelled"


def test_a_cancel_and_the_end_of_a_run_do_not_deadlock(database: Database) -> None:
    for _ in range(10):
        row = job(database, variants=1)
        held = claimed(database)

        def cancel(id_: str = row.id) -> None:
            with database.write() as session:
                found = jobs.locked(session, TENANT, id_)
                if found.status == "running":
                    jobs.cancel(session, found)

        def end(run: Claim = held) -> None:
            try:
                with database.write() as session:
                    found = tasks.lock_job(session, run.kind, run.subject_id)
                    queue.finish(session, run)
                    variant = session.get_one(VariantRow, run.subject_id)
                    assert found is not None
                    jobs.fail_variant(session, variant, reconciler.attempts_exhausted(1))
                    jobs.settle(session, found)
            except LeaseLost:
                pass

        together(cancel, end)
        assert statuses(database, row.id) in (("cancelled", ["cancelled"]), ("failed", ["failed"]))


def test_events_are_numbered_without_gaps_whoever_writes_them(database: Database) -> None:
    row = job(database)

    def write() -> None:
        for _ in range(10):
            with database.write() as session:
                jobs.emit(session, row.id, TENANT, "variant", {})

    together(*[write] * 3)
    with database.read() as session:
        assert [event.seq for event in jobs.events_after(session, row.id, 0)] == [*range(1, 31)]


def test_a_ready_upload_wakes_any_number_of_jobs(database: Database) -> None:
    """By one statement that names none of them: SQLite takes 32,766 values, PostgreSQL 65,535."""
    count, most = 200, 0
    owned = {"tenant_id": TENANT, "created_at": now()}
    asked = {"status": "queued", "model_id": "mdl_1", "spec": {}, "sources": {}}
    later = now() + timedelta(hours=1)
    waiting = {"kind": "prepare", "queue": "fast", "status": "queued", "available_at": later}
    ids = [f"job_{number}" for number in range(count)]
    with database.write() as session:
        session.execute(insert(JobRow), [owned | asked | {"id": id_} for id_ in ids])
        tasks_ = [owned | waiting | {"id": f"tsk_{id_}", "subject_id": id_} for id_ in ids]
        session.execute(insert(TaskRow), tasks_)

    @event.listens_for(database.engine, "before_cursor_execute")
    def count_values(_c: Any, _u: Any, _s: str, values: Any, _x: Any, _m: bool) -> None:
        nonlocal most
        most = max(most, len(values))

    with database.write() as session:
        row, _ = uploads.create(
            session, "model", tenant_id=TENANT, name="m", format_="tflite",
            stored=Stored("ab" * 32, 1), request_id=None,
        )  # fmt: skip
        session.flush()
        uploads.inspected(session, row, {})
    with database.read() as session:
        due = select(func.count()).where(TaskRow.kind == "prepare", TaskRow.available_at <= now())
        assert session.scalar(due) == count
    assert most < 50


def test_the_same_bytes_at_once_are_one_model(database: Database) -> None:
    made = []

    def upload() -> None:
        with database.write() as session:
            row, new = uploads.create(
                session, "model", tenant_id=TENANT, name="m", format_="tflite",
                stored=Stored("ab" * 32, 1), request_id=None,
            )  # fmt: skip
            made.append((row.id, new))

    # What the api does: once more where another request was first.
    from app.api.uploads import once_more_on_conflict

    together(*[lambda: once_more_on_conflict(upload)] * 4)  # type: ignore[arg-type]
    # A call that lost the race has noted the row that was rolled back.
    with database.read() as session:
        found = session.scalars(select(TaskRow.subject_id)).all()
    assert len(found) == 1
    assert (found[0], True) in made
    assert (found[0], False) in made
