"""Everything of a job in one zip, made while it is sent."""

from collections.abc import Mapping
from datetime import datetime

from zipstream import ZIP_STORED, ZipStream

from app.storage import Storage, verified
from app.tables import JobRow


def of_job(storage: Storage, job: JobRow, texts: Mapping[str, str]) -> ZipStream:
    """A zip with the job's artifacts, a folder a variant, and the given texts: its bytes when it is
    iterated over, its size by `len`. It breaks off where a file is damaged or gone."""
    stream = ZipStream(compress_type=ZIP_STORED, sized=True)
    for row in job.variants:
        for artifact in row.artifacts:
            content = verified(
                storage.read(artifact.sha256, 0, artifact.size_bytes), artifact.sha256
            )
            stream.add(content, f"{row.name}/{artifact.file_name}", size=artifact.size_bytes)
    for name, text in texts.items():
        stream.add(text.encode(), name)
    stream.comment = f"{job.id} {datetime.isoformat(job.created_at)}"
    return stream
