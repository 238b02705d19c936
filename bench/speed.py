"""How long the whole table takes: the service, first and second time, against the plain script."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import httpx
import numpy as np

from app.client import Client
from bench import models
from bench.service import Service, service, table

SCRIPT = Path(__file__).parent / "plain_script.py"
ROUNDS = 3
SAMPLES = 100
RUNS = 50
ALL = "float16,dynamic_range,int8,int16x8"
# int16x8 of random weights fails to allocate, in both converters.
TRAINED_NOT_NEEDED = "float16,dynamic_range,int8"
# Everything that the script evaluates, however slow the kernels are.
WHOLE = {"time_limit_s": 600}


def script(model: Path, data: Path, variants: str, out: Path) -> tuple[float, dict[str, Any]]:
    """Wall seconds of the plain script, from process start, and what it found."""
    started = time.perf_counter()
    answer = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), str(model), str(data), variants),
            *(str(SAMPLES), str(RUNS), str(out)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - started, json.loads(answer.stdout.splitlines()[-1])


def whole_table(
    name: str, model: Path, data: Path, variants: str, work: Path, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """Interleaved rounds: script, a fresh service's first table, its second. `evaluation`: that of
    the spec; the script always evaluates all samples."""
    rounds = []
    for _ in range(ROUNDS):
        plain, _found = script(model, data, variants, work / f"script-{name}")
        with service() as target:
            spec = {
                "latency": {"runs": RUNS, "threads": 1},
                "evaluation": evaluation,
            }
            first, job = table(target, model, data, variants.split(","), **spec)
            if job["status"] != "succeeded":
                raise RuntimeError(json.dumps(job, indent=2)[-3000:])
            second, again = table(target, model, data, variants.split(","), **spec)
            assert all(variant["cached"] for variant in again["variants"])
        rounds.append((plain, first, second))
    plain, first, second = (median(column) for column in zip(*rounds, strict=True))
    return {
        "table": name,
        "variants": variants,
        "samples_evaluated": {
            v["name"]: v["metrics"]["samples_evaluated"] for v in job["variants"]
        },
        "script_s": round(plain, 2),
        "first_s": round(first, 2),
        "second_s": round(second, 3),
        "first_ratio": round(median(r[1] / r[0] for r in rounds), 3),
        "second_ratio": round(median(r[2] / r[0] for r in rounds), 4),
    }


def _job(target: Service, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    started = time.perf_counter()
    url = f"{target.url}/v1/jobs"
    job = httpx.post(url, json=body, params={"wait": 600}, timeout=700).json()
    seconds = time.perf_counter() - started
    assert job["status"] == "succeeded", job
    return seconds, job


def int8_from_tflite(model: Path, data: Path) -> dict[str, Any]:
    """One int8 job on an uploaded float32 .tflite: submit to finished, each time another seed."""
    with service() as target, Client(target.url) as client:
        ids = {"model": client.upload_model(model).id, "dataset": client.upload_dataset(data).id}
        seconds = [_job(target, ids | {"variants": ["int8"], "seed": seed})[0] for seed in range(5)]
    return {
        "model": model.name,
        "job_s": [round(s, 2) for s in seconds],
        "median_s": median(seconds),
    }


def overhead(model: Path, data: Path, work: Path) -> dict[str, Any]:
    """Seconds of an int8 job on a .tflite over the same work by the engine, called directly."""
    direct = _direct(model, data, work)
    seconds = []
    with service() as target, Client(target.url) as client:
        ids = {"model": client.upload_model(model).id, "dataset": client.upload_dataset(data).id}
        pairs = []
        for seed in range(9):
            seconds.append(_job(target, ids | {"variants": ["int8"], "seed": seed})[0])
            pairs.append(seconds[-1] - direct(seed))
            time.sleep(3)  # until the spares are back: what is measured is a job, not a queue
    return {
        "job_s": round(median(seconds), 3),
        "overhead_s": [round(pair, 3) for pair in pairs],
        "median_s": round(median(pairs), 3),
    }


def _direct(model: Path, data: Path, work: Path) -> Callable[[int], float]:
    """The same prepare and variant work in this process, by seed; returns seconds."""
    from app.domain.formats import DatasetFormat, ModelFormat
    from app.domain.options import CalibrationOptions
    from app.domain.recipes import Int8
    from app.domain.splits import Role, plan_splits
    from app.domain.work import (
        DataSource,
        LatencySettings,
        ModelSource,
        PrepareResult,
        PrepareWork,
        VariantWork,
        calibration_file,
    )
    from workers.engine import pipeline
    from workers.engine.samples import silent

    arrays = np.load(data)
    samples = {n[2:]: len(arrays[n]) for n in arrays if n.startswith("x_")} or {
        "all": len(arrays["x"])
    }
    directory = work / "direct"
    (directory / "in").mkdir(parents=True, exist_ok=True)
    (directory / "in/model").write_bytes(model.read_bytes())
    (directory / "in/data").write_bytes(data.read_bytes())

    def run(seed: int) -> float:
        parts, _ = plan_splits(samples, {Role.calibration, Role.evaluation}, seed)

        def source(role: Role) -> DataSource:
            return DataSource(file="in/data", format=DatasetFormat.npz, part=parts[role])

        started = time.perf_counter()
        shared = pipeline.run(
            PrepareWork(
                steps=["convert", "baseline", "calibrate"],
                model=ModelSource(file="in/model", format=ModelFormat.tflite),
                evaluation_data=source(Role.evaluation),
                calibration_data=source(Role.calibration),
                calibrations=[CalibrationOptions()],
                latency=LatencySettings(),
            ),
            directory,
            silent,
        )
        assert isinstance(shared, PrepareResult)
        assert shared.float_model is not None
        assert shared.baseline_metrics is not None
        work_ = VariantWork(
            name="int8",
            recipe=[Int8()],
            float_model=shared.float_model,
            baseline_metrics=shared.baseline_metrics,
            baseline_outputs=shared.baseline_outputs,
            calibration=calibration_file(0),
            calibration_data=source(Role.calibration),
            evaluation_data=source(Role.evaluation),
        )
        pipeline.run(work_, directory, silent)
        return time.perf_counter() - started

    run(0)
    return run


def measure(data: Path, work: Path) -> dict[str, Any]:
    """All figures of speed. `data` holds resnet8_cifar10/ and kws/."""
    resnet = data / "resnet8_cifar10"
    resnet8, pictures = resnet / "resnet8.h5", resnet / "cifar10_subset.npz"
    lite = models.float_tflite(resnet8, work / "resnet8.tflite")
    kws = data / "kws"
    folder = models.saved_model_folder(kws / "kws_saved_model.zip", work)
    kws_lite = models.float_tflite(folder, work / "kws.tflite")
    mobilenet, random = models.mobilenet(work)
    return {
        "tables": [
            whole_table("resnet8", resnet8, pictures, ALL, work, WHOLE),
            whole_table("resnet8, default time limit", resnet8, pictures, ALL, work, {}),
            whole_table("mobilenet_v2", mobilenet, random, TRAINED_NOT_NEEDED, work, WHOLE),
        ],
        "int8_from_tflite": [
            int8_from_tflite(lite, pictures),
            int8_from_tflite(kws_lite, kws / "kws_test1000.npz"),
        ],
        "spares": spares(),
        "overhead": overhead(kws_lite, kws / "kws_test1000.npz", work),
    }


def spares() -> dict[str, Any]:
    """What a job is spared: seconds from a child's start until it could work, cold and by kind;
    and from the moment that a waiting spare is given work until it has begun."""
    from app.domain.formats import DatasetFormat
    from app.domain.work import InspectDatasetWork
    from workers.runner import Child, Site
    from workers.sandbox import Grant

    found: dict[str, Any] = {}
    kinds: tuple[Literal["light", "tensorflow"], ...] = ("light", "tensorflow")
    for kind in kinds:
        cold, warm = [], []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                child = Child(kind, Site(Path(folder)))
                while not child.read_events(0.1):
                    pass
                cold.append(time.perf_counter() - started)
                np.savez(child.inputs / "data.npz", x=np.zeros((2, 2)))
                work = InspectDatasetWork(file="in/data.npz", format=DatasetFormat.npz)
                (child.directory / "spec.json").write_text(work.model_dump_json())
                started = time.perf_counter()
                child.give(Grant(8 * 2**30, 2**30, 60))
                while not child.read_events(0.1):
                    pass
                warm.append(time.perf_counter() - started)
                child.process.wait()
                child.close()
        found[kind] = {"cold_s": round(median(cold), 2), "spare_s": round(median(warm), 3)}
    return found
