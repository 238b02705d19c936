"""What becomes of a job's variants, and of what they need, while and after a stage trains."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select, update
from test_plan import plan

from app import queue, reconciler
from app.config import Settings
from app.db import Database
from app.domain.problems import WorkError
from app.domain.recipes import parse_variant
from app.domain.work import Event
from app.queue import Claim, LeaseLost
from app.services import jobs
from app.storage import Stored, open_storage, store_bytes
from app.tables import JobRow, StepRow, TaskRow, VariantRow, new_id, now
from workers import steps, variants
from workers.lease import Lease
from workers.worker import Made, Worker

TENANT = "default"
Make = Callable[..., Made]
BASELINE = {"metrics": {"size_bytes": 9, "gzip_size_bytes": 8}}
ASKED = ("prune", "prune+int8", "prune+cluster+qat", "cluster", "int8")


def submitted(database: Database, *asked: Any) -> str:
    """A job under way: prepared, with a task for each variant. Returns its id."""
    settled = plan()
    with database.write() as session:
        row = JobRow(
            id=new_id("job"), tenant_id=TENANT, status="running", model_id="mdl_1",
            spec={"model": "mdl_1", "variants": ["prune"]}, event_seq=0,
            plan=settled.model_dump(mode="json"),
        )  # fmt: skip
        found = [parse_variant(one) for one in asked]
        named = [("baseline", []), *((one.name, one.recipe) for one in found)]
        row.variants = [
            VariantRow(
                id=new_id("var"), tenant_id=TENANT, position=position, name=name,
                recipe=[step.model_dump(mode="json") for step in recipe],
                status="queued" if position >= 0 else "succeeded", progress=0.0, notes=[],
                artifacts=[],
            )
            for position, (name, recipe) in enumerate(named, -1)
        ]  # fmt: skip
        session.add(row)
        session.flush()
        for variant, one in zip(jobs.requested(row), found, strict=True):
            name = "train" if one.needs_training else "fast"
            queue.enqueue(session, "variant", variant.id, name, tenant_id=TENANT)
        files = {"float_model": Stored("ab" * 32, 7)}
        steps.complete(session, TENANT, settled.convert_key(), "convert", files, {})
        steps.complete(session, TENANT, settled.baseline_key(), "baseline", {}, BASELINE)
        return row.id


def claimed(database: Database) -> Claim:
    with database.write() as session:
        found = queue.claim(session, "train", "w", 60)
        assert found is not None
        return found


def run(database: Database, folder: Path, make: Make, claim: Claim | None = None) -> None:
    """Have a worker whose children do `make` run the next variant that trains."""
    settings = Settings(data_dir=folder)
    worker = SimpleNamespace(
        settings=settings, database=database, writing=database.write, make=make, compilers={},
        storage=open_storage(settings),
    )  # fmt: skip
    lease = SimpleNamespace(claim=claim or claimed(database))
    variants.variant(cast(Worker, worker), cast(Lease, lease))


def failing(code: str, *, final: bool) -> Make:
    def make(*_: Any, **__: Any) -> Made:
        error = WorkError(code, "It failed.", "Change it.")
        error.final = final
        raise error

    return make


def statuses(database: Database, id_: str) -> dict[str, str]:
    with database.read() as session:
        rows = jobs.requested(jobs.get(session, TENANT, id_))
        return {row.name: str(row.status) for row in rows}


def test_a_stage_that_would_fail_again_is_not_trained_again_by_the_jobs_other_variants(
    database: Database, tmp_path: Path
) -> None:
    other = {"name": "other", "recipe": [{"technique": "prune", "sparsity": 0.9}]}
    id_, another = submitted(database, *ASKED, other), submitted(database, "prune")
    first = claimed(database)
    # It waits for the first; its task must be gone, whoever holds it.
    waiting = claimed(database)
    run(database, tmp_path, failing("training_diverged", final=True), first)
    ended = statuses(database, id_)
    assert {name for name, status in ended.items() if status == "failed"} == set(ASKED[:3])
    assert {ended[name] for name in ("cluster", "int8", "other")} == {"queued"}
    assert statuses(database, another) == {"prune": "queued"}
    with database.read() as session:
        job = jobs.get(session, TENANT, id_)
        rows = {row.name: row for row in jobs.requested(job)}
        assert job.status == "running"
        for name in ASKED[:3]:
            assert rows[name].error == {
                "code": "training_diverged",
                "message": "It failed.",
                "hint": "Change it.",
            }
        left = set(session.scalars(select(TaskRow.subject_id)))
        assert not left & {rows[name].id for name in ASKED[:3]}
        assert {rows["cluster"].id, rows["int8"].id, rows["other"].id} < left
    with pytest.raises(LeaseLost), database.write() as session:
        queue.renew(session, waiting, 60)


def test_a_job_whose_variants_all_share_the_failed_stage_has_ended(
    database: Database, tmp_path: Path
) -> None:
    id_ = submitted(database, "prune", "prune+int8")
    run(database, tmp_path, failing("deadline_exceeded", final=True))
    with database.read() as session:
        job = jobs.get(session, TENANT, id_)
        assert (job.status, job.finished_at is None) == ("failed", False)
        names = [event.name for event in jobs.events_after(session, id_, 0)]
        assert names.count("end") == 1


def test_a_later_stage_takes_only_those_who_share_it(database: Database, tmp_path: Path) -> None:
    id_ = submitted(database, "prune+qat", "prune+cluster", "prune", "qat")
    settled = plan()
    with database.write() as session:
        made = settled.train_key(parse_variant("prune").training)
        storage = open_storage(Settings(data_dir=tmp_path))
        files = {"checkpoint": store_bytes(storage, b"trained")}
        steps.complete(session, TENANT, made, "train", files, {})
    run(database, tmp_path, failing("nothing_to_train", final=True))
    assert statuses(database, id_) == {
        "prune+qat": "failed", "prune+cluster": "queued", "prune": "queued", "qat": "queued",
    }  # fmt: skip


def test_what_befell_a_process_befalls_that_variant_alone(
    database: Database, tmp_path: Path
) -> None:
    id_ = submitted(database, *ASKED)
    run(database, tmp_path, failing("out_of_memory", final=False))
    assert list(statuses(database, id_).values()) == ["failed", *["queued"] * 4]


def test_progress_stands_still_while_what_was_done_is_done_again(
    database: Database, tmp_path: Path
) -> None:
    id_ = submitted(database, "prune")

    def reaching(*shares: float) -> Make:
        def make(lease: Lease, work: Any, inputs: Any, on_event: Any, **_: Any) -> Made:
            for number, share in enumerate(shares):
                on_event(Event(stage=f"stage {number}", progress=share))
            raise LeaseLost

        return make

    for shares in ((0.0, 0.5), (0.0, 0.4, 0.75)):
        with pytest.raises(LeaseLost):
            run(database, tmp_path, reaching(*shares))
        with database.write() as session:
            session.execute(update(TaskRow).values(status="queued"))
    with database.read() as session:
        told = [event.data for event in jobs.events_after(session, id_, 0)]
    seen = [data["progress"] for data in told if data["stage"]]
    assert seen == [0.0, 0.4, 0.4, 0.4, 0.4, 0.6]


def test_what_a_training_needs_is_as_young_as_its_last_stage(
    database: Database, tmp_path: Path
) -> None:
    submitted(database, "prune+qat")
    settled, made = plan(), []

    def make(lease: Lease, work: Any, *_: Any, **__: Any) -> Made:
        made.append(work.kind)
        # Hours later; the cleaning comes while the stage trains.
        with database.write() as session:
            reconciler.clean(session, Settings(data_dir=tmp_path, cache_retention_days=1))
        with database.write() as session:
            kept = set(session.scalars(select(StepRow.key)))
            assert {settled.convert_key(), settled.baseline_key()} <= kept
            session.execute(update(StepRow).values(created_at=now() - timedelta(days=2)))
        if work.kind == "variant":
            raise WorkError("not_finite", "It is enough.")
        files = {"checkpoint": Stored("cd" * 32, 7), "float_model": Stored("ef" * 32, 7)}
        return Made({"tools": {}}, files, {"checkpoint": 7}, 1.0)

    with database.write() as session:
        session.execute(update(StepRow).values(created_at=now() - timedelta(days=2)))
    run(database, tmp_path, make)
    assert made == ["train", "train", "variant"]
