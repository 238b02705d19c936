"""The steps of a variant that train: made one after another, each once for all who need it.

What a step leaves is kept by the key of all that led to it (Plan.train_key): other recipes that
begin alike go on from it, and so does a variant that was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import queue
from app.domain.jobs import ACTIVE, JobSpec
from app.domain.problems import WorkError
from app.domain.recipes import Training, Variant
from app.domain.work import (
    CHECKPOINT,
    FLOAT_MODEL,
    LEARNED_RANGES,
    TrainResult,
    TrainWork,
)
from app.queue import Claim
from app.services import jobs
from app.services.tasks import lock_job
from app.storage import Stored
from app.tables import JobRow, StepRow
from workers import steps
from workers.common import data_source, float_model, limits, model_source, progress
from workers.lease import Lease
from workers.plan import Plan
from workers.steps import Standing
from workers.worker import Made, Worker

# Who makes the stage wakes those who wait for it; this is for a maker that failed.
BUSY_S = 5.0
# Of a variant's progress; what is left is for making the file and measuring it.
TRAINING_SHARE = 0.8


class StageFailed(WorkError):
    """Training by `steps`, one after another, ends so whoever asks for it."""

    def __init__(self, steps: Sequence[Training], error: WorkError) -> None:
        super().__init__(error.code, error.message, error.hint)
        self.log_tail = error.log_tail
        self.steps = steps


@dataclass(frozen=True)
class Trained:
    """The stages that a recipe's training has left, and the numbers of those made just now."""

    stages: list[StepRow]
    made_now: frozenset[int]

    @property
    def effects(self) -> list[dict[str, Any]]:
        """Of the whole training: each stage tells those of the stages before it as well."""
        effects: list[dict[str, Any]] = self.stages[-1].data["effects"]
        return effects

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [note for stage in self.stages for note in stage.data["notes"]]

    @property
    def told(self) -> list[dict[str, Any]]:
        """Each stage as the api tells it."""
        return [stage.data["stage"] for stage in self.stages]

    def file(self, name: str) -> Stored | None:
        """A file of the last stage: "checkpoint", "float_model", perhaps "learned_ranges"."""
        last = self.stages[-1]
        return steps.file_of(last, name) if name in last.files else None

    def in_manifest(self) -> list[dict[str, Any]]:
        names = ("technique", "samples", "epochs", "best_epoch", "distilled")
        return [
            {name: stage.data["stage"][name] for name in names}
            | {"checkpoint": stage.files["checkpoint"]["sha256"], "tools": stage.data["tools"]}
            for stage in self.stages
        ]


def acquire(
    session: Session, claim: Claim, plan: Plan, asked: Variant
) -> tuple[list[StepRow], Standing]:
    """The stages that are there, from the first on, and the standing of the next one; "ready" when
    all are there."""
    found: list[StepRow] = []
    for number in range(1, len(asked.training) + 1):
        key = plan.train_key(asked.training[:number])
        standing = steps.acquire(session, claim, key, "train")
        if standing != "ready":
            return found, standing
        found.append(session.get_one(StepRow, (claim.tenant_id, key)))
    return found, "ready"


def train(
    worker: Worker, lease: Lease, plan: Plan, spec: JobSpec, asked: Variant
) -> Trained | None:
    """Make the stages that are missing, and return all of them; None where another task is making
    one: this one was postponed until that is there. Raises WorkError; StageFailed where the stage
    would fail again."""
    claim = lease.claim
    made_now: set[int] = set()
    while True:
        with worker.writing() as session:
            lock_job(session, claim.kind, claim.subject_id)
            queue.renew(session, claim, worker.settings.lease_s)
            found, standing = acquire(session, claim, plan, asked)
            if standing == "busy":
                queue.postpone(session, claim, BUSY_S)
                return None
            # A stage may take hours: what the preparation left must outlive it.
            steps.keep(session, claim.tenant_id, [plan.convert_key(), plan.baseline_key()])
        if standing == "ready":
            return Trained(found, frozenset(made_now))
        try:
            _make_stage(worker, lease, plan, spec, asked, found)
        except WorkError as error:
            if not error.final:
                raise
            raise StageFailed(asked.training[: len(found) + 1], error) from error
        made_now.add(len(found))


def _make_stage(
    worker: Worker, lease: Lease, plan: Plan, spec: JobSpec, asked: Variant, before: list[StepRow]
) -> None:
    """Train by the step that follows the stages `before`, and keep what it leaves: from here on it
    is there, whatever becomes of this task."""
    claim, number = lease.claim, len(before)
    step = asked.training[number]
    if plan.training is None:
        raise ValueError(f"the plan has no training data for '{asked.name}'")
    with worker.database.read() as session:
        inputs = {
            "float32.tflite": float_model(session, claim, plan).sha256,
            "training": plan.training.sha256,
            "model": plan.model_sha256,
        }
    if before:
        inputs["model"] = steps.file_of(before[-1], "checkpoint").sha256
    work = TrainWork.model_validate(
        {
            "step": step,
            "before": asked.training[:number],
            "model": model_source(plan),
            "teacher": "in/float32.tflite",
            "training_data": data_source(plan.training, "training", plan),
            "settings": plan.training_settings,
        }
    )
    share = TRAINING_SHARE / len(asked.training)
    made = worker.make(
        lease,
        work,
        inputs,
        progress(worker, lease, claim.subject_id, number * share, (number + 1) * share),
        tensorflow=True,
        limits=limits(worker, spec, training=True),
        outputs=_outputs,
        gzipped=lambda name: name == "checkpoint",
    )
    data = _told(step.technique, made)
    with worker.writing() as session:
        lock_job(session, claim.kind, claim.subject_id)
        queue.renew(session, claim, worker.settings.lease_s)
        key = plan.train_key(asked.training[: number + 1])
        steps.complete(session, claim.tenant_id, key, "train", made.files, data)


def fail_sharers(
    session: Session, job: JobRow, own_id: str, plan: Plan, failed: StageFailed
) -> None:
    """End the job's variants but `own_id` that need the stage that failed: each would spend the
    same time on the same end. A retry of the job starts them again."""
    key, count = plan.train_key(failed.steps), len(failed.steps)
    sharers = [
        row
        for row in jobs.requested(job)
        if row.id != own_id
        and row.status in ACTIVE
        and len(begun := jobs.variant_of(row).training[:count]) == count
        and plan.train_key(begun) == key
    ]
    queue.drop(session, "variant", [row.id for row in sharers])
    for row in sharers:
        jobs.fail_variant(session, row, failed.problem())


def _outputs(result: dict[str, Any]) -> dict[str, str]:
    files = {"checkpoint": CHECKPOINT, "float_model": FLOAT_MODEL}
    return files | ({"learned_ranges": LEARNED_RANGES} if result["learned_ranges"] else {})


def _told(technique: str, made: Made) -> dict[str, Any]:
    result = TrainResult.model_validate(made.result)
    stage = {
        "technique": technique,
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch,
        "samples": result.samples,
        "distilled": result.distilled,
        "seconds": made.seconds,
        "history": [epoch.model_dump() for epoch in result.epochs],
    }
    return {
        "stage": stage,
        "effects": [effect.model_dump() for effect in result.effects],
        "notes": [note.model_dump() for note in result.notes],
        "tools": result.tools,
        "gzip_sizes": made.gzip_sizes,
    }
