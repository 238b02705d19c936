"""Work that fails, dies, hangs or is cancelled in a real service: that variant alone ends so.

A child is made to hang by stopping the one spare that the next variant takes; what the variants
share was made before by the fixture `finished`, so that they are all there is to do.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import Files, Service, problem, until

Hanging = Callable[..., tuple[dict[str, Any], psutil.Process]]


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def hanging(service: Service, model: str, dataset: str, finished: dict[str, Any]) -> Hanging:
    """Starts a job of variants "first" and "second" that nobody made yet, whose first hangs."""

    def start(**spec: Any) -> tuple[dict[str, Any], psutil.Process]:
        # Patterns that match no layer but make the recipes new.
        recipes = [
            {"technique": "dynamic_range", "exclude": [f"{time.time()}-{name}"]}
            for name in ("first", "second")
        ]
        asked = [
            {"name": name, "recipe": [recipe]}
            for name, recipe in zip(("first", "second"), recipes, strict=True)
        ]
        return service.hang(model=model, dataset=dataset, variants=asked, **spec)

    return start


def first_failed_alone(service: Service, id_: str, code: str) -> dict[str, Any]:
    job = service.job(id_, wait=60)
    assert job["status"] == "partial", job
    first, second = job["variants"]
    assert (first["status"], second["status"]) == ("failed", "succeeded")
    assert first["artifacts"] == []
    assert first["metrics"] is None
    error: dict[str, Any] = first["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["hint"]
    assert job["verdict"]["verdict"] == "fail"
    return error


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGTERM])
def test_a_child_that_dies_fails_its_variant_alone(
    service: Service, hanging: Hanging, number: signal.Signals
) -> None:
    job, child = hanging()
    child.send_signal(number)
    child.resume()
    error = first_failed_alone(service, job["id"], "child_crashed")
    if number == signal.SIGSEGV:
        assert "SIGSEGV" in error["message"]


def test_what_a_killed_child_did_is_done_again(service: Service, hanging: Hanging) -> None:
    """SIGKILL may come from anybody: unlike a crash, it says nothing about the file."""
    job, child = hanging()
    child.kill()
    ended = service.job(job["id"], wait=60)
    assert ended["status"] == "succeeded", ended
    assert service.http.get(f"/v1/jobs/{job['id']}/events").text.count("event: end") == 1


def test_a_child_that_hangs_ends_at_its_deadline_and_a_retry_makes_that_variant_alone(
    service: Service, hanging: Hanging
) -> None:
    job, child = hanging(limits={"deadline_s": 5})
    error = first_failed_alone(service, job["id"], "deadline_exceeded")
    assert "5 s" in error["message"]
    assert gone(child)
    before = service.job(job["id"])
    assert service.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
    after = service.job(job["id"], wait=60)
    assert after["status"] == "succeeded"
    assert after["verdict"]["verdict"] == "pass"
    assert after["variants"][0]["error"] is None
    assert after["variants"][1] == before["variants"][1]
    assert after["baseline"] == before["baseline"]
    # A retried job has an end in the middle of its events, and one at their end.
    text = service.http.get(f"/v1/jobs/{job['id']}/events").text
    assert text.count("event: end") == 2


def test_a_cancel_stops_what_runs_and_what_waits(service: Service, hanging: Hanging) -> None:
    job, child = hanging()
    path = f"/v1/jobs/{job['id']}"
    assert service.http.post(f"{path}/cancel").status_code == 202
    cancelled = service.job(job["id"], wait=5)
    until(lambda: gone(child), "its child is gone")
    assert cancelled["status"] == "cancelled"
    assert [variant["status"] for variant in cancelled["variants"]] == ["cancelled"] * 2
    assert cancelled["finished_at"]
    problem(service.http.post(f"{path}/cancel"), 409, "already_finished")
    assert service.http.get(f"{path}/verdict").status_code == 412
    assert service.http.get(f"{path}/events").text.count("event: end") == 1
    assert service.http.post(f"{path}/retry").status_code == 202
    again = service.job(job["id"], wait=60)
    assert again["status"] == "succeeded", again


def test_a_cancel_while_it_prepares(service: Service, model: str, files: Files) -> None:
    data = service.upload("dataset", files.unlabelled)["id"]
    asked = {"model": model, "dataset": data, "variants": ["int8"], "seed": 31}
    job, child = service.hang(**asked)
    # Who has the same to prepare waits for it.
    other = service.submit(**asked)
    assert service.job(job["id"])["status"] == "running"
    service.http.post(f"/v1/jobs/{job['id']}/cancel")
    ended = service.job(job["id"], wait=5)
    assert ended["status"] == "cancelled"
    assert ended["baseline"]["status"] == "cancelled"
    until(lambda: gone(child), "its child is gone")
    assert service.job(other["id"], wait=60)["status"] == "succeeded"


def test_a_cancel_of_a_job_that_waits(service: Service, hanging: Hanging, model: str) -> None:
    running, child = hanging()
    waiting = service.submit(model=model, variants=["float16"], seed=17)
    assert service.http.post(f"/v1/jobs/{waiting['id']}/cancel").json()["status"] == "cancelled"
    assert service.job(waiting["id"])["started_at"] is None
    child.resume()
    assert service.job(running["id"], wait=60)["status"] == "succeeded"


def test_a_job_may_be_lost_with_its_worker_but_is_not(service: Service, hanging: Hanging) -> None:
    """kill -9 of the worker: no child outlives it; another worker ends the job."""
    job, child = hanging()
    worker = service.worker()
    children = worker.children()
    assert child in children
    worker.kill()
    until(lambda: all(gone(process) for process in children), "no child is left", 10)
    ended = service.job(job["id"], wait=90)
    assert ended["status"] == "succeeded", ended
    assert service.worker().pid != worker.pid
    assert service.http.get(f"/v1/jobs/{job['id']}/events").text.count("event: end") == 1


def test_too_little_memory_fails_with_the_way_out(
    service: Service, demo_files: tuple[Path, Path]
) -> None:
    """256 MiB are not enough for a process with TensorFlow in it."""
    model = service.upload("model", demo_files[0])["id"]
    converter = {"recipe": [{"technique": "float16", "engine": "converter"}]}
    spec = {"model": model, "variants": [converter]}
    assert service.run(model=model, variants=["dynamic_range"])["status"] == "succeeded"
    job = service.run(**spec, limits={"memory_bytes": 2**28})
    assert job["variants"][0]["error"]["code"] == "out_of_memory"
    assert "256 MiB" in job["variants"][0]["error"]["message"]
    assert job["variants"][0]["error"]["hint"]


def test_a_tflite_job_imports_no_tensorflow(service: Service, hanging: Hanging) -> None:
    job, child = hanging()
    loaded = Path(f"/proc/{child.pid}/maps").read_text()
    assert "ai_edge_litert" in loaded
    assert "/tensorflow/" not in loaded
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"LITESMITH" not in environment
    os.kill(child.pid, signal.SIGCONT)
    assert service.job(job["id"], wait=60)["status"] == "succeeded"


def test_a_deleted_model_cannot_be_retried(service: Service, demo_files: tuple[Path, Path]) -> None:
    content = demo_files[0].read_bytes()
    model = service.upload("model", content + b"\0")
    if model["status"] != "ready":
        pytest.skip("the copy of the model is not accepted with a byte after its end")
    job = service.submit(model=model["id"], variants=["float16"])
    service.http.post(f"/v1/jobs/{job['id']}/cancel")
    job = service.job(job["id"], wait=10)
    assert service.http.delete(f"/v1/models/{model['id']}").status_code == 204
    if job["status"] == "cancelled":
        problem(service.http.post(f"/v1/jobs/{job['id']}/retry"), 422, "unknown_model")
    assert service.job(job["id"])["model"] == model["id"]
