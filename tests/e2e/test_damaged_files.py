"""Stored files that change or vanish behind the service's back: never served, never worked on."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running import Service, npz, problem


def stored(service: Service, sha256: str) -> Path:
    return service.data_dir / "objects" / sha256[:2] / sha256


def damage(path: Path) -> None:
    """Change the last byte."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def files(tag: int) -> tuple[bytes, bytes]:
    """A linear classifier and data that no other test has, so that no other test is disturbed."""
    import tiny

    random = np.random.default_rng(tag)
    weights = random.normal(size=(10, 64)).astype(np.float32)
    x = random.normal(size=(300, 64)).astype(np.float32)
    model = tiny.dense(weights, random.normal(size=10).astype(np.float32))
    return model, npz(x=x, y=(x @ weights.T).argmax(1))


def artifact(job: dict[str, Any], variant: str) -> dict[str, Any]:
    found = next(v for v in job["variants"] if v["name"] == variant)
    return next(a for a in found["artifacts"] if a["kind"] == "tflite")


def content(service: Service, file: dict[str, Any]) -> httpx.Response:
    return service.http.get(f"/v1/artifacts/{file['id']}/content")


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_result_is_made_anew_instead_of_served(service: Service, how: str) -> None:
    model, data = files(len(how))
    spec = {
        "model": service.upload("model", model)["id"],
        "dataset": service.upload("dataset", data)["id"],
        "variants": ["int8", "float16"],
    }
    first = service.run(**spec)
    assert first["status"] == "succeeded", first
    file = artifact(first, "int8")
    whole = content(service, file).content
    path = stored(service, file["sha256"])
    if how == "damaged":
        damage(path)
        # As the stored result is found by a job, before anybody has asked for the file.
        second = service.run(**spec)
        assert second["status"] == "succeeded", second
    else:
        path.unlink()
        problem(content(service, file), 410, "content_missing")
        second = service.run(**spec)
    assert {v["name"]: v["cached"] for v in second["variants"]} == {"int8": False, "float16": True}
    # The same recipe makes the same bytes: the first job's file is there again as well.
    assert artifact(second, "int8")["sha256"] == file["sha256"]
    assert content(service, file).content == whole
    # What all variants are measured against is looked at as well.
    damage(stored(service, baseline_outputs(service)))
    third = service.run(**spec)
    assert third["status"] == "succeeded", third
    assert {v["name"]: v["cached"] for v in third["variants"]} == {"int8": True, "float16": True}
    assert not third["baseline"]["cached"]


def baseline_outputs(service: Service) -> str:
    """The digest of the answers that the latest baseline gave."""
    with closing(sqlite3.connect(service.data_dir / "litesmith.db")) as connection:
        latest = "SELECT files FROM steps WHERE kind = 'baseline' ORDER BY created_at DESC LIMIT 1"
        (found,) = connection.execute(latest).fetchone()
    return str(json.loads(found)["baseline_outputs"]["sha256"])


def test_a_damaged_artifact_is_not_served(service: Service) -> None:
    model, data = files(11)
    ids = service.upload("model", model)["id"], service.upload("dataset", data)["id"]
    job = service.run(model=ids[0], dataset=ids[1], variants=["float16"])
    file = artifact(job, "float16")
    damage(stored(service, file["sha256"]))
    told = problem(content(service, file), 410, "storage_corrupt")
    assert "submit that job again" in told["hint"]
    with pytest.raises(httpx.RemoteProtocolError):
        service.http.get(f"/v1/jobs/{job['id']}/artifacts.zip")
    assert "stored file damaged or gone" in service.log("api")
    again = service.run(model=ids[0], dataset=ids[1], variants=["float16"])
    assert not again["variants"][0]["cached"]
    assert content(service, file).is_success


def test_a_long_file_breaks_off_before_its_end(service: Service) -> None:
    whole = npz(x=np.random.default_rng(12).integers(0, 256, (60_000, 100), np.uint8))
    row = service.upload("dataset", whole)
    damage(stored(service, row["sha256"]))
    url = f"/v1/datasets/{row['id']}/content"
    with pytest.raises(httpx.RemoteProtocolError):
        service.http.get(url)
    # The same upload again repairs it.
    assert service.upload("dataset", whole)["id"] == row["id"]
    assert service.http.get(url).content == whole


def test_a_job_on_a_damaged_upload_fails_and_can_be_retried(service: Service) -> None:
    model, data = files(13)
    row = service.upload("dataset", data)
    id_ = service.upload("model", model)["id"]
    damage(stored(service, row["sha256"]))
    job = service.run(model=id_, dataset=row["id"], variants=["int8"])
    assert job["status"] == "failed", job
    error = job["variants"][0]["error"]
    assert (error["code"], "Upload" in error["hint"]) == ("storage_corrupt", True)
    service.upload("dataset", data)
    assert service.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
    assert service.job(job["id"], wait=60)["status"] == "succeeded"
