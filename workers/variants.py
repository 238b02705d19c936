"""The task that makes one variant, measures it and delivers it."""

import gzip
import json
from typing import Any

from app import queue
from app.domain.jobs import TERMINAL, JobSpec, Status
from app.domain.problems import WorkError
from app.domain.recipes import Variant
from app.domain.work import VARIANT_FILE, VariantWork
from app.queue import Claim
from app.services import jobs, tasks
from app.services.tasks import lock_job
from app.storage import Stored, store_bytes
from app.tables import JobRow, StepRow, VariantRow
from workers import steps, training
from workers.common import (
    data_source,
    deliver,
    float_model,
    intact,
    latency,
    limits,
    model_source,
    plan_of,
    progress,
    target_work,
)
from workers.lease import Lease
from workers.plan import Plan, calibration_options
from workers.training import StageFailed, Trained
from workers.worker import Made, Worker, storing

BUSY_S = 0.3


def variant(worker: Worker, lease: Lease) -> None:
    claim = lease.claim
    intact(worker, claim.tenant_id, _reused(worker, claim))
    with worker.writing() as session:
        job = lock_job(session, claim.kind, claim.subject_id)
        queue.renew(session, claim, worker.settings.lease_s)
        row = session.get(VariantRow, claim.subject_id)
        if job is None or row is None or row.status in TERMINAL:
            queue.finish(session, claim)
            return
        plan, spec = plan_of(worker, job), JobSpec.model_validate(job.spec)
        asked = jobs.variant_of(row)
        key = plan.variant_key(asked)
        standing = steps.acquire(session, claim, key, "variant")
        if standing == "busy":
            queue.postpone(session, claim, BUSY_S)
            return
        if standing == "ready":
            queue.finish(session, claim)
            step = session.get_one(StepRow, (claim.tenant_id, key))
            deliver(session, row, plan, step, cached=True)
            jobs.settle(session, job)
            return
        # Before anybody is told that it runs: it may wait for a training for hours.
        if training.acquire(session, claim, plan, asked)[1] == "busy":
            queue.postpone(session, claim, training.BUSY_S)
            return
        row.status = Status.running
        jobs.emit_variant(session, row)
    try:
        trained = None
        if asked.needs_training:
            trained = training.train(worker, lease, plan, spec, asked)
            if trained is None:
                return
        _make_variant(worker, lease, plan, spec, asked, trained)
    except WorkError as error:
        with worker.writing() as session:
            job = lock_job(session, claim.kind, claim.subject_id)
            queue.finish(session, claim)
            if job is not None and isinstance(error, StageFailed):
                training.fail_sharers(session, job, claim.subject_id, plan, error)
            tasks.give_up(session, claim.kind, claim.subject_id, error.problem())


def _reused(worker: Worker, claim: Claim) -> list[str]:
    """Keys of the results that the variant would reuse, were they there: itself, its training."""
    with worker.database.read() as session:
        row = session.get(VariantRow, claim.subject_id)
        job = session.get(JobRow, row.job_id) if row is not None else None
        if row is None or job is None or row.status in TERMINAL:
            return []
        plan, asked = plan_of(worker, job), jobs.variant_of(row)
    stages = range(1, len(asked.training) + 1)
    return [plan.variant_key(asked), *(plan.train_key(asked.training[:n]) for n in stages)]


def _make_variant(
    worker: Worker,
    lease: Lease,
    plan: Plan,
    spec: JobSpec,
    asked: Variant,
    trained: Trained | None,
) -> None:
    """Make the file from the float model, trained or as it came, and measure it."""
    claim = lease.claim
    options = calibration_options(asked)
    calibration = plan.calibration_for(asked)
    with worker.database.read() as session:
        base = steps.needed(session, claim.tenant_id, plan.baseline_key())
        files: dict[str, Stored | None] = {"float32.tflite": float_model(session, claim, plan)}
        if "baseline_outputs" in base.files:
            files["baseline_outputs.npz"] = steps.file_of(base, "baseline_outputs")
        if options is not None:
            row = steps.needed(session, claim.tenant_id, plan.calibration_key(options))
            files["calibration.npz"] = steps.file_of(row, "ranges")
    if trained is not None:
        files["trained.tflite"] = trained.file("float_model")
        files["learned_ranges.npz"] = trained.file("learned_ranges")
    inputs = {name: file.sha256 for name, file in files.items() if file is not None}
    if calibration is not None:
        inputs["calibration"] = calibration.sha256
    if plan.evaluation is not None:
        inputs["evaluation"] = plan.evaluation.sha256
    if asked.needs_tensorflow:
        checkpoint = trained.file("checkpoint") if trained else None
        inputs["model"] = checkpoint.sha256 if checkpoint else plan.model_sha256

    def given(name: str) -> str | None:
        return f"in/{name}" if name in inputs else None

    work = VariantWork.model_validate(
        {
            "name": asked.name,
            "recipe": [step.model_dump() for step in asked.recipe],
            "float_model": given("trained.tflite") or given("float32.tflite"),
            "original": given("float32.tflite") if trained else None,
            "effects": trained.effects if trained else [],
            "learned_ranges": given("learned_ranges.npz"),
            "baseline_metrics": base.data["metrics"],
            "baseline_outputs": given("baseline_outputs.npz"),
            "calibration": given("calibration.npz"),
            "calibration_data": data_source(calibration, "calibration", plan),
            "evaluation_data": data_source(plan.evaluation, "evaluation", plan),
            "model": model_source(plan) if asked.needs_tensorflow else None,
            "target": target_work(worker, plan, asked),
            "evaluation": plan.evaluation_settings,
            "latency": latency(worker, plan),
        }
    )
    made = worker.make(
        lease,
        work,
        inputs,
        progress(
            worker, lease, claim.subject_id, training.TRAINING_SHARE if trained is not None else 0.0
        ),
        tensorflow=asked.needs_tensorflow,
        limits=limits(worker, spec),
        outputs=_outputs,
        # That of the .tflite is among its metrics.
        gzipped=lambda name: name != "tflite",
    )
    _keep_variant(worker, claim, plan, asked, made, trained)


def _outputs(result: dict[str, Any]) -> dict[str, str]:
    """Which of the child's files to keep: those for a target under their path."""
    return {"tflite": VARIANT_FILE} | {f["path"]: f["path"] for f in result["target_files"]}


def _keep_variant(
    worker: Worker, claim: Claim, plan: Plan, asked: Variant, made: Made, trained: Trained | None
) -> None:
    result, files = made.result, dict(made.files)
    stages = trained.in_manifest() if trained else []
    manifest = plan.manifest(asked, files["tflite"].sha256, result["tools"], stages)
    text = json.dumps(manifest, indent=2, sort_keys=True).encode()
    with storing():
        files["manifest"] = store_bytes(worker.storage, text)
    gzip_sizes = made.gzip_sizes | {
        "tflite": result["metrics"]["gzip_size_bytes"],
        "manifest": len(gzip.compress(text, 9, mtime=0)),
    }
    notes = result["notes"]
    if trained is not None:
        last = trained.stages[-1]
        files["keras"] = steps.file_of(last, "checkpoint")
        gzip_sizes["keras"] = last.data["gzip_sizes"]["checkpoint"]
        notes = [*trained.notes, *notes]
    data = {
        "metrics": result["metrics"],
        "notes": list({(note["code"], note["message"]): note for note in notes}.values()),
        "tools": result["tools"],
        "seconds": made.seconds,
        "training": trained.told if trained else [],
        "target_files": result["target_files"],
        "gzip_sizes": gzip_sizes,
    }
    with worker.writing() as session:
        job = lock_job(session, claim.kind, claim.subject_id)
        queue.finish(session, claim)
        if job is None:
            return
        row = session.get_one(VariantRow, claim.subject_id)
        key = plan.variant_key(asked)
        step = steps.complete(session, claim.tenant_id, key, "variant", files, data)
        now = trained.made_now if trained else frozenset()
        deliver(session, row, plan, step, cached=False, trained_now=now)
        jobs.settle(session, job)
