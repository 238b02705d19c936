"""The client's uploads over a network that breaks."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from running import Service, npz

from app.client import Client, Unreachable


class BreakingProxy:
    """Forwards connections to the service, and cuts each one after so many bytes of the client;
    None: it cuts none."""

    def __init__(self, service: Service, cut_after: int | None) -> None:
        self.cut_after = cut_after
        self.cuts = 0
        self._target = (service.http.base_url.host, service.http.base_url.port)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._upwards, args=(client, server), daemon=True).start()
                threading.Thread(target=self._downwards, args=(server, client), daemon=True).start()

    def _upwards(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with closing(client), closing(server), suppress(OSError):
            while chunk := client.recv(65536):
                server.sendall(chunk)
                passed += len(chunk)
                if self.cut_after is not None and passed > self.cut_after:
                    self.cuts += 1
                    server.shutdown(socket.SHUT_RDWR)
                    client.shutdown(socket.SHUT_RDWR)
                    return

    def _downwards(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while chunk := server.recv(65536):
                client.sendall(chunk)


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "data.npz"
    seed = int.from_bytes(request.node.name.encode()[-4:])
    values = np.random.default_rng(seed).integers(0, 256, (60_000, 100), np.uint8)
    path.write_bytes(npz(x=values))
    return path


@pytest.fixture
def proxy(service: Service) -> Iterator[BreakingProxy]:
    proxy = BreakingProxy(service, cut_after=1_500_000)
    yield proxy
    proxy.close()


def test_an_upload_goes_on_over_connections_that_break(proxy: BreakingProxy, file: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Client(proxy.url) as client:
        dataset = client.upload_dataset(
            file, on_progress=lambda *done: seen.append(done), resumable=True
        )
        ready = client.wait_dataset(dataset.id)
    assert proxy.cuts >= 3
    assert (ready.sha256, ready.name) == (sha256(file.read_bytes()).hexdigest(), "data.npz")
    size = file.stat().st_size
    assert seen[-1] == (size, size)


def test_a_later_call_goes_on_where_the_first_one_ended(
    service: Service, proxy: BreakingProxy, file: Path
) -> None:
    with Client(proxy.url) as client, pytest.raises(Unreachable, match="called again, goes on"):
        client.upload_dataset(file, resumable=True, patience=0)
    seen: list[int] = []
    with Client(service.url) as client:
        dataset = client.upload_dataset(
            file, on_progress=lambda done, total: seen.append(done), resumable=True
        )
    assert seen[0] > 500_000
    assert dataset.sha256 == sha256(file.read_bytes()).hexdigest()


def test_a_small_file_goes_in_one_request(service: Service, file: Path) -> None:
    with Client(service.url) as client:
        dataset = client.upload_dataset(file)
    params = {"sha256": str(dataset.sha256)}
    assert service.http.get("/v1/uploads", params=params).json()["items"] == []
