"""The Python client against the stand-in."""

import hashlib
import socket
from pathlib import Path

import pytest

from app.client import (
    BrokenDownload,
    Client,
    InvalidRequest,
    InvalidUpload,
    NotAllowed,
    NotFound,
    ServiceFailure,
    Unreachable,
    WaitTimeout,
)
from tests.client.conftest import FILE, StandIn


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model, data = tmp_path / "m.keras", tmp_path / "d.npz"
    model.write_bytes(b"m" * 3_000_000)
    data.write_bytes(b"d" * 100)
    return model, data


def test_optimize_does_it_all(service: StandIn, files: tuple[Path, Path], tmp_path: Path) -> None:
    seen = []
    with Client(service.url) as client:
        job = client.optimize(
            *files, variants=["float16", "int8"], out=tmp_path / "out", on_event=seen.append, seed=3
        )
        assert client.verdict(job.id).passed
    assert job.ok
    assert service.submitted[0] == {
        "model": "mdl_0", "dataset": "dat_1", "variants": ["float16", "int8"], "seed": 3,
    }  # fmt: skip
    # Both variants' files are named model.tflite by the service; neither overwrites the other.
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        "float16-model.tflite", "int8-model.tflite", "report.md", "report.json", "report.html",
    }  # fmt: skip
    assert (tmp_path / "out" / "int8-model.tflite").read_bytes() == FILE
    assert "int8" in job.table()
    assert "0.20 pp [-0.80, 1.20]" in job.table()
    # The stream was cut after event 2: nothing is lost and nothing comes twice.
    assert [event.id for event in seen] == [1, 2, 3, 4, 5, 6]
    assert service.resumed_from == [None, "2"]
    assert seen[-1].name == "end"


def test_upload_streams_with_a_length_and_reports_progress(
    service: StandIn, files: tuple[Path, Path]
) -> None:
    steps: list[tuple[int, int]] = []
    with Client(service.url, api_key="k") as client:
        model = client.upload_model(files[0], on_progress=lambda *step: steps.append(step))
    assert model.sha256 == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert service.upload_headers["content-length"] == "3000000"
    assert service.upload_headers["authorization"] == "Bearer k"
    assert steps[-1] == (3_000_000, 3_000_000)
    assert len(steps) == 3


def test_lists_follow_their_pages(service: StandIn, files: tuple[Path, Path]) -> None:
    with Client(service.url) as client:
        for _ in range(3):
            client.upload_model(files[1])
        assert [model.id for model in client.models(limit=2)] == ["mdl_2", "mdl_1"]
        assert len(list(client.models())) == 3


def test_an_analysis_that_takes_too_long_is_told(
    service: StandIn, files: tuple[Path, Path]
) -> None:
    with Client(service.url) as client:
        found = client.analyze(files[0], multiple_subgraphs=True)
        assert (found.mapped, found.subgraphs) == (1, 2)
        assert service.analyzed == [files[0].read_bytes()]
        with pytest.raises(WaitTimeout, match="ana_1 was analyzing after 0 s"):
            client.analyze(files[0], timeout=0)


def test_errors_are_told_as_what_they_are(service: StandIn, files: tuple[Path, Path]) -> None:
    bad = files[0].with_name("bad.keras")
    bad.write_bytes(b"BAD")
    with Client(service.url) as client:
        with pytest.raises(InvalidUpload, match=r"'bad.keras' is invalid: .* Export it with"):
            client.optimize(bad)
        with pytest.raises(InvalidRequest) as caught:
            client.submit({"model": "mdl_0", "variants": ["qat"]})
        assert caught.value.code == "missing_data"
        assert caught.value.errors == [{"field": "variants.0", "message": "needs labels"}]
        with pytest.raises(NotFound):
            client.job("../models/x")
        service.corrupt = True
        with pytest.raises(BrokenDownload):
            client.optimize(*files, variants=["int8"], out=files[0].parent / "out")
    assert list((files[0].parent / "out").iterdir()) == []


def test_no_service_and_a_foreign_one(service: StandIn) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable, match="litesmith serve"):
            client.model("mdl_0")
    with pytest.raises(Unreachable, match="no URL"):
        Client("ftp://here")
    with Client(f"{service.url}/docs?") as client, pytest.raises((ServiceFailure, NotFound)):
        client.techniques()


def test_errors_tell_no_password_of_the_url() -> None:
    with Client("http://me:hunter2secret@127.0.0.1:1/x") as client:
        assert client._connection._http.base_url.password == "hunter2secret"
        with pytest.raises(Unreachable) as caught:
            client.model("mdl_1")
    assert "http://127.0.0.1:1/x" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["ls_a b", "ls_ä", "ls_a\nX-Other: 1"])
def test_what_can_be_no_key_is_refused_before_it_is_sent(service: StandIn, key: str) -> None:
    with pytest.raises(NotAllowed, match="no key has"):
        Client(service.url, key)
    with Client(service.url, " ls_a\n") as client:
        assert client._connection._http.headers["authorization"] == "Bearer ls_a"
