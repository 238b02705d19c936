"""Quotas and back-pressure on both databases: what is refused, with what to do next."""

import threading
from datetime import timedelta
from typing import Any

import pytest

from app.config import Settings
from app.db import Database
from app.errors import ServiceError
from app.services import quotas
from app.tables import ArtifactRow, JobRow, ModelRow, PartialRow, QuotaRow, VariantRow, new_id, now


def job(database: Database, tenant: str = "a", status: str = "queued", **more: Any) -> str:
    with database.write() as session:
        row = JobRow(id=new_id("job"), tenant_id=tenant, status=status, model_id="m", spec={},
                     event_seq=0, **more)  # fmt: skip
        session.add(row)
    return row.id


def admit(database: Database, tenant: str = "a", *, new: bool = True, **settings: Any) -> None:
    with database.write() as session:
        quotas.admit_job(session, Settings(**settings), tenant, new=new)


def refused(
    database: Database, status: int, code: str, tenant: str = "a", **settings: Any
) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        admit(database, tenant, **settings)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.hint
    return caught.value


def test_jobs_of_the_day(database: Database) -> None:
    for _ in range(2):
        admit(database, tenant_max_jobs_per_day=2)
    error = refused(database, 429, "quota_exceeded", tenant_max_jobs_per_day=2)
    assert "2 of 2" in error.detail
    assert 0 < int(error.headers["Retry-After"]) <= 86_400
    # Another tenant, a retry, and the next day are not touched by it.
    admit(database, "b", tenant_max_jobs_per_day=2)
    admit(database, new=False, tenant_max_jobs_per_day=2)
    with database.write() as session:
        session.get_one(QuotaRow, "a").day = "2001-01-01"
    admit(database, tenant_max_jobs_per_day=2)
    with database.read() as session:
        assert quotas.usage(session, Settings(), "a").used.jobs_today == 1


def test_jobs_submitted_at_once_count_one_another(database: Database) -> None:
    outcomes: list[str] = []

    def submit() -> None:
        try:
            admit(database, tenant_max_jobs_per_day=3)
            outcomes.append("taken")
        except ServiceError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["quota_exceeded"] * 5 + ["taken"] * 3


def test_concurrent_jobs(database: Database) -> None:
    job(database)
    job(database, status="running")
    job(database, status="succeeded")
    job(database, "b")
    error = refused(database, 429, "quota_exceeded", tenant_max_concurrent_jobs=2)
    assert "2 of 2" in error.detail
    assert int(error.headers["Retry-After"]) > 0
    admit(database, tenant_max_concurrent_jobs=3)


def test_a_full_queue_says_when_to_come_back(database: Database) -> None:
    for _ in range(4):
        job(database)
    assert refused(database, 503, "busy", max_queued_jobs=4).headers["Retry-After"] == "60"
    # Twenty jobs ended in the last ten minutes, so that one does every 30 seconds.
    for _ in range(20):
        job(database, "b", status="failed", finished_at=now() - timedelta(minutes=5))
    assert refused(database, 503, "busy", max_queued_jobs=4).headers["Retry-After"] == "30"
    assert refused(database, 503, "busy", max_queued_jobs=3).headers["Retry-After"] == "60"
    error = refused(database, 429, "queue_full", tenant_max_queued_jobs=4)
    assert error.headers["Retry-After"] == "60"
    admit(database, "b", tenant_max_queued_jobs=4)


def test_storage_counts_the_same_bytes_once(database: Database) -> None:
    owner = job(database, status="succeeded")
    with database.write() as session:
        for tenant, digest, size in (("a", "11", 100), ("b", "11", 100), ("b", "22", 5)):
            session.add(
                ModelRow(id=new_id("mdl"), tenant_id=tenant, name="m", format="tflite",
                         sha256=digest, size_bytes=size)
            )  # fmt: skip
        variant = VariantRow(id=new_id("var"), tenant_id="a", job_id=owner, position=0, name="v",
                             recipe=[])  # fmt: skip
        for kind, digest, size in (("tflite", "33", 30), ("keras", "11", 100)):
            variant.artifacts.append(
                ArtifactRow(id=new_id("art"), tenant_id="a", job_id=owner, kind=kind, file_name="f",
                            sha256=digest, size_bytes=size, gzip_size_bytes=1)
            )  # fmt: skip
        session.add(variant)
    with database.read() as session:
        assert quotas.storage_bytes(session, "a") == 130
        settings = Settings(tenant_max_storage_bytes=150)
        quotas.check_storage(session, settings, "a", 20, what="this")
        with pytest.raises(ServiceError) as caught:
            quotas.check_storage(session, settings, "a", 21, what="this model")
    assert (caught.value.status, caught.value.code) == (507, "quota_exceeded")
    assert "130 of 150" in caught.value.detail
    refused(database, 507, "quota_exceeded", tenant_max_storage_bytes=130)
    admit(database, tenant_max_storage_bytes=131)


def test_uploads_under_way_count_as_announced(database: Database) -> None:
    with database.write() as session:
        for tenant, became in (("a", None), ("a", "mdl_1"), ("b", None)):
            session.add(
                PartialRow(id=new_id("upl"), tenant_id=tenant, kind="model", length=100,
                           upload_metadata="", subject_id=became, expires_at=now())
            )  # fmt: skip
    with database.read() as session:
        assert quotas.storage_bytes(session, "a") == 100
        with pytest.raises(ServiceError, match="100 of 150"):
            quotas.check_storage(
                session, Settings(tenant_max_storage_bytes=150), "a", 51, what="this"
            )


def test_a_tenants_own_limits_win(database: Database) -> None:
    job(database)
    with database.write() as session:
        quotas.set_limits(session, "a", {"max_concurrent_jobs": quotas.UNLIMITED})
        quotas.set_limits(session, "b", {"max_jobs_per_day": 0})
    admit(database, tenant_max_concurrent_jobs=1)
    refused(database, 429, "quota_exceeded", "b")
    with database.write() as session:
        quotas.set_limits(session, "a", {"max_concurrent_jobs": None})
        quotas.set_limits(session, "b", {"max_storage_bytes": 7})
    refused(database, 429, "quota_exceeded", tenant_max_concurrent_jobs=1)
    with database.read() as session:
        usage = quotas.usage(session, Settings(tenant_max_queued_jobs=9), "b")
    assert usage.limits == quotas.Limits(
        max_storage_bytes=7, max_concurrent_jobs=None, max_jobs_per_day=0, max_queued_jobs=9
    )
