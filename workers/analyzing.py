"""The task that analyzes a file for a target."""

from app import queue
from app.domain.edgetpu import AnalysisOptions
from app.domain.problems import WorkError
from app.domain.work import AnalyzeWork
from app.services import analyses
from app.tables import AnalysisRow
from workers.common import drop, limits
from workers.lease import Lease
from workers.worker import Worker


def analyze(worker: Worker, lease: Lease) -> None:
    claim = lease.claim
    with worker.database.read() as session:
        row = session.get(AnalysisRow, claim.subject_id)
    if row is None or row.status != "analyzing":
        return drop(worker, claim)
    work = AnalyzeWork(file="in/model.tflite", options=AnalysisOptions.model_validate(row.options))
    made, problem = None, None
    try:
        made = worker.make(
            lease,
            work,
            {"model.tflite": row.sha256},
            lambda event: None,
            tensorflow=False,
            limits=limits(worker, None),
            outputs=lambda result: {},
        )
    except WorkError as error:
        problem = error.problem()
    with worker.writing() as session:
        queue.finish(session, claim)
        row = session.get(AnalysisRow, claim.subject_id)
        if row is not None and made is not None:
            analyses.analyzed(row, made.result)
        elif row is not None and problem is not None:
            analyses.refused(row, problem)
    return None
