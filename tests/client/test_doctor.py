"""`litesmith doctor` on machines in several states."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import main
from app.config import Settings
from app.db import migrate


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    answer = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    found = {f"{one['section']}/{one['part']}": one for one in json.loads(answer.stdout)}
    return answer.exit_code, found


def test_a_machine_before_its_first_start(tmp_path: Path) -> None:
    status, found = doctor("--data-dir", str(tmp_path / "none"))
    assert status == 0
    assert found["service/database"]["state"] == "note"
    assert found["sandbox/environment"] == {
        "section": "sandbox", "part": "environment", "state": "ok", "told": "active"
    }  # fmt: skip
    assert found["machine/python"]["state"] == "ok"
    assert not (tmp_path / "none").exists()


def test_a_database_that_is_migrated_and_one_that_is_not(tmp_path: Path) -> None:
    migrate(Settings(data_dir=tmp_path))
    status, found = doctor("--data-dir", str(tmp_path))
    assert (status, found["service/database"]["state"]) == (0, "ok")
    (tmp_path / "litesmith.db").unlink()
    status, found = doctor("--data-dir", str(tmp_path))
    assert (status, found["service/database"]["state"]) == (1, "wrong")
    assert "litesmith migrate" in found["service/database"]["told"]


def test_what_is_wrong_is_told_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITESMITH_DATABASE_URL", "postgresql://me:hunter2@127.0.0.1:9/none")
    monkeypatch.setenv("LITESMITH_BROKER_URL", "redis://:hunter2@127.0.0.1:9/0")
    monkeypatch.setenv("LITESMITH_SANDBOX", "off")
    status, found = doctor("--data-dir", str(tmp_path))
    assert status == 1
    assert found["service/database"]["state"] == found["service/broker"]["state"] == "wrong"
    assert found["sandbox/all layers"]["state"] == "note"
    assert "hunter2" not in json.dumps(found)


def test_lines_for_people(tmp_path: Path) -> None:
    answer = CliRunner().invoke(main, ["doctor", "--data-dir", str(tmp_path / "none")])
    assert answer.exit_code == 0
    assert "  ok     environment: active" in answer.stdout.splitlines()
