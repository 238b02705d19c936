"""Jobs for targets through the service: what is made, measured, refused, and told."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import Files, Service, embedded, problem, until

from workers.engine import inspect_tflite

FAKE = Path(__file__).parents[1] / "engine" / "targets" / "fake_edgetpu_compiler.py"


def artifacts(variant: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one for one in variant["artifacts"] if one["kind"] == kind]


def content(service: Service, artifact: dict[str, Any]) -> bytes:
    return service.http.get(f"/v1/artifacts/{artifact['id']}/content").content


def codes(variant: dict[str, Any]) -> set[str]:
    return {note["code"] for note in variant["notes"]}


def test_the_edge_tpu_without_its_compiler(service: Service, model: str, dataset: str) -> None:
    job = service.run(model=model, dataset=dataset, variants=["int8"], target="edgetpu")
    (variant,) = job["variants"]
    assert variant["status"] == "succeeded", variant
    assert "compiler_not_installed" in codes(variant)
    figures = variant["metrics"]["edgetpu"]
    assert (figures["measured_by"], figures["compiler"]) == ("prediction", None)
    assert (figures["mapped"], figures["cpu"]) == (len(figures["analysis"]["ops"]), 0)
    assert variant["metrics"]["integer_only"]
    assert artifacts(variant, "edgetpu_tflite") == []
    (step,) = variant["recipe"]
    assert (step["integer_only"], step["dense_granularity"]) == (True, "per_tensor")
    graph = inspect_tflite.parse(content(service, artifacts(variant, "tflite")[0])).main
    assert [graph.tensors[i].signature for i in graph.inputs] == [(1, 64)]
    (dense,) = [op for op in graph.ops if op.name == "FULLY_CONNECTED"]
    assert graph.tensors[dense.inputs[1]].scales.size == 1
    report = service.http.get(f"/v1/jobs/{job['id']}/report?format=markdown").text
    assert "operators on the Edge TPU" in report
    assert "predicted, not compiled" in report


def test_ethos_u_is_compiled(service: Service, model: str, dataset: str) -> None:
    spec = {"model": model, "dataset": dataset, "variants": ["int8"], "target": "ethos-u55-64"}
    (variant,) = service.run(**spec, target_options={"optimise": "size"})["variants"]
    assert variant["status"] == "succeeded", variant
    (compiled,) = artifacts(variant, "ethos_u_tflite")
    assert compiled["file_name"] == "digits-int8_vela.tflite"
    operators = [op.name for op in inspect_tflite.parse(content(service, compiled)).main.ops]
    assert "ethos-u" in operators
    told = variant["metrics"]["ethos_u"]
    assert (told["accelerator"], told["optimise"]) == ("ethos-u55-64", "size")
    assert told["cycles"] > 0
    assert told["size_bytes"] == compiled["size_bytes"]
    assert service.http.get(f"/v1/artifacts/{compiled['id']}").json()["metrics"] == told
    (log,) = artifacts(variant, "compiler_log")
    assert content(service, log)
    manifest = service.http.get(
        f"/v1/artifacts/{artifacts(variant, 'manifest')[0]['id']}/content"
    ).json()
    assert manifest["target"]["version"] == manifest["tools"]["ethos-u-vela"]
    # Another target is another variant; the same one is there.
    assert service.run(**spec, target_options={"optimise": "size"})["variants"][0]["cached"]
    assert not service.run(**spec)["variants"][0]["cached"]


def test_a_microcontroller_gets_a_c_array(service: Service, model: str, dataset: str) -> None:
    spec = {"model": model, "dataset": dataset, "target": "microcontroller"}
    limits = {"max_arena_bytes": 2**20, "max_flash_bytes": 2**20}
    job = service.run(**spec, variants=["int8"], budgets=limits)
    (variant,) = job["variants"]
    assert variant["status"] == "succeeded", variant
    assert job["verdict"]["verdict"] == "pass", (job["verdict"], variant["metrics"]["micro"])
    source, header = artifacts(variant, "c_array")
    assert (source["file_name"], header["file_name"]) == ("digits_int8.c", "digits_int8.h")
    (file,) = artifacts(variant, "tflite")
    values = re.findall(r"0x([0-9a-f]{2}),", content(service, source).decode())
    assert bytes.fromhex("".join(values)) == content(service, file)
    metrics, told = variant["metrics"], content(service, header).decode()
    assert f"ARENA_BYTES {metrics['arena_bytes']}u" in told
    assert f"SIZE_BYTES {file['size_bytes']}u" in told
    assert metrics["flash_bytes"] >= file["size_bytes"]
    assert metrics["micro"]["runs"]
    assert metrics["micro"]["samples_compared"] > 0
    broken = service.run(**spec, variants=["int8"], budgets={"max_arena_bytes": 1})
    checks = {check["budget"]: check["passed"] for check in broken["verdict"]["checks"]}
    assert checks == {"succeeded": True, "max_arena_bytes": False}
    assert service.http.get(f"/v1/jobs/{broken['id']}/verdict").status_code == 412


@pytest.mark.parametrize(
    ("spec", "code", "field"),
    [
        ({"variants": ["float16"], "target": "edgetpu"}, "invalid_recipe", "variants.0"),
        ({"variants": ["int8", "prune"], "target": "ethos-u65-256"}, "invalid_recipe",
         "variants.1"),
        ({"variants": ["dynamic_range"], "target": "microcontroller"}, "invalid_recipe",
         "variants.0"),
        ({"variants": ["int8"], "target": "tpu"}, "validation_error", "target"),
        ({"variants": ["int8"], "target": "edgetpu", "target_options": {"num_segments": 0}},
         "validation_error", "target_options"),
        ({"variants": ["int8"], "budgets": {"max_flash_bytes": 9}}, "budget_not_measured",
         "budgets.max_flash_bytes"),
    ],
)  # fmt: skip
def test_what_a_target_does_not_take(
    service: Service, model: str, dataset: str, spec: dict[str, Any], code: str, field: str
) -> None:
    answer = service.http.post("/v1/jobs", json={"model": model, "dataset": dataset, **spec})
    assert problem(answer, 422, code)["errors"][0]["field"] == field


def test_targets_tell_what_the_workers_have(service: Service) -> None:
    items = {item["id"]: item for item in service.http.get("/v1/targets").json()["items"]}
    assert items["cpu"]["compiler"] is None
    assert items["edgetpu"]["compiler"]["installed"] is False
    assert items["ethos-u55-128"]["compiler"]["installed"] is True
    assert re.match(r"\d", items["ethos-u55-128"]["compiler"]["version"])


@pytest.fixture(scope="module")
def with_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    """A service whose compiler is a test double that replays outputs and compiles nothing, and
    the file that names what it does."""
    # Not above the service's data, which children could read then.
    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "fake_edgetpu_compiler"
    script.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
    script.chmod(0o755)
    (folder / "scenario").write_text("success")
    data_dir = tmp_path_factory.mktemp("with_compiler") / "service"
    with embedded(data_dir, edgetpu_compiler=script, fast_slots=1) as running:
        yield running, folder / "scenario"


@pytest.fixture
def spec(with_compiler: tuple[Service, Path], files: Files) -> dict[str, Any]:
    service, _ = with_compiler
    return {
        "model": service.upload("model", files.tflite, name="digits.tflite")["id"],
        "dataset": service.upload("dataset", files.npz)["id"],
        "variants": ["int8"],
        "target": "edgetpu",
    }


def test_the_edge_tpu_with_its_compiler(
    with_compiler: tuple[Service, Path], spec: dict[str, Any]
) -> None:
    service, scenario = with_compiler
    scenario.write_text("success")
    (variant,) = service.run(**spec)["variants"]
    assert variant["status"] == "succeeded", variant
    (compiled,) = artifacts(variant, "edgetpu_tflite")
    assert compiled["file_name"] == "digits-int8_edgetpu.tflite"
    told = variant["metrics"]["edgetpu"]
    assert compiled["metrics"] == told["compiler"]
    assert (told["measured_by"], told["mapped"], told["cpu"]) == ("compiler", 2, 1)
    assert told["compiler"]["on_chip_bytes"] == 3072
    assert told["compiler"]["version"].startswith("16.0.")
    assert "left_on_cpu" in codes(variant)
    (log,) = artifacts(variant, "compiler_log")
    assert b"LEAKY_RELU" in content(service, log)
    edge = {item["id"]: item for item in service.http.get("/v1/targets").json()["items"]}
    assert edge["edgetpu"]["compiler"]["version"].startswith("16.0.")
    (parted,) = service.run(**spec, target_options={"num_segments": 2})["variants"]
    assert [one["file_name"] for one in artifacts(parted, "edgetpu_tflite")] == [
        "digits-int8_segment_0_of_2_edgetpu.tflite",
        "digits-int8_segment_1_of_2_edgetpu.tflite",
    ]
    own = [one["metrics"] for one in artifacts(parted, "edgetpu_tflite")]
    assert own == parted["metrics"]["edgetpu"]["compiler"]["segments"]
    assert [report["output"] for report in own] == [
        "model_segment_0_of_2_edgetpu.tflite",
        "model_segment_1_of_2_edgetpu.tflite",
    ]


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("activations", "activations_too_large"),
        ("garbage", "compiler_output_unreadable"),
        ("hang", "compiler_timeout"),
        ("crash", "compiler_crashed"),
    ],
)
def test_a_compiler_that_fails_fails_its_variant_alone(
    with_compiler: tuple[Service, Path], spec: dict[str, Any], does: str, code: str
) -> None:
    service, scenario = with_compiler
    scenario.write_text(does)
    job = service.run(**spec, seed=len(does), target_options={"timeout_s": 2})
    (variant,) = job["variants"]
    assert (variant["status"], variant["error"]["code"]) == ("failed", code)
    assert variant["error"]["hint"]
    if does == "activations":
        assert "Compilation failed!" in variant["error"]["log_tail"]
    scenario.write_text("success")
    again = service.http.post(f"/v1/jobs/{job['id']}/retry").json()
    assert service.job(again["id"], wait=60)["status"] == "succeeded"


def test_cancelling_ends_the_compiler_and_what_it_started(
    with_compiler: tuple[Service, Path], spec: dict[str, Any]
) -> None:
    service, scenario = with_compiler
    scenario.write_text("hang")

    def started() -> psutil.Process | None:
        """What the compiler, which a child of the worker runs, started itself."""
        for process in service.worker().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "import time; time.sleep(600)" in process.cmdline():
                    return process
        return None

    job = service.submit(**spec, seed=4711)
    pid = until(started, "the compiler runs").pid
    service.http.post(f"/v1/jobs/{job['id']}/cancel")
    until(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie",
        "what the compiler started has ended",
    )
    assert service.job(job["id"])["status"] == "cancelled"
