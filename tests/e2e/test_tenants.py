"""A service that asks for keys: two tenants with the same files and work, and no secret told."""

import io
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from running import LITESMITH, ROOT, Files, Postgres, Service, embedded, environment
from sqlalchemy import make_url

from app.db import Database
from app.services import keys

BUCKET_SECRET = "hunter2-of-the-bucket"


@dataclass(frozen=True)
class Guarded:
    """A service, a client of it for each tenant, and every secret that is in play."""

    one: Service
    two: Service
    secrets: list[str]
    key: str


@pytest.fixture(scope="module")
def guarded(
    postgres: Postgres, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    address = make_url(postgres.database(migrated_template))
    password = address.password or "hunter2-of-the-database"
    url = address.set(password=password).render_as_string(hide_password=False)
    database = Database(url)
    with database.write() as session:
        made = [keys.create(session, name, name, ["admin"])[1] for name in ("default", "other")]
    database.close()
    one, two = ({"authorization": f"Bearer {key}"} for key in made)
    settings = {"database_url": url, "s3_secret_access_key": BUCKET_SECRET, "auth": "on"}
    with (
        embedded(
            tmp_path_factory.mktemp("guarded"), light_spares=1, fast_slots=1, **settings
        ) as service,
        httpx.Client(base_url=service.url, timeout=30, headers=two) as http,
    ):
        service.http.headers.update(one)
        secrets = [password, BUCKET_SECRET, *(key[keys.PREFIX_LENGTH :] for key in made)]
        yield Guarded(service, replace(service, http=http), secrets, made[0])


def test_reuse_by_content_tells_a_tenant_nothing_of_another(guarded: Guarded, files: Files) -> None:
    def work(service: Service) -> tuple[set[int], list[bool]]:
        """Upload the same bytes, run the same job: what was answered, and what was reused."""
        ids, statuses = {}, set()
        for kind, file in (("model", files.tflite), ("dataset", files.npz)):
            answer = service.http.post(f"/v1/{kind}s", content=file.read_bytes())
            statuses.add(answer.status_code)
            ids[kind] = service.inspected(kind, answer.json()["id"])["id"]
        job = service.run(variants=["float16", "int8"], **ids)
        assert job["status"] == "succeeded", job
        return statuses, [v["cached"] for v in (job["baseline"], *job["variants"])]

    first = work(guarded.one)
    second = work(guarded.two)
    assert first == second == ({201}, [False, False, False])
    # The same once more: to itself, a tenant is told.
    assert work(guarded.one) == ({200}, [True, True, True])
    both = [
        {job["id"] for job in service.http.get("/v1/jobs").json()["items"]}
        for service in (guarded.one, guarded.two)
    ]
    assert [len(ids) for ids in both] == [2, 1]
    assert not both[0] & both[1]


def test_the_command_sends_its_key(guarded: Guarded) -> None:
    def litesmith(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(LITESMITH), *arguments],
            env=environment(url=guarded.one.url, **settings),
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert litesmith("models", "list", api_key=guarded.key).returncode == 0
    by_option = litesmith("--api-key", guarded.key, "jobs", "list", "--json")
    assert by_option.returncode == 0, by_option.stderr
    for key, told in (("", "LITESMITH_API_KEY"), ("ls_wrong", "not known"), ("lś", "no key has")):
        refused = litesmith("models", "list", api_key=key)
        assert refused.returncode == 2, refused.stderr
        assert told in refused.stderr
        assert "unauthenticated" in refused.stderr


def test_the_example_for_ci_sends_its_key(guarded: Guarded, files: Files, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    spec = '{"variants": ["float16"], "budgets": {"max_size_bytes": 100000}}'
    command = ["sh", "docs/examples/ci.sh", str(files.tflite), str(files.npz), spec, str(tmp_path)]

    def step(key: str) -> subprocess.CompletedProcess[str]:
        env = environment(url=guarded.one.url, api_key=key)
        return subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=90
        )

    done = step(guarded.key)
    assert done.returncode == 0, done.stderr
    assert "every budget holds" in done.stdout
    assert zipfile.is_zipfile(tmp_path / "artifacts.zip")
    refused = step("")
    assert refused.returncode == 22
    assert "unauthenticated" in refused.stderr


def test_no_secret_is_told_anywhere(guarded: Guarded, tmp_path: Path) -> None:
    service = guarded.one
    job = next(iter(service.http.get("/v1/jobs").json()["items"]))["id"]
    service.http.get("/v1/models", headers={"authorization": f"Bearer {guarded.key}x"})
    service.http.get(f"/v1/models/{guarded.key}")
    service.http.get("/healthz", headers={"x-request-id": guarded.key})
    told: dict[str, str] = {}
    paths = ["/v1/models", "/v1/datasets", "/v1/jobs", f"/v1/jobs/{job}", f"/v1/jobs/{job}/events",
             "/v1/keys", "/v1/audit", "/readyz", "/metrics", "/openapi.json"]  # fmt: skip
    for path in [*paths, *(f"/v1/jobs/{job}/report?format={f}" for f in ("json", "html", "csv"))]:
        answer = service.http.get(path)
        assert answer.status_code == 200, path
        told[path] = answer.text
    everything = service.http.get(f"/v1/jobs/{job}/artifacts.zip").content
    with zipfile.ZipFile(io.BytesIO(everything)) as archive:
        names = archive.namelist()
        assert any("manifest" in name for name in names)
        told |= {name: archive.read(name).decode("latin-1") for name in names}
    logs = [service.data_dir / "serve.log", *(service.data_dir / "logs").glob("*.log")]
    told |= {log.name: log.read_text(errors="replace") for log in logs}
    assert {"serve.log", "api.log", "worker.log", "beat.log"} <= told.keys()
    assert f'"key": "{service.http.get("/v1/keys").json()["items"][0]["id"]}"' in told["api.log"]
    for where, text in told.items():
        for secret in guarded.secrets:
            assert secret not in text, where
