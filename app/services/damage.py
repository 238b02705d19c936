"""What follows when a stored file is found damaged or gone: nothing is made from it any more."""

import logging

from sqlalchemy import String, cast, delete
from sqlalchemy.orm import Session

from app.tables import StepRow

log = logging.getLogger(__name__)


def forget(session: Session, digest: str) -> None:
    """Forget the results kept for reuse that hold this file, of any tenant: each is made anew when
    it is needed next, which replaces the file. An upload is repaired by uploading it again."""
    holding = cast(StepRow.files, String).contains(digest)
    forgotten = session.execute(
        delete(StepRow)
        .where(holding)
        .returning(StepRow.key)
        .execution_options(synchronize_session=False, all_tenants=True)
    ).all()
    log.error("stored file damaged or gone", extra={"sha256": digest, "steps": len(forgotten)})
