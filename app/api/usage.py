"""/v1/usage"""

from fastapi import APIRouter

from app.api.deps import Tenant, TheParts
from app.services import quotas
from app.services.quotas import Usage

router = APIRouter(prefix="/v1/usage", tags=["usage"])


@router.get("", operation_id="get_usage")
def get_usage(parts: TheParts, tenant: Tenant) -> Usage:
    """What you use, and the limits; null is no limit."""
    with parts.database.read() as session:
        return quotas.usage(session, parts.settings, tenant)
