"""What becomes of a task's subject when the task itself cannot be finished."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain.jobs import TERMINAL
from app.domain.problems import Problem
from app.services import analyses, jobs, uploads, webhooks
from app.tables import AnalysisRow, DeliveryRow, JobRow, VariantRow


def lock_job(session: Session, kind: str, subject_id: str) -> JobRow | None:
    """The job that a task belongs to, its row locked until the transaction ends.

    To be called before the task itself is written: a cancel locks the job first and its tasks
    then, and who takes two locks in the other order waits for it as it waits for them.
    """
    job_id: str | None = subject_id
    if kind == "variant":
        job_id = session.scalar(select(VariantRow.job_id).where(VariantRow.id == subject_id))
    elif kind != "prepare":
        return None
    statement = select(JobRow).where(JobRow.id == job_id).with_for_update()
    return session.scalar(statement.execution_options(populate_existing=True))


def give_up(session: Session, kind: str, subject_id: str, problem: Problem) -> None:
    """End the subject of a task with a problem; nothing where it is gone or has ended."""
    if kind in ("inspect_model", "inspect_dataset"):
        row = uploads.find(session, kind.removeprefix("inspect_"), subject_id)
        if row is not None and row.status == "inspecting":
            uploads.refused(session, row, problem)
        return
    if kind == "analyze":
        analysis = session.get(AnalysisRow, subject_id)
        if analysis is not None and analysis.status == "analyzing":
            analyses.refused(analysis, problem)
        return
    if kind == "deliver":
        delivery = session.get(DeliveryRow, subject_id)
        if delivery is not None and delivery.status == "pending":
            webhooks.abandon(delivery, problem.message)
        return
    job = lock_job(session, kind, subject_id)
    if job is None or job.status in TERMINAL:
        return
    if kind == "prepare":
        jobs.fail(session, job, problem)
        return
    variant = session.get_one(VariantRow, subject_id)
    if variant.status not in TERMINAL:
        jobs.fail_variant(session, variant, problem)
        jobs.settle(session, job)
