import subprocess
import sys
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


MAKE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import hostile
hostile.make_models(Path(sys.argv[2]))
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that TensorFlow made: hostile.make_models tells which."""
    folder = tmp_path_factory.mktemp("models")
    command = [sys.executable, "-c", MAKE, str(Path(__file__).parent), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert made.returncode == 0, made.stderr
    return folder
