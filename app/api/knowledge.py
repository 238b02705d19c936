"""What is known, and what it advises: /v1/techniques, /v1/targets, /v1/catalog, /v1/advise"""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.api.deps import Tenant, TheParts
from app.api.spec import from_json, json_body
from app.domain.advise import Advice
from app.domain.catalog import CATALOG, CatalogModel
from app.domain.targets import PROFILES, Compiler, TargetProfile
from app.domain.techniques import TECHNIQUES, Technique
from app.services import advice
from app.services.advice import AdviseRequest
from app.services.workers import compilers_seen

router = APIRouter(prefix="/v1", tags=["knowledge"])


class Techniques(BaseModel):
    items: list[Technique]


class Targets(BaseModel):
    items: list[TargetProfile]


class Catalog(BaseModel):
    items: list[CatalogModel]


@router.get("/techniques", operation_id="list_techniques")
def list_techniques() -> Techniques:
    """Each technique: data it needs, what it saves and costs, its options as JSON Schema."""
    return Techniques(items=list(TECHNIQUES))


@router.get("/targets", operation_id="list_targets")
def list_targets(parts: TheParts) -> Targets:
    """Each target: recipes it takes, options it needs, what is measured, its compiler."""
    with parts.database.read() as session:
        installed = compilers_seen(session)
    return Targets(items=[_equipped(profile, installed) for profile in PROFILES.values()])


def _equipped(profile: TargetProfile, installed: Mapping[str, str]) -> TargetProfile:
    if profile.compiler is None:
        return profile
    version = installed.get(profile.compiler.name)
    told = Compiler(name=profile.compiler.name, installed=version is not None, version=version)
    return profile.model_copy(update={"compiler": told})


@router.get("/catalog", operation_id="list_catalog")
def list_catalog() -> Catalog:
    """Models to start from, with parameters, published accuracy, licence and source."""
    return Catalog(items=list(CATALOG.values()))


# Read by hand, as a job's spec: `curl -d` names no JSON.
ADVISE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/AdviseRequest"}}},
    }
}


@router.post("/advise", operation_id="advise", openapi_extra=ADVISE_BODY)
async def advise(request: Request, parts: TheParts, tenant: Tenant) -> Advice:
    """Every recipe, recommended best first with reasons and expected figures, or rejected."""
    asked = from_json(AdviseRequest, await json_body(request), {})

    def answer() -> Advice:
        with parts.database.read() as session:
            return advice.advise(session, tenant, asked)

    return await run_in_threadpool(answer)
