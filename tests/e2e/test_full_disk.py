"""A disk that is full: told clearly, nothing damaged, nothing left behind. The disk is a real one
of a few megabytes (tmpfs)."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running import Files, Service, embedded, npz, problem

from app.config import Settings
from app.storage import Stored, is_intact, open_storage

SIZE = 6_000_000
TUS = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("disk")
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def small(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with embedded(
        tmp_path_factory.mktemp("small"),
        storage_url=f"file://{disk}/objects",
        light_spares=1,
        tensorflow_spares=0,
    ) as service:
        yield service


def leftovers(disk: Path) -> list[str]:
    return [path.name for path in (disk / "objects" / "spool").iterdir()]


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all room of the disk but so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return filler


def too_big() -> bytes:
    return npz(x=np.random.default_rng(1).integers(0, 256, (80_000, 100), np.uint8))


@pytest.mark.parametrize("how", ["raw", "chunked", "form"])
def test_an_upload_that_does_not_fit(small: Service, disk: Path, how: str) -> None:
    content = too_big()
    body: dict[str, Any] = {"raw": {"content": content}, "form": {"files": {"file": content}}}.get(
        how, {"content": iter([content])}
    )
    answer = small.http.post("/v1/datasets", **body)
    told = problem(answer, 507, "insufficient_storage")
    assert "operator" in told["hint"]
    assert leftovers(disk) == []
    # What fits is taken as before.
    fits = npz(x=np.full((10, 10), len(how), np.uint8))
    assert small.upload("dataset", fits)["status"] == "ready"


def test_a_resumable_upload_waits_for_room(small: Service, disk: Path) -> None:
    content = npz(x=np.random.default_rng(2).integers(0, 256, (20_000, 100), np.uint8))
    headers = TUS | {"Upload-Length": str(len(content)), "Upload-Metadata": "kind ZGF0YXNldA=="}
    path = small.http.post("/v1/uploads", headers=headers).headers["location"]

    def send(offset: int) -> httpx.Response:
        more = TUS | {"Upload-Offset": str(offset)}
        return small.http.patch(path, headers=more, content=content[offset:])

    filler = fill(disk, leave=1_000_000)
    problem(send(0), 507, "insufficient_storage")
    offset = int(small.http.head(path, headers=TUS).headers["upload-offset"])
    assert 900_000 < offset <= 1_100_000
    filler.unlink()
    assert send(offset).status_code == 204
    id_ = small.http.get(path).json()["dataset"]
    assert small.inspected("dataset", id_)["status"] == "ready"
    assert small.http.get(f"/v1/datasets/{id_}/content").content == content


def test_a_variant_that_has_no_room_fails_and_can_be_retried(
    small: Service, disk: Path, files: Files
) -> None:
    model = small.upload("model", files.tflite)["id"]
    dataset = small.upload("dataset", files.npz)["id"]
    first = small.run(model=model, dataset=dataset, variants=["float16"])
    assert first["status"] == "succeeded"
    filler = fill(disk)
    job = small.run(model=model, dataset=dataset, variants=["float16", "dynamic_range", "int16x8"])
    # What is there needs no room.
    assert {v["name"]: v["status"] for v in job["variants"]}["float16"] in ("succeeded", "failed")
    errors = [v["error"] for v in job["variants"] if v["status"] == "failed"]
    assert errors, job
    assert {error["code"] for error in errors} == {"insufficient_storage"}
    assert all("room" in error["hint"] for error in errors)
    assert leftovers(disk) == []
    filler.unlink()
    assert small.http.post(f"/v1/jobs/{job['id']}/retry").status_code == 202
    again = small.job(job["id"], wait=60)
    assert again["status"] == "succeeded", again
    storage = open_storage(Settings(storage_url=f"file://{disk}/objects"))
    for variant in again["variants"]:
        for file in variant["artifacts"]:
            assert is_intact(storage, Stored(file["sha256"], file["size_bytes"]))
