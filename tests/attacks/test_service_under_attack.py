"""Hostile files given to a real service: each ends in a code, and the next job is served."""

from pathlib import Path
from typing import Any

import hostile
import pytest
from running import Service

UPLOADS = {
    "CVE-2025-1550": "unsafe_model",
    "CVE-2025-9905": "unsafe_model",
    "CVE-2025-9906": "unsafe_model",
}


def error_of(service: Service, kind: str, content: bytes, **params: str) -> dict[str, Any]:
    """The problem that the upload, or else its inspection, ends in."""
    answer = service.http.post(f"/v1/{kind}s", content=content, params=params)
    if answer.status_code >= 400:
        assert answer.status_code < 500, answer.text
        problem: dict[str, Any] = answer.json()
        return problem
    row = service.inspected(kind, answer.json()["id"])
    assert row["status"] == "invalid", row
    error: dict[str, Any] = row["error"]
    return error


def test_hostile_uploads_end_in_a_code_and_the_worker_serves_on(
    service: Service, model: str, dataset: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    worker = service.worker()
    for name, code in UPLOADS.items():
        assert error_of(service, "model", hostile.CVES[name](marker))["code"] == code
    sharing = hostile.sharing_tflite(100, 50_000)
    assert error_of(service, "model", sharing)["code"] == "corrupt_file"
    astray = hostile.zipped({"saved_model.pb": b"", "../../evil": b"evil"})
    assert error_of(service, "model", astray)["code"] == "unsafe_archive"
    links = hostile.tarred(**{"a/1.png": "/etc/passwd"})
    assert error_of(service, "dataset", links)["code"]
    assert not marker.exists()
    assert not list(service.data_dir.rglob("evil*"))
    assert service.worker().pid == worker.pid
    job = service.run(model=model, dataset=dataset, variants=["dynamic_range"], seed=515)
    assert job["status"] == "succeeded", job


def test_the_layers_of_the_workers_are_told(service: Service) -> None:
    ready = service.http.get("/readyz").json()
    assert set(ready["sandbox"]) == {
        "environment", "privileges", "user", "filesystem", "network", "processes", "limits"
    }  # fmt: skip
    assert ready["sandbox"]["environment"] == ready["sandbox"]["limits"] == "active"


def test_nothing_is_left_of_what_was_worked_on(service: Service, finished: dict[str, Any]) -> None:
    assert finished["status"] == "succeeded"
    homes = [path for path in (service.data_dir / "work").glob("*/*") if path.is_dir()]
    # Of the spares alone: nothing lies in them yet.
    for home in homes:
        assert list((home / "in").iterdir()) == []


@pytest.mark.parametrize("mode", ["nonsense", "1"])
def test_a_wrong_setting_is_told(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import ValidationError

    from app.config import Settings

    monkeypatch.setenv("LITESMITH_SANDBOX", mode)
    with pytest.raises(ValidationError):
        Settings()
