"""What holds for every resource: errors, pages, idempotency, request ids, CORS, operation ids."""

import json
import re
from typing import Any

import pytest
from running import Service, problem, unique

OPERATIONS = {
    "create_model", "put_model", "list_models", "get_model", "delete_model", "get_model_content",
    "create_dataset", "put_dataset", "list_datasets", "get_dataset", "delete_dataset",
    "get_dataset_content", "create_job", "list_jobs", "get_job", "cancel_job", "retry_job",
    "get_job_events", "get_job_report", "get_job_verdict", "get_job_artifacts",
    "get_artifact", "get_artifact_content", "create_analysis", "put_analysis", "get_analysis",
    "list_techniques", "list_targets", "list_catalog", "advise",
    "create_key", "list_keys", "get_key", "revoke_key", "list_audit",
    "get_health", "get_readiness", "get_metrics",
}  # fmt: skip


def test_operation_ids_are_a_contract(service: Service) -> None:
    schema = service.http.get("/openapi.json").json()
    found = [o["operationId"] for path in schema["paths"].values() for o in path.values()]
    assert len(found) == len(set(found))
    assert set(found) >= OPERATIONS
    assert service.http.get("/docs").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1/nothing", "/v1/models/mdl_0", "/v1/models/x", "/v1/models/%00",
     "/v1/models/' OR 1=1", "/v1/datasets/dat_0", "/v1/jobs/job_0", "/v1/jobs/job_0/events",
     "/v1/jobs/job_0/report", "/v1/jobs/job_0/verdict", "/v1/jobs/job_0/artifacts.zip",
     "/v1/artifacts/art_0", "/v1/artifacts/art_0/content", "/v1/models/" + "x" * 5000,
     "/v1/models/mdl_😀", "/v1/jobs/dat_0?wait=1"],
)  # fmt: skip
def test_what_is_not_there_is_404(service: Service, path: str) -> None:
    problem(service.http.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("DELETE", "/v1/models", "GET, POST, PUT"), ("PATCH", "/v1/models/mdl_0", "DELETE, GET"),
     ("POST", "/healthz", "GET"), ("PUT", "/v1/jobs", "GET, POST"),
     ("GET", "/v1/jobs/job_0/cancel", "POST")],
)  # fmt: skip
def test_other_methods_are_405(service: Service, method: str, path: str, allowed: str) -> None:
    answer = service.http.request(method, path)
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/models?limit=0", 422), ("/v1/models?limit=201", 422), ("/v1/models?limit=x", 422),
     ("/v1/models?cursor=%00", 422), ("/v1/models?cursor=x'", 422), ("/v1/jobs?status=done", 422),
     ("/v1/jobs/job_0?wait=601", 422), ("/v1/jobs/job_0?wait=nan", 422),
     ("/v1/jobs/job_0?wait=-1", 422)],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(service: Service, path: str, status: int) -> None:
    answer = service.http.get(path)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["code"] == "validation_error"
    assert body["errors"][0]["field"]


def test_pages_hold_every_item_once_newest_first(service: Service) -> None:
    made = [
        service.http.post("/v1/datasets", content=unique(f"page {n}")).json()["id"]
        for n in range(5)
    ]
    seen: list[str] = []
    cursor = None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = service.http.get("/v1/datasets", params=params).json()
        assert len(page["items"]) <= 2
        seen += [item["id"] for item in page["items"]]
        if len(seen) == 2:
            # What comes meanwhile shifts no page.
            service.http.post("/v1/datasets", content=unique("page, meanwhile"))
        cursor = page["next_cursor"]
        if cursor is None:
            break
        assert len(page["items"]) == 2
    assert seen == sorted(set(seen), reverse=True)
    assert set(made) <= set(seen)
    assert service.http.get("/v1/datasets?limit=200").json()["next_cursor"] is None


def test_the_same_idempotency_key_gives_the_first_answer(service: Service) -> None:
    headers = {"idempotency-key": "upload-1"}
    first = service.http.post("/v1/datasets", content=unique("key"), headers=headers)
    again = service.http.post("/v1/datasets", content=unique("key"), headers=headers)
    # Without the key, the same bytes would be 200.
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"]
    other = service.http.post("/v1/datasets", content=unique("other"), headers=headers)
    problem(other, 422, "idempotency_key_reused")


def test_a_job_with_a_key_is_one_job(service: Service, model: str, dataset: str) -> None:
    headers = {"idempotency-key": "job-1"}
    spec = {"model": model, "dataset": dataset, "variants": ["float16"]}
    first = service.http.post("/v1/jobs", json=spec, headers=headers)
    again = service.http.post("/v1/jobs?wait=60", json=spec, headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    other = service.http.post("/v1/jobs", json=spec | {"seed": 1}, headers=headers)
    problem(other, 422, "idempotency_key_reused")


def test_a_refused_request_does_not_use_up_its_key(service: Service, model: str) -> None:
    headers = {"idempotency-key": "job-2"}
    spec: dict[str, Any] = {"model": model, "variants": ["int8"]}
    problem(service.http.post("/v1/jobs", json=spec, headers=headers), 422, "missing_data")
    spec["variants"] = ["float16"]
    assert service.http.post("/v1/jobs", json=spec, headers=headers).status_code == 202


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ä"])
def test_keys_are_short_and_printable(service: Service, key: str) -> None:
    headers = {"idempotency-key": key.encode()}
    answer = service.http.post("/v1/datasets", content=unique("k"), headers=headers)
    problem(answer, 422, "validation_error")


def test_request_ids_are_taken_or_made_and_logged(
    service: Service, model: str, dataset: str
) -> None:
    given = {"x-request-id": "from-the-client.1"}
    assert (
        service.http.get("/healthz", headers=given).headers["x-request-id"] == given["x-request-id"]
    )
    made = service.http.get("/healthz").headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-z]{26}", made)
    refused = service.http.get("/healthz", headers={"x-request-id": "bad id\t{}"})
    assert refused.headers["x-request-id"] != "bad id\t{}"
    spec = {"model": model, "dataset": dataset, "variants": ["dynamic_range"]}
    job = service.http.post("/v1/jobs?wait=60", json=spec, headers=given).json()
    assert job["status"] == "succeeded"
    for part in ("api", "worker"):
        lines = [line for line in service.log(part).splitlines() if "from-the-client.1" in line]
        assert lines, part
        assert all(json.loads(line)["request_id"] == "from-the-client.1" for line in lines)
    subjects = {json.loads(line).get("subject_id") for line in lines}
    assert job["id"] in subjects


def test_cors_allows_the_dashboards_that_are_set(service: Service) -> None:
    for origin in ("https://dashboard.example", "https://other.example"):
        answer = service.http.get("/v1/models/x", headers={"origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        preflight = service.http.options(
            "/v1/jobs",
            headers={"origin": origin, "access-control-request-method": "POST",
                     "access-control-request-headers": "content-type,idempotency-key"},
        )  # fmt: skip
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
    stranger = service.http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


def test_the_service_tells_of_itself(service: Service, finished: dict[str, Any]) -> None:
    assert service.http.get("/healthz").json() == {"status": "ok"}
    ready = service.http.get("/readyz")
    assert ready.status_code == 200
    assert set(ready.json()["checks"].values()) == {"ok"}
    assert set(ready.json()["checks"]) == {"database", "schema", "broker", "storage", "worker"}
    metrics = service.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for line in (
        'litesmith_jobs{status="succeeded"}',
        "litesmith_workers 1.0",
        'litesmith_requests_total{method="POST",route="/v1/jobs",status="202"}',
    ):
        assert line in metrics.text


def test_techniques_tell_what_they_need_and_their_options(service: Service) -> None:
    items = service.http.get("/v1/techniques").json()["items"]
    found = {item["id"]: item for item in items}
    assert found.keys() >= {"float16", "dynamic_range", "int8", "int16x8"}
    assert all(item["available"] for item in items)
    for technique, option in (
        ("prune", "sparsity"),
        ("prune", "m_by_n"),
        ("cluster", "clusters"),
        ("qat", "input_type"),
    ):
        assert found[technique]["data_required"].startswith("training samples")
        assert found[technique]["notes"]
        properties = found[technique]["options"]["properties"]
        assert {option, "epochs", "batch_size", "learning_rate", "patience"} <= properties.keys()
