"""Schemathesis: whatever is sent, no answer is a 5xx, and every answer fits its schema."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from running import Service
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_conventions import OPERATIONS

# Enough to find what breaks, few enough for every run.
EXAMPLES = 15


@pytest.fixture(scope="session")
def operations(service: Service) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.definition.raw["operationId"]: operation for operation in found}


POSITIVE = [(operation, GenerationMode.POSITIVE) for operation in sorted(OPERATIONS)]
# Those that take more than an id, in which anything could be wrong.
NEGATIVE = [
    (operation, GenerationMode.NEGATIVE)
    for operation in sorted(OPERATIONS)
    if operation.startswith(("create_", "put_", "list_"))
    or operation in ("get_job", "get_job_report", "get_analysis", "advise")
    if operation not in ("list_techniques", "list_targets", "list_catalog")
]
# No schema tells which bytes are a model, which order is a recipe, or what time it is.
NOT_TOLD_BY_SCHEMA = (
    "create_model", "put_model", "create_dataset", "put_dataset", "create_job",
    "create_analysis", "put_analysis", "advise", "create_key",
)  # fmt: skip


@pytest.mark.parametrize(("operation_id", "mode"), POSITIVE + NEGATIVE)
def test_every_operation_keeps_to_its_schema(
    operations: dict[str, Any], operation_id: str, mode: GenerationMode
) -> None:
    operation = operations[operation_id]
    excluded = [positive_data_acceptance] if operation_id in NOT_TOLD_BY_SCHEMA else []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Case) -> None:
        wait = (case.query or {}).get("wait")
        if isinstance(wait, int | float) and wait > 0:
            case.query["wait"] = min(wait, 0.05)
        case.call_and_validate(timeout=30, excluded_checks=excluded)

    run()
