"""The task that prepares a job: makes what its variants share, and releases them."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import queue
from app.domain.formats import ModelFormat
from app.domain.jobs import TERMINAL, JobSpec, Status
from app.domain.options import CalibrationOptions
from app.domain.problems import Problem, WorkError
from app.domain.recipes import Variant
from app.domain.work import (
    BASELINE_OUTPUTS,
    FLOAT_MODEL,
    PrepareWork,
    calibration_file,
)
from app.errors import ServiceError
from app.queue import Claim
from app.services import jobs, planning, tasks
from app.services.tasks import lock_job
from app.storage import Stored
from app.tables import JobRow, StepRow, VariantRow
from workers import steps
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
    succeed,
)
from workers.lease import Lease
from workers.plan import Plan, calibration_options, settle
from workers.worker import Made, Worker

BUSY_S = 0.3
INSPECTING_S = 1.0


def prepare(worker: Worker, lease: Lease) -> None:
    claim = lease.claim
    with worker.writing() as session:
        job = lock_job(session, claim.kind, claim.subject_id)
        queue.renew(session, claim, worker.settings.lease_s)
        if job is None or job.status in TERMINAL:
            queue.finish(session, claim)
            return
        plan = _plan(worker, session, claim, job)
        if plan is None:
            return
        spec, variants = JobSpec.model_validate(job.spec), _open_variants(job)
        standing = _acquire_shared(session, claim, plan, variants)
        if "busy" in standing.values():
            queue.postpone(session, claim, BUSY_S)
            return
        reused = [key for key, state in standing.items() if state == "ready"]
        reused += [plan.variant_key(variant) for variant in variants]
    if not intact(worker, claim.tenant_id, reused):
        # What was found is not there any more: see anew what there is to make.
        with worker.writing() as session:
            queue.postpone(session, claim, 0.0)
        return
    try:
        problems = {}
        if "mine" in standing.values():
            problems = _make_shared(worker, lease, plan, spec, standing)
        _release_variants(
            worker, lease, plan, problems, baseline_reused=plan.baseline_key() in reused
        )
    except WorkError as error:
        with worker.writing() as session:
            lock_job(session, claim.kind, claim.subject_id)
            queue.finish(session, claim)
            tasks.give_up(session, claim.kind, claim.subject_id, error.problem())


def _plan(worker: Worker, session: Session, claim: Claim, job: JobRow) -> Plan | None:
    """The job's plan; None where the task was ended or postponed instead."""
    spec = JobSpec.model_validate(job.spec)
    try:
        files = jobs.files_of(session, job.tenant_id, spec)
        if files.inspecting:
            queue.postpone(session, claim, INSPECTING_S)
            return None
        variants = planning.parse_variants(spec)
        planning.check(spec, variants, files)
    except ServiceError as error:
        queue.finish(session, claim)
        problem = Problem(code=error.code, message=error.detail, hint=error.hint)
        jobs.fail(session, job, problem)
        return None
    sources, job.splits = planning.plan_sources(spec, files, variants)
    plan = settle(
        spec,
        model=(files.model.sha256, files.model.format, files.model.name),
        input_shapes=planning.fixed_shapes(spec, files),
        sources=sources,
        time_limit_s=worker.settings.evaluation_time_limit_s,
        threads=worker.settings.evaluation_threads,
    )
    job.plan = plan.model_dump(mode="json")
    jobs.start(session, job)
    return plan_of(worker, job)


def _open_variants(job: JobRow) -> list[Variant]:
    return [jobs.variant_of(row) for row in jobs.requested(job) if row.status not in TERMINAL]


def _acquire_shared(
    session: Session, claim: Claim, plan: Plan, variants: list[Variant]
) -> dict[str, str]:
    """Key -> standing of each step that the job's variants share: convert first."""
    wanted = {plan.convert_key(): "convert", plan.baseline_key(): "baseline"}
    for variant in variants:
        options = calibration_options(variant)
        made = steps.ready(session, claim.tenant_id, plan.variant_key(variant))
        if options is not None and made is None:
            wanted[plan.calibration_key(options)] = "calibrate"
    # In one order for all: who waits for a step that another has just taken must hold none that
    # the other wants next.
    return {key: steps.acquire(session, claim, key, wanted[key]) for key in sorted(wanted)}


@dataclass(frozen=True)
class _Shared:
    """The steps that are this task's to make; `calibrate`: key -> options of the ranges."""

    convert: bool
    baseline: bool
    calibrate: dict[str, CalibrationOptions]

    @property
    def steps(self) -> list[str]:
        asked = {
            "convert": self.convert,
            "baseline": self.baseline,
            "calibrate": bool(self.calibrate),
        }
        return [step for step, wanted in asked.items() if wanted]

    def outputs(self, result: dict[str, Any]) -> dict[str, str]:
        """Which of the child's files to keep: name -> path."""
        found = {"float_model": FLOAT_MODEL} if self.convert else {}
        if result["baseline_outputs"]:
            found["baseline_outputs"] = BASELINE_OUTPUTS
        return found | {
            key: calibration_file(index)
            for index, key in enumerate(self.calibrate)
            if result["calibrations"][index] is not None
        }


def _make_shared(
    worker: Worker, lease: Lease, plan: Plan, spec: JobSpec, standing: dict[str, str]
) -> dict[str, Problem]:
    """Run the steps that are this task's to make in one child, and keep what it made. Returns why
    ranges could not be collected, by key: that ends only the variants that need them."""
    claim = lease.claim
    mine = [key for key, state in standing.items() if state == "mine"]
    with worker.database.read() as session:
        job = session.get_one(JobRow, claim.subject_id)
        found = [calibration_options(variant) for variant in _open_variants(job)]
        options = {plan.calibration_key(o): o for o in found if o is not None}
        shared = _Shared(
            plan.convert_key() in mine,
            plan.baseline_key() in mine,
            {key: options[key] for key in mine if key in options},
        )
        inputs = _inputs(plan, shared)
        if not shared.convert:
            inputs["float32.tflite"] = float_model(session, claim, plan).sha256
        baseline_id = jobs.baseline(job).id
    made = worker.make(
        lease,
        _work(worker, plan, shared),
        inputs,
        progress(worker, lease, baseline_id),
        tensorflow=shared.convert and plan.model_format is not ModelFormat.tflite,
        limits=limits(worker, spec),
        outputs=shared.outputs,
    )
    with worker.writing() as session:
        queue.renew(session, claim, worker.settings.lease_s)
        _keep_shared(session, claim, plan, shared, made)
    problems = zip(shared.calibrate, made.result["calibration_problems"], strict=True)
    return {key: Problem.model_validate(p) for key, p in problems if p is not None}


def _inputs(plan: Plan, shared: _Shared) -> dict[str, str]:
    inputs = {"model": plan.model_sha256} if shared.convert else {}
    if shared.baseline and plan.evaluation:
        inputs["evaluation"] = plan.evaluation.sha256
    if shared.calibrate and plan.calibration:
        inputs["calibration"] = plan.calibration.sha256
    return inputs


def _work(worker: Worker, plan: Plan, shared: _Shared) -> PrepareWork:
    evaluation = plan.evaluation if shared.baseline else None
    calibration = plan.calibration if shared.calibrate else None
    return PrepareWork.model_validate(
        {
            "steps": shared.steps,
            "model": model_source(plan),
            "float_model": FLOAT_MODEL if shared.convert else "in/float32.tflite",
            "evaluation_data": data_source(evaluation, "evaluation", plan),
            "calibration_data": data_source(calibration, "calibration", plan),
            "calibrations": list(shared.calibrate.values()),
            "evaluation": plan.evaluation_settings,
            "latency": latency(worker, plan),
        }
    )


def _keep_shared(session: Session, claim: Claim, plan: Plan, shared: _Shared, made: Made) -> None:
    tools = {"tools": made.result["tools"]}
    files = made.files

    found: dict[str, tuple[str, dict[str, Stored], dict[str, Any]]] = {
        key: ("calibrate", {"ranges": files[key]}, tools)
        for key in shared.calibrate.keys() & files.keys()
    }
    if shared.convert:
        found[plan.convert_key()] = ("convert", {"float_model": files["float_model"]}, tools)
    if shared.baseline:
        outputs = {n: files[n] for n in ("baseline_outputs",) if n in files}
        figures = {
            "metrics": made.result["baseline_metrics"],
            "notes": made.result["notes"],
            "seconds": made.seconds,
        }
        found[plan.baseline_key()] = ("baseline", outputs, tools | figures)
    # In the order in which they are acquired: two jobs that lock crosswise would both wait.
    for key in sorted(found):
        steps.complete(session, claim.tenant_id, key, *found[key])


def _release_variants(
    worker: Worker,
    lease: Lease,
    plan: Plan,
    problems: dict[str, Problem],
    *,
    baseline_reused: bool,
) -> None:
    """End the preparation: baseline's figures, reused variants, and a task for each other one but
    those whose ranges could not be collected."""
    claim = lease.claim
    with worker.database.read() as session:
        model = float_model(session, claim, plan)
    with worker.writing() as session:
        job = lock_job(session, claim.kind, claim.subject_id)
        queue.finish(session, claim)
        if job is None:
            return
        row = jobs.baseline(job)
        step = session.get_one(StepRow, (claim.tenant_id, plan.baseline_key()))
        if row.status != Status.succeeded:
            succeed(session, row, step, cached=baseline_reused)
            name = f"{plan.stem}-float32.tflite"
            jobs.add_artifact(
                session, row, "tflite", name, model, step.data["metrics"]["gzip_size_bytes"]
            )
        for row in jobs.requested(job):
            if row.status in TERMINAL:
                continue
            asked = jobs.variant_of(row)
            options = calibration_options(asked)
            problem = problems.get(plan.calibration_key(options)) if options else None
            ready = steps.ready(session, claim.tenant_id, plan.variant_key(asked), hold=True)
            if ready is not None:
                deliver(session, row, plan, ready, cached=True)
            elif problem is not None:
                jobs.fail_variant(session, row, problem)
            else:
                _enqueue_variant(session, job, row)
        jobs.settle(session, job)


def _enqueue_variant(session: Session, job: JobRow, row: VariantRow) -> None:
    queue.enqueue(
        session,
        "variant",
        row.id,
        "train" if jobs.variant_of(row).needs_training else "fast",
        tenant_id=job.tenant_id,
        priority=job.priority,
        request_id=job.request_id,
    )
