"""Jobs over HTTP: what is refused and why, reuse, events, waiting, one curl."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from running import Files, Service, npz, problem, until


def events(service: Service, job: str, last: int | None = None) -> list[tuple[int, str, Any]]:
    """The whole event stream: (id, event, data); returns when the service ends it."""
    headers = {"last-event-id": str(last)} if last is not None else {}
    with service.http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(_parsed(answer.iter_lines()))


def _parsed(lines: Iterator[str]) -> Iterator[tuple[int, str, Any]]:
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield int(fields["id"]), fields["event"], json.loads(fields["data"])
            fields = {}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"variants": []}, "validation_error", "variants"),
    ({"variants": ["int8"] * 51}, "validation_error", "variants"),
    ({"variants": "int8"}, "validation_error", "variants"),
    ({"variants": ["int8"], "unknown": 1}, "validation_error", "unknown"),
    ({"variants": ["int8"], "budgets": {"max_size": 1}}, "validation_error", "budgets.max_size"),
    ({"variants": ["int8"], "seed": -1}, "validation_error", "seed"),
    ({"variants": ["int8"], "seed": 1.5}, "validation_error", "seed"),
    ({"variants": ["int8"], "priority": "urgent"}, "validation_error", "priority"),
    ({"variants": ["int8"], "target": "tpu"}, "validation_error", "target"),
    ({"variants": ["int8"], "evaluation": {"max_samples": 0}}, "validation_error", "evaluation"),
    ({"variants": ["int8"], "limits": {"deadline_s": 0}}, "validation_error", "limits.deadline_s"),
    ({"variants": ["int4"]}, "invalid_recipe", "variants.0"),
    ({"variants": ["float16", "int8+prune"]}, "invalid_recipe", "variants.1"),
    ({"variants": ["int8+int8"]}, "invalid_recipe", "variants.0"),
    ({"variants": [{"recipe": [{"technique": "int8", "bits": 4}]}]}, "invalid_recipe", "variants"),
    ({"variants": [{"name": "../x", "recipe": ["int8"]}]}, "invalid_recipe", "variants.0"),
    ({"variants": ["int8", "int8"]}, "duplicate_variant", "variants.1"),
    ({"variants": [{"name": "baseline", "recipe": ["int8"]}]}, "duplicate_variant", "variants.0"),
    ({"model": "mdl_0", "variants": ["int8"]}, "unknown_model", "model"),
    ({"model": "x'; --", "variants": ["int8"]}, "unknown_model", "model"),
    ({"dataset": "dat_0", "variants": ["int8"]}, "unknown_dataset", "dataset"),
    ({"dataset": None, "variants": ["float16", "int8"]}, "missing_data", "variants.1"),
    ({"dataset": None, "variants": ["float16"], "budgets": {"max_accuracy_drop": 0.1}},
     "missing_data", "budgets.max_accuracy_drop"),
    ({"variants": [{"recipe": [{"technique": "int8", "engine": "converter"}]}]},
     "impossible_recipe", "variants.0"),
    ({"variants": ["int8", "prune+int8"]}, "not_trainable", "variants.1"),
    ({"variants": [{"recipe": [{"technique": "prune", "sparsity": 1}]}]}, "invalid_recipe",
     "variants.0.recipe.0.prune.sparsity"),
    ({"variants": [{"recipe": [{"technique": "prune", "sparse_encoding": True}, "qat"]}]},
     "invalid_recipe", "variants.0"),
    ({"variants": [{"recipe": ["prune", {"technique": "cluster", "clusters": 2}]}]},
     "invalid_recipe", "variants.0"),
    ({"variants": ["int8"], "training": {"epochs": 0}}, "validation_error", "training.epochs"),
    ({"variants": ["int8"], "training": {"sparsity": 0.5}}, "validation_error", "training"),
    ({"variants": ["int8"], "training": {"distill": "maybe"}}, "validation_error",
     "training.distill"),
    ({"variants": ["int8"], "input_shapes": {"y": [1, 64]}}, "unknown_input", "input_shapes.y"),
    ({"variants": ["int8"], "input_shapes": {"x": [1, 63]}}, "shape_mismatch", "input_shapes.x"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "code", "field"), REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    service: Service, model: str, dataset: str, spec: dict[str, Any], code: str, field: str
) -> None:
    asked = {"model": model, "dataset": dataset} | spec
    answer = service.http.post("/v1/jobs", json={k: v for k, v in asked.items() if v is not None})
    body = problem(answer, 422, code)
    assert body["errors"][0]["field"].startswith(field), body
    assert body["errors"][0]["message"]


def test_missing_data_names_the_variant_and_the_way_out(service: Service, model: str) -> None:
    spec = {"model": model, "variants": ["float16", {"name": "tiny", "recipe": ["int8"]}]}
    body = problem(service.http.post("/v1/jobs", json=spec), 422, "missing_data")
    assert "'tiny'" in body["detail"]
    assert "calibration_dataset" in body["hint"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b"null", 422),
        (b'"x"', 422),
        (b'{"model": "m", "variants": ["int8"], "budgets": {"max_size_ratio": NaN}}', 422),
        (b'{"model": "m", "variants": ["int8"], "preprocessing": {"scale": 1e999}}', 422),
        (b'{"model": "\\u0000", "variants": ["int8"]}', 422),
        (b'{"model": "\\ud800", "variants": ["int8"]}', 422),
        (b'{"model": "m", "variants": [{"recipe": [{"technique": "int8", "x": '
         + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}]}]}", 422),
        (b'{"model": "m", "variants": [{"recipe": [{"technique": "int8", '
         + b'"exclude": ["a{99999999999999999999}"]}]}]}', 422),
        (b'{"model": "m", "variants": ["int8"], "x": "' + b"x" * 2**20 + b'"}', 413),
    ],
)  # fmt: skip
def test_bodies_that_are_no_spec(service: Service, body: bytes, status: int) -> None:
    answer = service.http.post("/v1/jobs", content=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["code"]


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"x": np.zeros((8, 63), np.float32)}, "shape_mismatch"),
        ({"x": np.zeros((8, 8, 8), np.float32)}, "shape_mismatch"),
        ({"x": np.ones((8, 64), np.float32), "y": np.arange(8) + 5}, "labels_out_of_range"),
        ({"x": np.ones((8, 64), np.float32), "y": np.arange(8) - 1}, "labels_out_of_range"),
    ],
)
def test_data_that_does_not_fit_the_model(
    service: Service, model: str, arrays: dict[str, Any], code: str
) -> None:
    data = service.upload("dataset", npz(**arrays))["id"]
    spec = {"model": model, "dataset": data, "variants": ["int8"]}
    body = problem(service.http.post("/v1/jobs", json=spec), 422, code)
    assert body["errors"][0]["field"] == "dataset"
    assert body["hint"]


def test_labels_of_the_training_split_alone_judge_no_accuracy(service: Service, model: str) -> None:
    x = np.zeros((20, 64), np.float32)
    data = service.upload("dataset", npz(x_train=x, y_train=np.arange(20) % 10, x_test=x + 1))
    spec = {"model": model, "dataset": data["id"], "variants": ["float16"]}
    asked = spec | {"budgets": {"max_accuracy_drop": 0.01}}
    problem(service.http.post("/v1/jobs", json=asked), 422, "missing_data")


def test_unlabelled_data_calibrates_but_judges_no_accuracy(
    service: Service, model: str, files: Files
) -> None:
    data = service.upload("dataset", files.unlabelled)["id"]
    spec: dict[str, Any] = {"model": model, "dataset": data, "variants": ["int8"]}
    asked = spec | {"budgets": {"max_accuracy_drop": 0.01}}
    problem(service.http.post("/v1/jobs", json=asked), 422, "missing_data")
    job = service.run(**spec, budgets={"min_agreement": 0.9})
    assert job["status"] == "succeeded", job
    metrics = job["variants"][0]["metrics"]
    assert metrics["accuracy"] is None
    assert metrics["agreement"] > 0.9
    assert metrics["sqnr_db"] > 20
    assert job["verdict"]["verdict"] == "pass"


def test_data_found_invalid_while_the_job_waits_fails_it_with_the_cause(
    service: Service, model: str
) -> None:
    """Submitted before the inspection; what is wrong is known only after it."""
    bad = npz(x=np.ones((7, 63), np.float32), y=np.arange(7))
    data = service.http.post("/v1/datasets", content=bad).json()
    answer = service.http.post(
        "/v1/jobs?wait=60", json={"model": model, "dataset": data["id"], "variants": ["int8"]}
    )
    if answer.status_code == 422:  # the inspection was faster
        problem(answer, 422, "shape_mismatch")
        return
    job = answer.json()
    assert job["status"] == "failed"
    assert job["error"]["code"] == "shape_mismatch"
    assert job["variants"][0]["error"]["code"] == "shape_mismatch"
    problem(service.http.post(f"/v1/jobs/{job['id']}/retry"), 422, "shape_mismatch")


def test_lists_are_filtered(service: Service, finished: dict[str, Any], model: str) -> None:
    page = service.http.get("/v1/jobs", params={"status": "succeeded", "model": model}).json()
    assert finished["id"] in [item["id"] for item in page["items"]]
    assert {item["status"] for item in page["items"]} == {"succeeded"}
    nothing = service.http.get("/v1/jobs", params={"model": "mdl_0\0"}).json()
    assert nothing == {"items": [], "next_cursor": None}


def test_what_was_made_before_is_reused(service: Service, finished: dict[str, Any]) -> None:
    spec = finished["spec"]
    again = service.run(**spec)
    assert again["id"] != finished["id"]
    for before, now in zip(
        [finished["baseline"], *finished["variants"]],
        [again["baseline"], *again["variants"]],
        strict=True,
    ):
        assert now["cached"] is True
        assert now["artifacts"][0]["sha256"] == before["artifacts"][0]["sha256"]
        assert now["metrics"] == before["metrics"]
    other = service.run(**(spec | {"variants": [{"name": "renamed", "recipe": ["int8"]}]}))
    assert other["variants"][0]["cached"] is True
    assert "renamed" in other["variants"][0]["artifacts"][0]["file_name"]


def test_two_jobs_at_once_make_a_step_once(service: Service, model: str, dataset: str) -> None:
    spec = {"model": model, "dataset": dataset, "variants": ["int8"], "seed": 77}
    first, second = service.submit(**spec), service.submit(**spec)
    jobs = [service.job(one["id"], wait=60) for one in (first, second)]
    assert [one["status"] for one in jobs] == ["succeeded", "succeeded"]
    assert sorted(one["variants"][0]["cached"] for one in jobs) == [False, True]
    digests = {one["variants"][0]["artifacts"][0]["sha256"] for one in jobs}
    assert len(digests) == 1


def test_events_come_in_order_resume_and_end(service: Service, finished: dict[str, Any]) -> None:
    found = events(service, finished["id"])
    assert [id_ for id_, _, _ in found] == [*range(1, len(found) + 1)]
    assert found[0][1:] == ("job", {"id": finished["id"], "status": "queued", "progress": 0.0})
    assert found[-1][1] == "end"
    assert found[-1][2]["status"] == "succeeded"
    assert [name for _, name, _ in found].count("end") == 1
    stages = {data["stage"] for _, name, data in found if name == "variant"}
    assert {"quantize", "evaluate"} <= stages
    assert events(service, finished["id"], last=len(found) - 3) == found[-3:]
    assert events(service, finished["id"], last=len(found)) == []
    assert events(service, finished["id"], last=10**18) == []


def test_events_are_live(service: Service, model: str, dataset: str) -> None:
    job = service.submit(model=model, dataset=dataset, variants=["int8"], seed=99)
    found = events(service, job["id"])
    assert found[-1][1] == "end"
    assert service.job(job["id"])["status"] == "succeeded"


def established(process: psutil.Process) -> list[Any]:
    return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]


def test_waiters_leave_nothing_behind(service: Service, model: str, dataset: str) -> None:
    """Readers that give up in the middle cost no thread, and the service answers on."""
    job, child = service.hang(model=model, dataset=dataset, variants=["dynamic_range"], seed=5)
    api = next(p for p in service.worker().parent().children() if "api" in p.cmdline())
    for _ in range(20):
        with service.http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            next(answer.iter_lines())
        service.http.get(f"/v1/jobs/{job['id']}?wait=0.01")
    waiters = [
        threading.Thread(target=service.job, args=(job["id"], 30), daemon=True) for _ in range(10)
    ]
    for waiter in waiters:
        waiter.start()
    assert service.http.get("/healthz").status_code == 200
    assert service.http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
    for waiter in waiters:
        waiter.join(10)
    assert not any(waiter.is_alive() for waiter in waiters)
    # The one that these tests keep open, and none of those that have gone.
    until(lambda: len(established(api)) <= 1, "the connections of those who left are closed")
    until(lambda: not child.is_running() or child.status() == "zombie", "the child is gone")


def test_wait_answers_when_the_time_is_up(service: Service, model: str, dataset: str) -> None:
    spec: dict[str, Any] = {"model": model, "dataset": dataset, "variants": ["dynamic_range"]}
    job, child = service.hang(**spec, seed=6)
    started = time.monotonic()
    job = service.job(job["id"], wait=0.3)
    assert time.monotonic() - started >= 0.3
    assert job["status"] in ("queued", "running")
    verdict = service.http.get(f"/v1/jobs/{job['id']}/verdict")
    problem(verdict, 409, "not_finished")
    problem(service.http.delete(f"/v1/models/{model}"), 409, "in_use")
    problem(service.http.delete(f"/v1/datasets/{dataset}"), 409, "in_use")
    waiting = service.submit(**spec, seed=7)
    assert service.job(waiting["id"])["queue_position"] in (0, 1)
    child.resume()
    for id_ in (job["id"], waiting["id"]):
        assert service.job(id_, wait=60)["status"] == "succeeded"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_one_curl_does_it_all(service: Service, files: Files) -> None:
    command = [
        "curl", "-sS", "--fail", "-w", "%{http_code}", "-F", f"model=@{files.tflite}",
        "-F", f"dataset=@{files.npz}", "-F", 'spec={"variants":["int8"]}',
        f"{service.url}/v1/jobs?wait=60",
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert out.returncode == 0, out.stderr
    assert out.stdout.endswith("202")
    job = json.loads(out.stdout[:-3])
    assert job["status"] == "succeeded"
    verdict = f"{service.url}/v1/jobs/{job['id']}/verdict"
    assert subprocess.run(["curl", "-s", "--fail", verdict], capture_output=True).returncode == 0


def test_the_form_is_checked_part_by_part(service: Service, files: Files) -> None:
    def post(parts: dict[str, Any], **texts: str) -> Any:
        return service.http.post("/v1/jobs", files=parts, data=texts)

    content = files.tflite.read_bytes()
    spec = '{"variants":["float16"]}'
    problem(post({"model": content}), 422, "missing_spec")
    problem(post({"other": content}, spec=spec), 422, "unknown_part")
    no_file = post({"spec": ("spec.json", spec)}, model="m.tflite")
    assert "model=@" in problem(no_file, 422, "unknown_part")["hint"]
    problem(post({"model": content}, spec="{"), 400, "invalid_json")
    problem(post({"model": b"no model"}, spec=spec), 415, "unsupported_format")
    problem(post({"model": content}, spec='{"variants":["int8"]}'), 422, "missing_data")
    as_file = post({"model": content, "spec": ("spec.json", spec)})
    assert as_file.status_code == 202


def test_a_deleted_job_is_gone_and_what_others_have_stays(
    service: Service, model: str, dataset: str, finished: dict[str, Any]
) -> None:
    job = service.run(model=model, dataset=dataset, variants=["float16"])
    (mine,) = [a for v in job["variants"] for a in v["artifacts"] if a["kind"] == "tflite"]
    assert service.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    for path in (f"jobs/{job['id']}", f"artifacts/{mine['id']}", f"jobs/{job['id']}/events"):
        problem(service.http.get(f"/v1/{path}"), 404, "not_found")
    problem(service.http.delete(f"/v1/jobs/{job['id']}"), 404, "not_found")
    theirs = [a for v in finished["variants"] for a in v["artifacts"]]
    (same,) = [a for a in theirs if a["sha256"] == mine["sha256"]]
    assert service.http.get(f"/v1/artifacts/{same['id']}/content").status_code == 200
