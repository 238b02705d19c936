"""Which queues a worker serves, and where the service listens."""

import socket

import pytest

from app import embedded
from app.config import Settings
from workers.celery import served
from workers.worker import slots_of


@pytest.mark.parametrize(
    ("asked", "webhook_slots", "serves"),
    [
        (["fast"], 4, ["fast", "inspect", "webhooks"]),
        (["fast", "train"], 0, ["fast", "train", "inspect"]),
        (["train"], 4, ["train"]),
        (["webhooks"], 4, ["webhooks"]),
    ],
)
def test_what_goes_with_fast(asked: list[str], webhook_slots: int, serves: list[str]) -> None:
    assert served(asked, slots_of(Settings(webhook_slots=webhook_slots))) == serves


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_port_that_is_taken_is_told(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as other:
        try:
            other.bind((host, 0))
        except OSError as error:
            pytest.skip(f"no {host} on this machine: {error}")
        other.listen()
        port = other.getsockname()[1]
        told = embedded._port_taken(Settings(host=host, port=port))
        assert told is not None
        assert "Give another --port" in told
    assert embedded._port_taken(Settings(host=host, port=port)) is None
