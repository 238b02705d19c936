"""Webhooks on both databases: written with the event, sent by a worker to a real receiver."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from receiver import Receiver, receiving
from running import until
from sqlalchemy import select
from standardwebhooks import WebhookVerificationError

from app import queue, reconciler
from app.config import Settings
from app.db import Database
from app.domain.problems import Problem
from app.queue import LeaseLost
from app.services import jobs, uploads, webhooks
from app.storage import Stored
from app.tables import DeliveryRow, JobRow, ModelRow, TaskRow, VariantRow, WebhookRow, new_id, now
from workers.tasks import handle
from workers.worker import Worker

TENANT = "team"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def worker(database: Database, tmp_path: Path) -> Iterator[Worker]:
    """A worker of the queue, without a broker: the tests ring."""
    settings = Settings(
        data_dir=tmp_path,
        database_url=database.engine.url.render_as_string(hide_password=False),
        light_spares=0,
        tensorflow_spares=0,
        webhook_allowed_networks=["127.0.0.0/8"],
        webhook_retry_s=[0.05, 0.05],
        webhook_timeout_s=1,
    )
    made = Worker(settings, ["webhooks"])
    yield made
    made.close()


def hook(database: Database, url: str, *events: str) -> WebhookRow:
    with database.write() as session:
        return webhooks.create(session, TENANT, url, events or webhooks.EVENTS, "")


def emit(database: Database, event: Any = "model.ready", **data: Any) -> None:
    with database.write() as session:
        webhooks.emit(session, TENANT, event, data)


def deliveries(database: Database) -> list[DeliveryRow]:
    with database.read() as session:
        return list(session.scalars(select(DeliveryRow).order_by(DeliveryRow.id)))


def one(database: Database) -> DeliveryRow:
    (row,) = deliveries(database)
    return row


def work(worker: Worker, database: Database) -> None:
    """Send what is due, until nothing is pending."""

    def sent() -> bool:
        worker.run_queue("webhooks", handle)
        return all(row.status != "pending" for row in deliveries(database))

    until(sent, "everything is sent, or given up")


def refresh(database: Database, row: WebhookRow) -> WebhookRow:
    with database.read() as session:
        return session.get_one(WebhookRow, row.id)


def test_a_receiver_that_fails_twice_gets_it_the_third_time(
    database: Database, worker: Worker, receiver: Receiver
) -> None:
    made = hook(database, receiver.url)
    receiver.answers[:] = [500, 503]
    emit(database, id="mdl_1", name="größer")
    work(worker, database)
    assert len(receiver.messages) == 3
    for message in receiver.messages:
        told = message.verified(made.secret)
        assert (told["type"], told["data"]) == ("model.ready", {"id": "mdl_1", "name": "größer"})
        with pytest.raises(WebhookVerificationError):
            message.verified(webhooks.new_secret())
        assert message.headers["Host"] == f"127.0.0.1:{receiver.port}"
        assert message.headers["Content-Type"] == "application/json"
    assert len({message.headers["webhook-id"] for message in receiver.messages}) == 1
    assert len({message.body for message in receiver.messages}) == 1
    row = one(database)
    assert receiver.messages[0].headers["webhook-id"] == row.id
    assert (row.status, row.attempts, row.response_status) == ("delivered", 3, 200)
    assert (row.response_excerpt, row.error, row.next_attempt_at) == ("thanks", None, None)
    assert row.latency_ms is not None
    assert refresh(database, made).failing_since is None
    with database.read() as session:
        assert session.scalars(select(TaskRow)).all() == []


def test_what_was_rolled_back_is_never_told(database: Database, receiver: Receiver) -> None:
    hook(database, receiver.url)

    def fail() -> None:
        with database.write() as session:
            webhooks.emit(session, TENANT, "job.finished", {})
            session.flush()
            raise LeaseLost

    with pytest.raises(LeaseLost):
        fail()
    assert deliveries(database) == []
    with database.read() as session:
        assert session.scalars(select(TaskRow)).all() == []


def test_only_who_asked_is_told(database: Database, receiver: Receiver) -> None:
    wants = hook(database, receiver.url, "job.finished")
    hook(database, receiver.url, "model.ready")
    disabled = hook(database, receiver.url, "job.finished")
    with database.write() as session:
        webhooks.enable(session.get_one(WebhookRow, disabled.id), False)
        webhooks.create(session, "other", receiver.url, ["job.finished"], "")
    emit(database, "job.finished")
    assert one(database).webhook_id == wants.id


def test_a_receiver_that_never_answers_well_is_disabled_and_can_be_replayed(
    database: Database, worker: Worker, receiver: Receiver
) -> None:
    made = hook(database, receiver.url)
    receiver.answers[:] = [500] * 3
    emit(database)
    work(worker, database)
    row = one(database)
    assert (row.status, row.attempts, row.error) == ("failed", 3, "answered 500")
    after = refresh(database, made)
    assert not after.enabled
    assert after.disabled_reason is not None
    assert "answered 500" in after.disabled_reason
    emit(database)
    assert len(deliveries(database)) == 1
    with database.write() as session:
        webhooks.enable(session.get_one(WebhookRow, made.id), True)
        found = session.get_one(DeliveryRow, row.id)
        webhooks.replay(session, session.get_one(WebhookRow, made.id), found)
    work(worker, database)
    again = one(database)
    assert (again.status, again.attempts) == ("delivered", 4)
    assert {message.headers["webhook-id"] for message in receiver.messages} == {row.id}
    assert receiver.messages[-1].verified(made.secret)["type"] == "model.ready"


def test_a_message_among_ones_that_arrive_does_not_disable(
    database: Database, worker: Worker, receiver: Receiver
) -> None:
    made = hook(database, receiver.url)
    emit(database)
    work(worker, database)
    with database.write() as session:
        session.get_one(WebhookRow, made.id).failing_since = now()
        row = session.get_one(DeliveryRow, one(database).id)
        # A schedule that has just begun to fail: far from a day of failures.
        outcome = webhooks.Outcome(1.0, error="x")
        row.tries = 2
        webhooks.attempted(session, row, session.get_one(WebhookRow, made.id), outcome, [60, 600])
    assert one(database).status == "failed"
    assert refresh(database, made).enabled


def test_gone_disables_at_once(database: Database, worker: Worker, receiver: Receiver) -> None:
    made = hook(database, receiver.url)
    receiver.answers[:] = [410]
    emit(database)
    emit(database)
    work(worker, database)
    assert len(receiver.messages) == 1
    assert "410" in (refresh(database, made).disabled_reason or "")
    assert [row.status for row in deliveries(database)] == ["failed", "failed"]


def test_a_redirect_is_not_followed(database: Database, worker: Worker, receiver: Receiver) -> None:
    hook(database, receiver.url)
    receiver.answers[:] = [302, 307]
    with receiving() as inside:
        receiver.location = inside.url
        emit(database)
        work(worker, database)
        assert inside.messages == []
    row = one(database)
    assert (row.status, row.attempts) == ("delivered", 3)
    assert len(receiver.messages) == 3


def test_neither_a_slow_nor_a_long_answer_holds_the_worker(
    database: Database, worker: Worker, receiver: Receiver
) -> None:
    hook(database, receiver.url)
    receiver.content = b"a\0" * 5_000_000
    emit(database)
    work(worker, database)
    row = one(database)
    assert row.status == "delivered"
    assert row.response_excerpt == "a�" * 512
    receiver.silent_s = 5
    worker.settings.webhook_timeout_s = 0.2
    worker.settings.webhook_retry_s = [0.01]
    emit(database)
    work(worker, database)
    last = deliveries(database)[-1]
    assert (last.status, last.error) == ("failed", "no answer within 0.2 s")


def test_what_leads_inside_is_not_sent(database: Database, worker: Worker) -> None:
    """The address is checked again at every attempt: it may have been public when it was given."""
    worker.settings.webhook_allowed_networks = []
    worker.settings.webhook_retry_s = [0.01]
    with receiving() as inside:
        hook(database, f"https://127.0.0.1:{inside.port}/")
        emit(database)
        work(worker, database)
        assert inside.messages == []
    assert "private, loopback" in (one(database).error or "")


def test_a_new_secret_signs_beside_the_old_one_for_a_day(
    database: Database, worker: Worker, receiver: Receiver
) -> None:
    old = hook(database, receiver.url)
    with database.write() as session:
        webhooks.rotate(session.get_one(WebhookRow, old.id))
    new = refresh(database, old)
    emit(database)
    work(worker, database)
    assert receiver.messages[0].verified(old.secret)
    assert receiver.messages[0].verified(new.secret)
    with database.write() as session:
        session.get_one(WebhookRow, old.id).old_secret_until = now() - timedelta(seconds=1)
    emit(database)
    work(worker, database)
    assert receiver.messages[1].verified(new.secret)
    with pytest.raises(WebhookVerificationError):
        receiver.messages[1].verified(old.secret)


def test_a_deleted_webhook_leaves_nothing(database: Database, receiver: Receiver) -> None:
    made = hook(database, receiver.url)
    emit(database)
    emit(database)
    with database.write() as session:
        webhooks.delete(session, session.get_one(WebhookRow, made.id))
    with database.read() as session:
        for table in (WebhookRow, DeliveryRow, TaskRow):
            assert session.scalars(select(table)).all() == []


def test_a_worker_that_dies_while_it_sends_leaves_the_message_to_others(
    database: Database, worker: Worker, receiver: Receiver
) -> None:
    hook(database, receiver.url)
    emit(database)
    with database.write() as session:
        assert queue.claim(session, "webhooks", "dead", -1) is not None
    assert reconciler.reconcile(database, 3) == []
    with database.write() as session:
        session.scalars(select(TaskRow)).one().available_at = now()
    work(worker, database)
    assert one(database).status == "delivered"
    emit(database)
    with database.write() as session:
        assert queue.claim(session, "webhooks", "dead", -1) is not None
    reconciler.reconcile(database, 1)
    assert deliveries(database)[-1].status == "failed"
    assert "died" in (deliveries(database)[-1].error or "")


def test_old_deliveries_are_forgotten_pending_ones_are_not(
    database: Database, receiver: Receiver
) -> None:
    hook(database, receiver.url)
    emit(database)
    emit(database)
    with database.write() as session:
        first, second = session.scalars(select(DeliveryRow).order_by(DeliveryRow.id))
        first.status = "delivered"
        first.created_at = second.created_at = now() - timedelta(days=31)
    with database.write() as session:
        reconciler.clean(session, Settings())
    assert one(database).status == "pending"


def test_jobs_and_uploads_tell_what_happens_to_them(database: Database, receiver: Receiver) -> None:
    hook(database, receiver.url)
    spec = {"model": "mdl_1", "variants": ["int8"]}
    with database.write() as session:
        job = JobRow(id=new_id("job"), tenant_id=TENANT, status="queued", model_id="mdl_1",
                     spec=spec, event_seq=0)  # fmt: skip
        job.variants = [
            VariantRow(id=new_id("var"), tenant_id=TENANT, position=position, name=name,
                       recipe=[], status="queued", progress=0.0, notes=[], artifacts=[])
            for position, name in ((-1, "baseline"), (0, "int8"))
        ]  # fmt: skip
        session.add(job)
        session.flush()
        jobs.start(session, job)
    with database.write() as session:
        jobs.cancel(session, jobs.locked(session, TENANT, job.id))
    with database.write() as session:
        for digest, ready in (("aa", True), ("bb", False)):
            row, _ = uploads.create(
                session, "model", tenant_id=TENANT, name="m", format_="tflite",
                stored=Stored(digest * 32, 1), request_id=None,
            )  # fmt: skip
            if ready:
                uploads.inspected(session, row, {})
                uploads.inspected(session, row, {"notes": []})
            else:
                uploads.refused(session, row, Problem(code="broken", message="It is broken."))
            assert isinstance(row, ModelRow)
    assert len(deliveries(database)) == 4
    told = {row.event: json.loads(row.body) for row in deliveries(database)}
    assert set(told) == {"job.started", "job.finished", "model.ready", "model.invalid"}
    finished = told["job.finished"]["data"]
    assert (finished["id"], finished["status"]) == (job.id, "cancelled")
    assert finished["verdict"] in ("pass", "fail")
    assert [(v["name"], v["status"]) for v in finished["variants"]] == [("int8", "cancelled")]
    assert told["job.started"]["data"]["status"] == "running"
    assert told["model.invalid"]["data"]["error"]["code"] == "broken"
