"""Techniques, targets, catalog and advice over HTTP; "auto" in a job; models of the catalog."""

import json
from typing import Any

import pytest
from running import Files, Service, problem


def test_targets_tell_what_they_take(service: Service) -> None:
    items = {item["id"]: item for item in service.http.get("/v1/targets").json()["items"]}
    assert "prune+int8" in items["cpu"]["recipes"]
    edge = items["edgetpu"]
    assert edge["number_formats"] == ["int8", "qat"]
    assert edge["options"]["int8"] == {"integer_only": True, "dense_granularity": "per_tensor"}
    assert edge["fixed_batch"]
    assert "min_runtime_version" in edge["target_options"]["properties"]
    assert edge["artifacts"] == ["edgetpu_tflite", "compiler_log"]


def test_the_catalog_lists_models_with_their_sources(service: Service) -> None:
    items = {item["id"]: item for item in service.http.get("/v1/catalog").json()["items"]}
    found = items["mobilenet_v2_1.0_224"]
    assert (found["parameters"], found["accuracy"]) == (3_538_984, 0.718)
    assert found["licence"] == "Apache-2.0"
    assert all(item["source"].startswith("https://") for item in items.values())


def test_advice_in_general_and_on_a_model(service: Service, model: str, dataset: str) -> None:
    general = service.http.post("/v1/advise", json={"target": "edgetpu", "goal": "latency",
        "has_labels": False, "has_representative_data": True}).json()  # fmt: skip
    assert [one["recipe"] for one in general["recommended"]] == ["int8"]
    asked = {"model": model, "dataset": dataset, "goal": "size", "max_accuracy_drop": 0.01}
    own = service.http.post("/v1/advise", json=asked).json()
    first = own["recommended"][0]
    assert first["recipe"] in ("int8", "dynamic_range")
    assert first["reasons"]
    assert first["expected"]["size_ratio"] == [0.26, 0.52]
    assert first["expected"]["source"]
    rejected = {one["recipe"]: one["why_not"] for one in own["rejected"]}
    assert "holds no layers to train" in rejected["prune+qat"][0]
    assert own["missing"][0]["what"] == "trainable_model"
    unlike = service.http.post("/v1/advise", json={"model": "mdl_0"})
    problem(unlike, 422, "unknown_model")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"target": "tpu"}, "target"),
        ({"goal": "speed"}, "goal"),
        ({"max_size_bytes": 0}, "max_size_bytes"),
        ({"samples": -1}, "samples"),
        ({"unknown": 1}, "unknown"),
        ({"model": "\ud800"}, "spec"),
    ],
)
def test_advice_on_what_makes_no_sense(service: Service, body: dict[str, Any], field: str) -> None:
    answer = service.http.post("/v1/advise", content=json.dumps(body))
    refused = problem(answer, 422, "validation_error")
    assert refused["errors"][0]["field"] == field


def test_auto_takes_the_advice_and_tells_why(service: Service, model: str, dataset: str) -> None:
    spec = {"model": model, "dataset": dataset, "variants": "auto", "goal": "latency"}
    asked = {"model": model, "dataset": dataset, "goal": "latency"}
    advised = service.http.post("/v1/advise", json=asked).json()["recommended"][:3]
    job = service.run(**spec)
    assert job["status"] == "succeeded", job
    assert job["spec"]["variants"] == [one["variant"] for one in advised]
    assert [variant["name"] for variant in job["variants"]] == ["int8", "dynamic_range"]
    for rank, variant in enumerate(job["variants"], 1):
        (note,) = [note for note in variant["notes"] if note["code"] == "advised"]
        assert f"goal 'latency', rank {rank}" in note["message"]
    # What it was resolved to can be sent again.
    assert service.run(**job["spec"])["variants"][0]["cached"]
    refused = service.http.post("/v1/jobs", json=spec | {"budgets": {"max_size_bytes": 9}})
    assert problem(refused, 422, "nothing_fits")["errors"][0]["field"] == "variants"


def test_auto_with_the_files_sent_along(service: Service, files: Files) -> None:
    parts = {"model": files.tflite.open("rb"), "dataset": files.npz.open("rb")}
    form = {"spec": '{"variants": "auto", "seed": 1234}'}
    answer = service.http.post("/v1/jobs?wait=60", files=parts, data=form, timeout=90)
    assert answer.status_code == 202, answer.text
    assert answer.json()["status"] == "succeeded"
    assert answer.json()["variants"][0]["name"] == "int8"


def test_a_model_of_the_catalog_with_random_weights(service: Service) -> None:
    asked = {"catalog": "mobilenet_v1_0.25_128", "weights": "random", "seed": 3}
    answer = service.http.post("/v1/models", json=asked)
    assert answer.status_code == 201, answer.text
    row = answer.json()
    assert row["name"] == "mobilenet_v1_0.25_128-random.keras"
    assert row["origin"] == "mobilenet_v1_0.25_128:random:3"
    assert (row["status"], row["sha256"], row["size_bytes"]) == ("inspecting", None, None)
    path = f"/v1/models/{row['id']}"
    assert answer.headers["location"] == path
    again = service.http.post("/v1/models", json=asked)
    assert (again.status_code, again.json()["id"]) == (200, row["id"])
    made = service.inspected("model", row["id"])
    assert made["status"] == "ready", made
    assert (made["format"], made["parameters"], made["trainable"]) == ("keras", 475_544, True)
    assert made["inputs"][0]["shape"] == [-1, 128, 128, 3]
    assert len(service.http.get(f"{path}/content").content) == made["size_bytes"]
    # Its bytes sent back are the same model.
    content = service.http.get(f"{path}/content").content
    assert service.http.post("/v1/models", content=content).json()["id"] == row["id"]
    advised = service.http.post("/v1/advise", json={"model": row["id"], "has_labels": True})
    assert "depthwise layers lose more" in advised.text


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"catalog": "mobilenet_v9"}, "unknown_catalog_model", "catalog"),
        ({"catalog": "../x"}, "unknown_catalog_model", "catalog"),
        ({"weights": "random"}, "validation_error", "catalog"),
        ({"catalog": "densenet_121", "weights": "mine"}, "validation_error", "weights"),
        ({"catalog": "densenet_121", "seed": -1}, "validation_error", "seed"),
        ({"catalog": "densenet_121", "x": 1}, "validation_error", "x"),
        ([], "validation_error", "spec"),
    ],
)
def test_what_the_catalog_does_not_have(service: Service, body: Any, code: str, field: str) -> None:
    refused = problem(service.http.post("/v1/models", json=body), 422, code)
    assert refused["errors"][0]["field"] == field
