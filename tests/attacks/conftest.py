from pathlib import Path

import pytest
from attacking import Attacks

from workers.runner import Site


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the children's, with something to steal and something to break."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("the secret")
    (folder / "secret").chmod(0o600)
    return folder


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Attacks:
    work = tmp_path / "work"
    work.mkdir()
    return Attacks(monkeypatch, Site(work))
