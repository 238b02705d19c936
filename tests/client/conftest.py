"""A stand-in for the service: the contract's answers without its work, on a free loopback port."""

import copy
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

FILE = b"TFL3 a small file" * 1000


def metrics(size: int, drop: float | None) -> dict[str, Any]:
    return {
        "size_bytes": size,
        "gzip_size_bytes": size // 2,
        "size_ratio": size / 100_000,
        "accuracy": 0.98 - (drop or 0.0),
        "accuracy_drop": drop,
        "accuracy_drop_ci95": None if drop is None else [drop - 0.01, drop + 0.01],
        "samples_evaluated": 360,
        "latency_ms": {
            "p50": 0.02,
            "p90": 0.03,
            "p99": 0.04,
            "mean": 0.02,
            "runs": 50,
            "threads": 1,
        },
        "latency_ratio": 0.6,
    }


def variant(name: str, status: str = "succeeded", drop: float | None = 0.002) -> dict[str, Any]:
    return {
        "id": f"var_{name}",
        "name": name,
        "recipe": [{"technique": name}],
        "status": status,
        "stage": None,
        "progress": 1.0,
        "metrics": metrics(25_000, drop) if status == "succeeded" else None,
        "notes": [{"code": "left_float", "message": "RESIZE_BILINEAR stays float"}],
        "artifacts": [
            {
                "id": f"art_{name}",
                "kind": "tflite",
                "file_name": "model.tflite",
                "sha256": hashlib.sha256(FILE).hexdigest(),
                "size_bytes": len(FILE),
            }
        ]
        if status == "succeeded"
        else [],
        "error": None
        if status == "succeeded"
        else {"code": "collapsed", "message": "One class for all samples", "hint": "Try float16"},
        "cached": False,
    }


class StandIn:
    """The stand-in's state, for tests to arrange and look at."""

    def __init__(self) -> None:
        self.url = ""
        self.uploads: dict[str, dict[str, Any]] = {}
        self.submitted: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failing: set[str] = set()
        self.corrupt = False
        self.jobs: dict[str, dict[str, Any]] = {}
        self.resumed_from: list[str | None] = []
        self.analyzed: list[bytes] = []
        self.upload_headers: dict[str, str] = {}


def problem(status: int, code: str, detail: str, **more: Any) -> JSONResponse:
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    return JSONResponse(
        body | more, status_code=status, headers={"content-type": "application/problem+json"}
    )


def build(state: StandIn) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/analyze")
    async def analyze(request: Request, wait: float, multiple_subgraphs: bool) -> Any:
        content = await request.body()
        state.analyzed.append(content)
        if content.startswith(b"BAD"):
            return problem(422, "not_quantized", "It computes in float", hint="Quantize it")
        op = {"message": "…", "layer": "l"}
        ops = [op | {"index": 0, "name": "CONV_2D", "maps": True, "reason": "mapped"}]
        ops += [
            op | {"index": i, "name": "ELU", "maps": False, "reason": "unsupported_operation"}
            for i in (1, 2)
        ]
        advice = {"reason": "unsupported_operation", "operator": "ELU", "layers": ["l"] * 5,
                  "message": "Replace ELU by RELU"}  # fmt: skip
        memory = {"parameter_bytes": 4000, "on_chip_bytes": 4000, "off_chip_bytes": 0,
                  "on_chip_remaining_bytes": 8_000_000}  # fmt: skip
        failure = {"code": "op_version_unsupported", "message": "Too new", "hint": None}
        return {
            "id": "ana_1",
            "status": "ready" if wait else "analyzing",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
            "target": "edgetpu",
            "compiler": request.query_params["compiler"],
            "ops": ops,
            "mapped": 1,
            "cpu": 2,
            "subgraphs": 2 if multiple_subgraphs else 1,
            "memory": memory,
            "advice": [advice],
            "failure": failure if content.startswith(b"NEW") else None,
        }

    @app.post("/v1/{kind}s", status_code=201)
    async def create(kind: str, request: Request, name: str = "") -> Any:
        if kind == "job":
            return await create_job(request)
        state.upload_headers = dict(request.headers)
        if request.headers.get("content-type") == "application/json":
            state.submitted.append(json.loads(await request.body()))
            name = "of the catalog"
        digest = hashlib.sha256()
        size, head = 0, b""
        async for chunk in request.stream():
            digest.update(chunk)
            size += len(chunk)
            head = head or chunk[:3]
        found = {
            "id": f"{'mdl' if kind == 'model' else 'dat'}_{len(state.uploads)}",
            "name": name,
            "status": "inspecting",
            "sha256": digest.hexdigest(),
            "size_bytes": size,
            "bad": head == b"BAD",
            "future_field": 1,
        }
        state.uploads[found["id"]] = found
        return found

    async def create_job(request: Request) -> Any:
        spec = json.loads(await request.body())
        state.keys.append(request.headers.get("idempotency-key"))
        if "qat" in spec["variants"]:
            return problem(
                422,
                "missing_data",
                "'qat' needs labels",
                hint="Add y to the dataset",
                errors=[{"field": "variants.0", "message": "needs labels"}],
                request_id="req_7",
            )
        state.submitted.append(spec)
        if spec["variants"] == "auto":
            spec = spec | {"variants": ["int8"]}
        done = [
            variant(n, "failed" if n in state.failing else "succeeded") for n in spec["variants"]
        ]
        limit = (spec.get("budgets") or {}).get("max_size_bytes")
        checks = [
            {"variant": n, "budget": "succeeded", "limit": True, "value": True, "passed": True}
            for n in spec["variants"]
        ]
        if limit:
            checks += [
                {"variant": n, "budget": "max_size_bytes", "limit": limit, "value": 25_000,
                 "passed": limit >= 25_000}
                for n in spec["variants"]
            ]  # fmt: skip
        kept = all(check["passed"] for check in checks)
        job = {
            "id": f"job_{len(state.jobs)}",
            "status": "partial" if state.failing else "succeeded",
            "progress": 1.0,
            "model": spec["model"],
            "dataset": spec.get("dataset"),
            "spec": spec,
            "baseline": variant("baseline", drop=None) | {"notes": [], "artifacts": []},
            "variants": done,
            "verdict": {"verdict": "pass" if kept else "fail", "checks": checks},
            "created_at": "2026-01-01T00:00:00Z",
            "started_at": "2026-01-01T00:00:01Z",
            "finished_at": "2026-01-01T00:00:03.500Z",
            "error": None,
            "queue_position": None,
        }
        state.jobs[job["id"]] = job
        queued = copy.deepcopy(job) | {"status": "queued", "progress": 0.0, "finished_at": None}
        return JSONResponse(queued, status_code=202)

    @app.get("/v1/targets")
    def targets() -> Any:
        compiler = {"name": "edgetpu_compiler", "installed": False, "version": None}
        known = {
            "number_formats": ["int8"],
            "options": {"int8": {"integer_only": True}},
            "notes": [],
        }
        return {"items": [
            known | {"id": "cpu", "title": "CPU"},
            known | {"id": "edgetpu", "title": "Coral Edge TPU", "compiler": compiler},
        ]}  # fmt: skip

    @app.get("/v1/catalog")
    def catalog() -> Any:
        return {"items": [
            {"id": "small", "title": "Small", "parameters": 475_544, "accuracy": 0.498,
             "licence": "Apache-2.0"},
        ]}  # fmt: skip

    @app.post("/v1/advise")
    async def advise(request: Request) -> Any:
        state.submitted.append(json.loads(await request.body()))
        expected = {"size_ratio": [0.25, 0.5], "gzip_size_ratio": [0.3, 0.3],
                    "accuracy_drop": [0, 0.01], "latency_ratio": None}  # fmt: skip
        return {
            "recommended": [{"rank": 1, "recipe": "int8", "reasons": ["it is small"],
                             "expected": expected, "needs": ["samples"]}],
            "rejected": [{"recipe": "qat", "why_not": ["nothing to train on"]}],
            "missing": [{"what": "training_data", "message": "Samples.", "would_allow": ["qat"]}],
            "notes": ["no model was named"],
        }  # fmt: skip

    @app.get("/v1/{kind}s")
    def listing(kind: str, limit: int = 50, cursor: int = 0) -> Any:
        prefix = {"model": "mdl_", "dataset": "dat_", "job": "job_"}[kind]
        everything = list(reversed([*state.uploads.values(), *state.jobs.values()]))
        items = [item for item in everything if item["id"].startswith(prefix)]
        page = items[cursor : cursor + limit]
        more = cursor + limit < len(items)
        return {"items": page, "next_cursor": str(cursor + limit) if more else None}

    @app.get("/v1/jobs/{job_id}")
    def one_job(job_id: str) -> Any:
        return state.jobs.get(job_id) or problem(404, "not_found", f"There is no job '{job_id}'.")

    @app.get("/v1/jobs/{job_id}/events")
    def events(job_id: str, request: Request) -> StreamingResponse:
        last = request.headers.get("last-event-id")
        state.resumed_from.append(last)
        names = [v["name"] for v in state.jobs[job_id]["variants"]]
        told: list[tuple[str, dict[str, Any]]] = [("job", {"id": job_id, "status": "running"})]
        told += [
            ("variant", {"name": n, "status": "running", "stage": "quantize", "progress": 0.5})
            for n in names
        ]
        told += [("variant", {"name": n, "status": "succeeded", "progress": 1.0}) for n in names]
        told += [("end", {"status": "succeeded"})]
        start = int(last or 0)
        # The first connection is cut before the end, as a proxy or a restart would.
        stop = 2 if last is None else len(told)

        def stream() -> Iterator[str]:
            yield ": ping\n\n"
            for number, (name, data) in list(enumerate(told, 1))[start:stop]:
                yield f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"

        if last is None and state.jobs[job_id]["status"] != "running":
            state.jobs[job_id]["hidden"] = state.jobs[job_id]["status"]
            state.jobs[job_id]["status"] = "running"
        elif "hidden" in state.jobs[job_id]:
            state.jobs[job_id]["status"] = state.jobs[job_id].pop("hidden")
        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/v1/jobs/{job_id}/verdict")
    def verdict(job_id: str) -> Any:
        found = state.jobs[job_id]["verdict"]
        return JSONResponse(found, status_code=200 if found["verdict"] == "pass" else 412)

    @app.get("/v1/jobs/{job_id}/report")
    def report(job_id: str, format: str) -> Response:
        return Response(f"{format} report of {job_id}\n")

    @app.get("/v1/artifacts/{artifact_id}/content")
    def content(artifact_id: str) -> Response:
        return Response(FILE[:-1] if state.corrupt else FILE)

    @app.get("/v1/{kind}s/{identifier}")
    def one(kind: str, identifier: str) -> Any:
        found = state.uploads.get(identifier)
        if found is None:
            return problem(404, "not_found", f"There is no {kind} '{identifier}'.")
        answer = dict(found)
        found["status"] = "invalid" if found["bad"] else "ready"
        found["error"] = {
            "code": "not_a_model",
            "message": "The file is no model that we know",
            "hint": "Export it with model.save('m.keras')",
        } if found["bad"] else None  # fmt: skip
        return answer

    return app


@pytest.fixture
def service() -> Iterator[StandIn]:
    state = StandIn()
    config = uvicorn.Config(build(state), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    state.url = f"http://127.0.0.1:{port}"
    yield state
    server.should_exit = True
    thread.join(timeout=10)
