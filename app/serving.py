"""The api process: serves the application, and ends politely."""

import asyncio
import gc
import socket
from types import FrameType

import uvicorn

from app.api.watch import Watcher
from app.config import Settings
from app.logging import configure
from app.main import create_app
from app.services import keys

# Requests under way have at least so long to end after the first signal.
GRACE_S = 5


class Server(uvicorn.Server):
    """Ends event streams and waits at the first signal, and everything at the second."""

    def __init__(self, config: uvicorn.Config, watcher: Watcher) -> None:
        super().__init__(config)
        self._watcher = watcher
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._watcher.end)


def serve(settings: Settings) -> None:
    """Serve the api until SIGINT or SIGTERM. SystemExit where it would be open to nobody."""
    configure(settings, "api")
    if (refusal := keys.refusal(settings)) is not None:
        raise SystemExit(refusal)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(GRACE_S, round(settings.drain_s)),
        loop="uvloop",
        http="httptools",
    )
    config.load()
    # What was imported stays: to look through all of it again and again for garbage would stop
    # every request for a good part of a second.
    gc.collect()
    gc.freeze()
    Server(config, app.state.parts.watcher).run()
