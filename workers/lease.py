"""The lease of a task, kept while its work runs."""

import logging
import threading
import time
from typing import Self

from app import queue
from app.config import Settings
from app.db import Database
from app.queue import Claim, LeaseLost

log = logging.getLogger(__name__)


class Lease:
    """Keeps a claimed task's lease while its work runs, and learns that it is lost: because the
    job was cancelled, or another worker runs the task. `handing_back` is set when the worker gives
    back what it runs."""

    def __init__(
        self, database: Database, settings: Settings, claim: Claim, handing_back: threading.Event
    ) -> None:
        self.claim = claim
        self.lost = False
        self._database, self._settings = database, settings
        self._handing_back = handing_back
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def should_stop(self) -> bool:
        return self.lost or self._handing_back.is_set()

    def _keep(self) -> None:
        settings = self._settings
        held_until = time.monotonic() + settings.lease_s
        while not self._ended.wait(settings.heartbeat_s):
            try:
                self._beat()
                held_until = time.monotonic() + settings.lease_s
            except LeaseLost:
                self.lost = True
                return
            except Exception:
                # The database may be away for a moment; past the lease, somebody else may run it.
                log.exception("heartbeat failed")
                self.lost = time.monotonic() > held_until

    def _beat(self) -> None:
        with self._database.write() as session:
            queue.renew(session, self.claim, self._settings.lease_s)
