"""What the tasks share: limits, sources, progress, delivery, the end of a stopped task."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy.orm import Session

from app import queue
from app.db import AWAY
from app.domain.formats import ModelFormat
from app.domain.jobs import TERMINAL, JobSpec, Status
from app.domain.metrics import Metrics
from app.domain.problems import WorkError
from app.domain.recipes import Variant
from app.domain.targets import PROFILES
from app.domain.work import DataSource, Event, LatencySettings, ModelSource, TargetWork
from app.queue import Claim
from app.services import damage, jobs
from app.services.tasks import lock_job
from app.storage import Stored, is_intact
from app.tables import JobRow, StepRow, VariantRow
from workers import steps
from workers.compilers import EDGETPU, find_edgetpu
from workers.lease import Lease
from workers.plan import Plan, Source
from workers.runner import Limits
from workers.worker import Worker

log = logging.getLogger(__name__)

# Written at most this often: progress is for people. The longer the work, the less often, so that
# hours of training leave a thousand events and not a hundred thousand.
PROGRESS_S = 0.3
PROGRESS_SHARE = 0.005
CHECKPOINT_SUFFIXES = {
    ModelFormat.keras: ".keras",
    ModelFormat.h5: ".h5",
    ModelFormat.saved_model: ".zip",
}


def drop(worker: Worker, claim: Claim) -> None:
    """End a task whose subject is gone or has ended."""
    with worker.writing() as session:
        queue.finish(session, claim)


def intact(worker: Worker, tenant_id: str, keys: Iterable[str]) -> bool:
    """Whether every file of those of these results that are there has its digest. A result of which
    one has not is forgotten: it is made anew instead of handed on."""
    with worker.database.read() as session:
        rows = [row for key in keys if (row := steps.ready(session, tenant_id, key)) is not None]
    files = {steps.file_of(row, name) for row in rows for name in row.files}
    damaged = [file for file in files if not is_intact(worker.storage, file)]
    if damaged:
        with worker.writing() as session:
            for file in damaged:
                damage.forget(session, file.sha256)
    return not damaged


def limits(worker: Worker, spec: JobSpec | None, *, training: bool = False) -> Limits:
    settings = worker.settings
    deadline = settings.train_deadline_s if training else settings.variant_deadline_s
    memory = settings.variant_memory_bytes
    if spec is not None:
        deadline = min(deadline, spec.limits.deadline_s or deadline)
        memory = min(memory, spec.limits.memory_bytes or memory)
    return Limits(deadline, memory, settings.variant_disk_bytes)


def model_source(plan: Plan) -> ModelSource:
    """`in/model`: the model as it came, or a checkpoint of it, which has the same format."""
    return ModelSource(
        file="in/model",
        format=plan.model_format,
        input_shapes=plan.input_shapes,
        fixed_batch=plan.fixed_batch,
    )


def plan_of(worker: Worker, job: JobRow) -> Plan:
    """A prepared job's plan, as this worker is equipped."""
    plan = Plan.model_validate(job.plan)
    return plan.model_copy(update={"compilers": worker.compilers})


def target_work(worker: Worker, plan: Plan, asked: Variant) -> TargetWork | None:
    """What is to be made for the job's target; None where that is the .tflite alone."""
    if PROFILES[plan.target].compiler is None:
        return None
    version = worker.compilers.get(EDGETPU)
    executable = find_edgetpu(worker.settings.edgetpu_compiler) if version else None
    if version is not None and executable is None:
        # A prediction must not be kept as what the compiler made.
        raise WorkError(
            "compiler_not_installed",
            f"The Edge TPU compiler {version}, which this worker had when it started, is gone.",
            "Install it again or restart the worker, then retry the job.",
        )
    return TargetWork(
        id=plan.target,
        options=plan.target_options,
        executable=executable,
        version=version,
        c_name=plan.c_name(asked),
    )


def data_source(source: Source | None, name: str, plan: Plan) -> DataSource | None:
    if source is None:
        return None
    return DataSource(
        file=f"in/{name}",
        format=source.format,
        part=source.part,
        preprocessing=plan.preprocessing,
    )


def float_model(session: Session, claim: Claim, plan: Plan) -> Stored:
    row = steps.needed(session, claim.tenant_id, plan.convert_key())
    return steps.file_of(row, "float_model")


def latency(worker: Worker, plan: Plan) -> LatencySettings:
    return plan.latency.model_copy(update={"lock_file": str(worker.settings.latency_lock)})


def progress(
    worker: Worker, lease: Lease, variant_id: str, low: float = 0.0, high: float = 1.0
) -> Callable[[Event], None]:
    """Writes progress to the variant's row: each new stage, epoch or score at once, the rest now
    and then. The work's own 0..1 is `low`..`high` of the variant's."""
    last: tuple[object, ...] = ()
    started = time.monotonic()
    written = 0.0

    def on_event(event: Event) -> None:
        nonlocal last, written
        at, training = time.monotonic(), event.training
        mark = (event.stage, training and training.epoch, training and training.score)
        if mark == last and at - written < max(PROGRESS_S, (at - started) * PROGRESS_SHARE):
            return
        last, written = mark, at
        try:
            write(event)
        except AWAY:
            # No reason to end hours of work: the lease says when to stop.
            log.warning("progress not written: the database is away")

    def write(event: Event) -> None:
        with worker.writing() as session:
            lock_job(session, lease.claim.kind, lease.claim.subject_id)
            queue.renew(session, lease.claim, worker.settings.lease_s)
            row = session.get_one(VariantRow, variant_id)
            if row.status in TERMINAL:
                return
            row.status = Status.running
            # A stage that begins again, after its worker died, stands still until it is as far.
            done = round(low + (high - low) * event.progress, 4)
            row.stage, row.progress = event.stage, max(row.progress, done)
            jobs.emit_variant(session, row, event.message, event.training)

    return on_event


def succeed(
    session: Session,
    row: VariantRow,
    step: StepRow,
    *,
    cached: bool,
    training: Sequence[dict[str, Any]] = (),
) -> None:
    own = 0.0 if cached else step.data["seconds"]
    jobs.succeed_variant(
        session,
        row,
        Metrics.model_validate(step.data["metrics"]),
        step.data["notes"],
        training=training,
        cached=cached,
        seconds=round(own + sum(stage["seconds"] for stage in training), 3),
    )


def deliver(
    session: Session,
    row: VariantRow,
    plan: Plan,
    step: StepRow,
    *,
    cached: bool,
    trained_now: frozenset[int] = frozenset(),
) -> None:
    """A made variant becomes this row's: figures and artifacts. `trained_now`: which of its stages
    were trained for it, by number; the others were made before."""
    name = f"{plan.stem}-{row.name.replace('+', '-')}"
    suffixes = {
        "tflite": ".tflite",
        "manifest": ".manifest.json",
        "keras": CHECKPOINT_SUFFIXES.get(plan.model_format, ""),
    }
    for kind, suffix in suffixes.items():
        if kind in step.files:
            gzip_size, file = step.data["gzip_sizes"][kind], steps.file_of(step, kind)
            jobs.add_artifact(session, row, kind, f"{name}{suffix}", file, gzip_size)
    for made in step.data.get("target_files", []):
        file_name = made["file_name"] or f"{name}{made['suffix']}"
        gzip_size, file = step.data["gzip_sizes"][made["path"]], steps.file_of(step, made["path"])
        jobs.add_artifact(session, row, made["kind"], file_name, file, gzip_size)
    training = []
    for number, stage in enumerate(step.data["training"]):
        now = number in trained_now
        seconds = stage["seconds"] if now else 0.0
        training.append(stage | {"cached": not now, "seconds": seconds})
    succeed(session, row, step, cached=cached, training=training)
