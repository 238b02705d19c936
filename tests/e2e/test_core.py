"""The same job on every kind of deployment, chosen by settings alone."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from running import Files, Postgres, Redis, Service, embedded, parts, redis_server, stop, until


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Settings of an S3-compatible storage with one empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="models")
    yield {
        "storage_url": "s3://models/some/prefix",
        "s3_endpoint": endpoint,
        "s3_access_key_id": "test",
        "s3_secret_access_key": "test",
    }
    listed = client.list_objects_v2(Bucket="models")["Contents"]
    assert listed
    assert all(item["Key"].startswith("some/prefix/") for item in listed)
    server.stop()


def content(service: Service, artifact: dict[str, Any]) -> httpx.Response:
    return service.http.get(f"/v1/artifacts/{artifact['id']}/content")


def core_scenario(service: Service, model: Path, data: Path) -> None:
    """Upload, make two variants, read everything; make them again from what is kept."""
    uploaded = service.upload("model", model, name=model.name)
    assert uploaded["status"] == "ready", uploaded
    samples = service.upload("dataset", data, name=data.name)
    assert samples["status"] == "ready", samples
    for path, file in ((f"models/{uploaded['id']}", model), (f"datasets/{samples['id']}", data)):
        assert service.http.get(f"/v1/{path}/content").content == file.read_bytes()
    spec = {"model": uploaded["id"], "dataset": samples["id"], "variants": ["float16", "int8"]}

    job = service.submit(**spec, budgets={"max_accuracy_drop": 0.5})
    early = service.http.get(f"/v1/jobs/{job['id']}/verdict")
    assert early.status_code == 409
    assert early.json()["code"] == "not_finished"
    job = service.job(job["id"], wait=120)
    assert job["status"] == "succeeded", job
    assert not any(variant["cached"] for variant in job["variants"])
    for variant in (job["baseline"], *job["variants"]):
        assert variant["metrics"]["accuracy"] > 0.9
        for artifact in variant["artifacts"]:
            answer = content(service, artifact)
            assert sha256(answer.content).hexdigest() == artifact["sha256"]
    artifact = job["variants"][1]["artifacts"][0]
    part = service.http.get(
        f"/v1/artifacts/{artifact['id']}/content", headers={"range": "bytes=4-7"}
    )
    assert (part.status_code, part.content) == (206, b"TFL3")
    for format_ in ("json", "markdown", "html", "csv", "junit"):
        report = service.http.get(f"/v1/jobs/{job['id']}/report", params={"format": format_})
        assert report.status_code == 200
        assert "int8" in report.text
    assert service.http.get(f"/v1/jobs/{job['id']}/artifacts.zip").content[:2] == b"PK"
    assert service.http.get(f"/v1/jobs/{job['id']}/verdict").status_code == 200
    lines = service.http.get(f"/v1/jobs/{job['id']}/events").text.splitlines()
    assert "event: end" in lines

    again = service.run(**spec, budgets={"max_size_bytes": 1})
    assert all(variant["cached"] for variant in again["variants"])
    for before, now in zip(job["variants"], again["variants"], strict=True):
        assert now["artifacts"][0]["sha256"] == before["artifacts"][0]["sha256"]
    assert service.http.get(f"/v1/jobs/{again['id']}/verdict").status_code == 412
    assert service.http.delete(f"/v1/models/{uploaded['id']}").status_code == 204
    # What was made from it stays.
    assert content(service, artifact).status_code == 200
    retried = service.http.post(f"/v1/jobs/{again['id']}/retry")
    assert (retried.status_code, retried.json()["code"]) == (409, "nothing_to_retry")


def lose_a_worker(service: Service, files: Files) -> None:
    """Six jobs at once for two workers, one of which is killed: none is lost or made twice."""
    model = service.upload("model", files.tflite)["id"]
    data = service.upload("dataset", files.unlabelled)["id"]
    variants = ["int8", "dynamic_range", "float16"]
    jobs = [service.submit(model=model, dataset=data, variants=variants, seed=n // 2)
            for n in range(6)]  # fmt: skip
    until(lambda: service.job(jobs[0]["id"])["status"] != "queued", "the first one runs")
    service.processes["worker"].kill()
    service.processes["worker"].wait()
    ended = [service.job(job["id"], wait=90) for job in jobs]
    assert [job["status"] for job in ended] == ["succeeded"] * 6, ended
    for one, twin in zip(ended[::2], ended[1::2], strict=True):
        for first, second in zip(one["variants"], twin["variants"], strict=True):
            assert first["cached"] or second["cached"]
            assert first["artifacts"][0]["sha256"] == second["artifacts"][0]["sha256"]
    for job in ended:
        text = service.http.get(f"/v1/jobs/{job['id']}/events").text
        assert text.count("event: end") == 1


def test_embedded_with_a_keras_model(service: Service, demo_files: tuple[Path, Path]) -> None:
    core_scenario(service, *demo_files)


def test_postgresql_redis_and_parts_started_alone(
    tmp_path: Path, files: Files, postgres: Postgres, redis: Redis
) -> None:
    settings = {
        "database_url": postgres.database(),
        "broker_url": redis.url,
        "light_spares": 1,
        "tensorflow_spares": 0,
        "lease_s": 3,
    }
    with parts(tmp_path / "data", workers=2, **settings) as service:
        core_scenario(service, files.tflite, files.npz)
        lose_a_worker(service, files)
        assert not (tmp_path / "data" / "litesmith.db").exists()


def test_s3_storage(tmp_path: Path, files: Files, bucket: dict[str, str]) -> None:
    settings = bucket | {"light_spares": "1", "tensorflow_spares": "0"}
    with embedded(tmp_path / "data", **settings) as service:
        core_scenario(service, files.tflite, files.npz)
        assert not (tmp_path / "data" / "objects").exists()


def test_readiness_names_the_part_that_is_missing(
    tmp_path: Path, files: Files, redis: Redis
) -> None:
    """Parts alone, so that nobody starts them again: first no worker, then no broker."""
    settings = {"broker_url": redis.url, "light_spares": 0, "tensorflow_spares": 0}
    with parts(tmp_path / "data", **settings) as service:
        assert stop(service.processes["worker"]) == 0
        answer = service.http.get("/readyz")
        assert answer.status_code == 503
        checks = answer.json()["checks"]
        assert {name for name, state in checks.items() if state != "ok"} == {"worker"}
        assert service.http.get("/healthz").status_code == 200
        # The broker is a doorbell: without it, what is asked is kept all the same, at once.
        redis.process.kill()
        redis.process.wait()
        answer = service.http.post("/v1/models", content=files.tflite.read_bytes())
        assert answer.status_code == 201
        checks = service.http.get("/readyz").json()["checks"]
        assert {name for name, state in checks.items() if state != "ok"} == {"worker", "broker"}
