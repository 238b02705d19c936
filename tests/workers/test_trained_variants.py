"""Recipes that train in a real service: stages shared and resumed, progress, cancelling."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import Service, npz, until

pytestmark = pytest.mark.timeout(600)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="session")
def trainable(service: Service, demo_files: tuple[Path, Path]) -> dict[str, str]:
    """A small Keras model and its data, as fields of a spec."""
    model = service.upload("model", demo_files[0], name="digits.keras")
    data = service.upload("dataset", demo_files[1], name="digits.npz")
    assert (model["status"], data["status"]) == ("ready", "ready")
    assert model["trainable"] is True
    return {"model": model["id"], "dataset": data["id"]}


def at_work(service: Service) -> psutil.Process:
    """The child that trains: unlike a spare, it is in the directory of its work."""

    def find() -> psutil.Process | None:
        place = str(service.data_dir / "work")
        found = [p for p in service.children("tensorflow") if p.cwd().startswith(place)]
        return found[0] if found else None

    child: psutil.Process = until(find, "a child trains")
    return child


def ended(service: Service, id_: str) -> dict[str, Any]:
    job = service.job(id_, wait=240)
    assert job["finished_at"], job
    return job


def run(service: Service, **spec: Any) -> dict[str, Any]:
    job = ended(service, service.submit(**spec)["id"])
    assert job["status"] == "succeeded", job
    return job


def told(service: Service, id_: str, of: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The first event of a variant, from the job's beginning on, of which that is true."""
    with service.http.stream("GET", f"/v1/jobs/{id_}/events", timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if "name" in data and of(data):
                    return data
    raise AssertionError("the job ended without such an event")


SHARED: dict[str, Any] = {"training": {"epochs": 2}, "seed": 11}


@pytest.fixture(scope="session")
def trained(service: Service, trainable: dict[str, str]) -> dict[str, Any]:
    """A job of recipes that share their first stage."""
    return run(service, **trainable, **SHARED, variants=["prune", "prune+int8", "prune+qat"])


def content(service: Service, variant: dict[str, Any], kind: str) -> bytes:
    (artifact,) = [a for a in variant["artifacts"] if a["kind"] == kind]
    return service.http.get(f"/v1/artifacts/{artifact['id']}/content").content


def test_a_job_trains_once_what_its_recipes_share(
    service: Service, trainable: dict[str, str], trained: dict[str, Any]
) -> None:
    job = trained
    assert "training: drawn from" in job["splits"]
    prune, int8, qat = job["variants"]
    stages = [[stage["technique"] for stage in v["training"]] for v in (prune, int8, qat)]
    assert stages == [["prune"], ["prune"], ["prune", "qat"]]
    firsts = [variant["training"][0] for variant in (prune, int8, qat)]
    assert sorted(stage["cached"] for stage in firsts) == [False, True, True]
    assert len({json.dumps(stage["history"]) for stage in firsts}) == 1
    assert all((stage["seconds"] == 0) is stage["cached"] for stage in firsts)
    second = qat["training"][1]
    assert (second["epochs"], second["distilled"], second["cached"]) == (2, False, False)
    assert second["best_epoch"] in [epoch["epoch"] for epoch in second["history"]] == [1, 2]
    assert second["samples"] > 0
    assert second["history"][0]["metric"] == "accuracy"

    digests = {}
    for variant in (prune, int8, qat):
        kinds = {artifact["kind"]: artifact for artifact in variant["artifacts"]}
        assert kinds.keys() == {"tflite", "manifest", "keras"}
        name = kinds["tflite"]["file_name"].removesuffix(".tflite")
        assert name.endswith(f"-{variant['name'].replace('+', '-')}")
        assert kinds["keras"]["file_name"] == f"{name}.keras"
        assert 0 < kinds["keras"]["gzip_size_bytes"] < kinds["keras"]["size_bytes"]
        assert variant["metrics"]["sparsity"] > 0.4
        digests[variant["name"]] = kinds["keras"]["sha256"]
        manifest = json.loads(content(service, variant, "manifest"))
        told = manifest["training"]["stages"]
        assert [stage["technique"] for stage in told] == variant["name"].split("+")[: len(told)]
        assert told[-1]["checkpoint"] == kinds["keras"]["sha256"]
        assert "tensorflow-model-optimization" in manifest["tools"]
    assert digests["prune"] == digests["prune+int8"] != digests["prune+qat"]
    assert qat["metrics"]["integer_only"] is True

    # What was trained is a model like any other.
    again = service.upload("model", content(service, prune, "keras"), name="pruned.keras")
    assert (again["status"], again["trainable"]) == ("ready", True)

    report = service.http.get(f"/v1/jobs/{job['id']}/report", params={"format": "markdown"}).text
    assert "prune, prune+int8, prune+qat (prune training)" in report
    assert "(qat training)" in report

    twice = run(service, **trainable, **SHARED, variants=["prune+qat"])["variants"][0]
    assert twice["cached"] is True
    assert [stage["cached"] for stage in twice["training"]] == [True, True]
    assert twice["notes"] == qat["notes"]
    assert {a["sha256"] for a in twice["artifacts"]} == {a["sha256"] for a in qat["artifacts"]}


def test_the_events_tell_where_a_training_stands(service: Service, trained: dict[str, Any]) -> None:
    text = service.http.get(f"/v1/jobs/{trained['id']}/events").text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    for variant in trained["variants"]:
        made = [stage["technique"] for stage in variant["training"] if not stage["cached"]]
        own = [event for event in events if event.get("name") == variant["name"]]
        told = [event for event in own if event["training"]]
        assert [e["training"]["technique"] for e in told] == [e["stage"] for e in told]
        epochs = {(e["stage"], e["training"]["epoch"]) for e in told}
        assert epochs == {(stage, epoch) for stage in made for epoch in (1, 2)}
        for event in told:
            training = event["training"]
            assert (training["epochs"], 1 <= training["step"] <= training["steps"]) == (2, True)
            assert event["message"].startswith(f"{event['stage']}: epoch {training['epoch']}/2")
        assert any(event["training"]["score"] is not None for event in told) is bool(made)
        # The training of a chain takes 0 to 0.8 of its bar, each stage its share of that.
        shares = [event["progress"] for event in own]
        assert shares == sorted(shares)
        share = 0.8 / len(variant["training"])
        stages = {stage["technique"]: number for number, stage in enumerate(variant["training"])}
        for event in told:
            low = stages[event["stage"]] * share
            assert low <= event["progress"] <= low + share + 1e-3
        assert all(e["progress"] >= 0.8 for e in own if e["stage"] == "evaluate")


def test_without_labels_it_learns_from_the_model_as_it_came(
    service: Service, trainable: dict[str, str], demo_files: tuple[Path, Path]
) -> None:
    import numpy as np

    with np.load(demo_files[1]) as arrays:
        bare = service.upload("dataset", npz(x=arrays["x_train"][:400]))["id"]
    job = run(
        service,
        model=trainable["model"],
        training_dataset=bare,
        variants=["qat"],
        training={"epochs": 1},
    )
    assert job["variants"][0]["training"][0]["distilled"] is True
    assert "the first of the training samples" in job["splits"]


def test_whatever_dies_what_is_trained_stays_trained(
    service: Service, trainable: dict[str, str]
) -> None:
    """The child, and after a retry the worker: each time it goes on from the first stage's end."""
    asked: dict[str, Any] = {"training": {"epochs": 2}, "seed": 13}
    job = service.submit(**trainable, **asked, variants=["prune+qat"])

    def in_second_stage() -> bool:
        return bool(service.job(job["id"])["variants"][0]["stage"] == "qat")

    until(in_second_stage, "it was pruned and trains on")
    # A crash of its own: what SIGKILL ends is made again.
    at_work(service).send_signal(signal.SIGSEGV)
    failed = ended(service, job["id"])
    assert failed["status"] == "failed"
    assert failed["variants"][0]["error"]["code"] == "child_crashed"
    assert failed["variants"][0]["training"] == []
    assert service.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
    until(in_second_stage, "it goes on")
    children = service.children("tensorflow")
    service.worker().kill()
    until(lambda: all(gone(process) for process in children), "no child is left")
    done = ended(service, job["id"])
    assert done["status"] == "succeeded", done
    (variant,) = done["variants"]
    assert variant["cached"] is False
    assert [stage["cached"] for stage in variant["training"]] == [True, False]


def test_a_training_holds_nothing_up_and_is_cancelled_inside_an_epoch(
    service: Service, trainable: dict[str, str]
) -> None:
    long = {"technique": "cluster", "epochs": 1000, "batch_size": 1}
    job = service.submit(**trainable, variants=[{"name": "long", "recipe": [long]}], seed=15)
    told(service, job["id"], lambda data: data["training"])
    child = at_work(service)
    other = service.job(service.submit(**trainable, variants=["float16"], seed=15)["id"], wait=60)
    assert other["status"] == "succeeded"
    assert service.job(job["id"])["status"] == "running"
    assert service.http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
    assert service.job(job["id"], wait=5)["status"] == "cancelled"
    until(lambda: gone(child), "its child is gone")


def test_a_step_that_cannot_be_trained_is_tried_once(
    service: Service, trainable: dict[str, str]
) -> None:
    nothing = {"technique": "prune", "exclude": ["."]}
    asked = [
        {"name": name, "recipe": [nothing, *rest]}
        for name, rest in [("alone", []), ("small", ["int8"]), ("chain", ["qat"])]
    ]
    job = service.submit(**trainable, variants=[*asked, "float16"], seed=19)
    for attempt in (1, 2):
        done = ended(service, job["id"])
        assert done["status"] == "partial"
        *failed, float16 = done["variants"]
        assert {variant["error"]["code"] for variant in failed} == {"nothing_to_train"}
        assert len({variant["error"]["message"] for variant in failed}) == 1
        assert float16["status"] == "succeeded"
        text = service.http.get(f"/v1/jobs/{job['id']}/events").text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        # Who began it is told to run; the others fail while they wait.
        running = [event["name"] for event in events if event.get("stage") == "prune"]
        assert set(running) == {"alone"}
        assert text.count("event: end") == attempt
        if attempt == 1:
            assert service.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 202


def test_training_ends_at_the_jobs_own_deadline(
    service: Service, trainable: dict[str, str]
) -> None:
    asked = [{"technique": "cluster", "epochs": 1000, "batch_size": 1}]
    spec = trainable | {"variants": [{"name": "late", "recipe": asked}], "seed": 17}
    # Inspected, converted and measured already: the deadline is for all work of a job.
    assert service.run(**(spec | {"variants": ["float16"]}))["status"] == "succeeded"
    job = ended(service, service.submit(**spec, limits={"deadline_s": 5})["id"])
    assert job["variants"][0]["error"]["code"] == "deadline_exceeded"
