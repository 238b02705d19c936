"""/readyz where parts hang or fail: each is named, and the answer comes all the same."""

import asyncio
import threading
from types import SimpleNamespace
from typing import cast

import pytest

from app.api import service
from app.api.deps import Parts

# A service that asks for no keys, and nothing else of it.
LOCAL = cast(Parts, SimpleNamespace(settings=SimpleNamespace(asks_for_keys=False)))


def test_a_part_that_hangs_is_told_and_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def refuse(_: Parts) -> None:
        raise PermissionError("/objects")

    checks = {
        "database": lambda _: answered.wait(60),
        "broker": lambda _: None,
        "storage": refuse,
    }
    monkeypatch.setattr(service, "CHECKS", checks)
    monkeypatch.setattr(service, "ANSWER_S", 0.2)

    async def ask() -> dict[str, str]:
        return {name: await service._told(name, LOCAL) for name in checks}

    told = asyncio.run(ask())
    answered.set()
    assert told == {
        "database": "no answer within 0.2 s",
        "broker": "ok",
        "storage": "PermissionError: /objects",
    }
