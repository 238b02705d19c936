"""/v1/artifacts"""

from fastapi import APIRouter, Request, Response

from app.api.content import stream_object
from app.api.deps import Tenant, TheParts, one
from app.api.models import BYTES
from app.api.schemas import ArtifactRead
from app.tables import ArtifactRow, VariantRow

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])


@router.get("/{id}", operation_id="get_artifact", name="get_artifact")
def get_artifact(parts: TheParts, tenant: Tenant, id: str) -> ArtifactRead:
    with parts.database.read() as session:
        row = one(session, ArtifactRow, tenant, "artifact", id)
        return ArtifactRead.of(row, session.get_one(VariantRow, row.variant_id))


@router.head("/{id}/content", include_in_schema=False)
@router.get(
    "/{id}/content", operation_id="get_artifact_content", response_class=Response, responses=BYTES
)
def get_artifact_content(request: Request, parts: TheParts, tenant: Tenant, id: str) -> Response:
    """The file, with ETag, Range and Content-Digest."""
    with parts.database.read() as session:
        row = one(session, ArtifactRow, tenant, "artifact", id)
    return stream_object(request, parts.storage, row.sha256, row.size_bytes, row.file_name)
