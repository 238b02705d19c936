"""A finished result and a storage that does not answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.storage import StorageAway, Stored
from workers import worker
from workers.lease import Lease
from workers.runner import Stopped
from workers.worker import Worker


@pytest.mark.parametrize("stopped", [False, True])
def test_a_result_waits_for_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    kept = Stored("0" * 64, 1)
    answers = iter([StorageAway("away"), StorageAway("away"), kept])

    def store(_: Any, path: Path) -> Stored:
        answer = next(answers)
        if isinstance(answer, StorageAway):
            raise answer
        return answer

    monkeypatch.setattr(worker, "store_file", store)
    monkeypatch.setattr(worker, "STORAGE_AWAY_S", 0)
    looks = iter([False, stopped, stopped])
    lease = cast(Lease, SimpleNamespace(should_stop=lambda: next(looks)))
    self = cast(Worker, SimpleNamespace(storage=None))
    if stopped:
        with pytest.raises(Stopped):
            Worker._store(self, lease, tmp_path)
    else:
        assert Worker._store(self, lease, tmp_path) is kept
