"""Resumable uploads through several api processes, and into a bucket."""

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from moto.server import ThreadedMotoServer
from running import npz

from app.config import Settings
from app.main import create_app
from app.storage import open_storage

TUS = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}
DATASET = {"Upload-Metadata": f"kind {b64encode(b'dataset').decode()}"}


def local(app: FastAPI) -> TestClient:
    """A client on the service's own machine, which needs no key."""
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50_000))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test",
        aws_secret_access_key="test",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    yield url
    server.stop()


@pytest.fixture(params=["file", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, migrated_file: Path) -> Settings:
    (tmp_path / "litesmith.db").write_bytes(migrated_file.read_bytes())
    if request.param == "file":
        return Settings(data_dir=tmp_path)
    return Settings(
        data_dir=tmp_path,
        storage_url=f"s3://bucket/{tmp_path.name}",
        s3_endpoint=request.getfixturevalue("endpoint"),
        s3_access_key_id="test",
        s3_secret_access_key="test",
    )


def test_each_request_may_go_to_another_process(settings: Settings) -> None:
    whole = npz(x=[[1, 2], [3, 4]])
    with local(create_app(settings)) as first, local(create_app(settings)) as second:
        begin = TUS | DATASET | {"Upload-Length": str(len(whole))}
        path = first.post("/v1/uploads", headers=begin).headers["location"]
        for api, start, stop in ((second, 0, 100), (first, 100, 200), (second, 200, len(whole))):
            assert api.head(path, headers=TUS).headers["upload-offset"] == str(start)
            more = TUS | {"Upload-Offset": str(start)}
            assert api.patch(path, headers=more, content=whole[start:stop]).status_code == 204
        id_ = first.get(path).json()["dataset"]
        assert first.get(f"/v1/datasets/{id_}/content").content == whole
    storage = open_storage(settings)
    assert list(storage.partials.iterdir()) == list(storage.spool.glob("tmp*")) == []


def test_a_process_that_died_between_storing_and_telling(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is stored, the row knows its digest, and no dataset was made of it."""
    whole = npz(x=[[5, 6], [7, 8]])
    app = create_app(settings)
    with local(app) as api:
        begin = TUS | DATASET | {"Upload-Length": str(len(whole))}
        path = api.post("/v1/uploads", headers=begin).headers["location"]
        storage = app.state.parts.storage
        real = storage.adopt

        def adopt_and_die(file: Path, digest: str) -> None:
            real(file, digest)
            raise RuntimeError("died")

        monkeypatch.setattr(storage, "adopt", adopt_and_die)
        answer = api.patch(path, headers=TUS | {"Upload-Offset": "0"}, content=whole)
        assert answer.status_code == 500
    with local(create_app(settings)) as api:
        assert api.head(path, headers=TUS).headers["upload-offset"] == str(len(whole))
        id_ = api.get(path).json()["dataset"]
        assert api.get(f"/v1/datasets/{id_}/content").content == whole
