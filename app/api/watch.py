"""Wakes the requests that wait for a job or an analysis: one look a tick for all of them, none
without any."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import Context

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from app.db import Database
from app.tables import AnalysisRow, JobRow

log = logging.getLogger(__name__)
TICK_S = 0.05
ANALYSIS = "ana_"


class Watcher:
    """Tells waiters that a job's event number or an analysis's status moved. Runs in the api's
    event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._seen: dict[str, int | str] = {}
        self._task: asyncio.Task[None] | None = None
        # Set when the process is to end: who waits says goodbye, and comes back elsewhere.
        self.ending = False

    @asynccontextmanager
    async def watching(self, id_: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set each time the subject moved; clear it before looking."""
        moved = asyncio.Event()
        self._waiting[id_].add(moved)
        if self._task is None or self._task.done():
            # For everybody: in no request's context, which would confine it to one tenant.
            self._task = asyncio.create_task(self._poll(), context=Context())
        try:
            yield moved
        finally:
            self._waiting[id_].discard(moved)
            if not self._waiting[id_]:
                del self._waiting[id_]
                self._seen.pop(id_, None)

    async def until(self, id_: str, ended: Callable[[], bool], seconds: float) -> None:
        """Return when `ended()`, which is asked each time the subject moved, or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self.watching(id_) as moved:
                while not self.ending and not await run_in_threadpool(ended):
                    await moved.wait()
                    moved.clear()

    async def _poll(self) -> None:
        while self._waiting:
            try:
                moved = await run_in_threadpool(self._marks, list(self._waiting))
            except SQLAlchemyError:
                # Without it, everybody who waits would never be told.
                log.exception("cannot look for news; trying again")
                await asyncio.sleep(1)
                continue
            for id_, mark in moved.items():
                if self._seen.get(id_) != mark and id_ in self._waiting:
                    self._seen[id_] = mark
                    for waiter in self._waiting[id_]:
                        waiter.set()
            await asyncio.sleep(TICK_S)

    def _marks(self, ids: list[str]) -> dict[str, int | str]:
        """What changes when a subject moves, of all that are waited for."""
        analyses = [id_ for id_ in ids if id_.startswith(ANALYSIS)]
        jobs = [id_ for id_ in ids if not id_.startswith(ANALYSIS)]
        found: dict[str, int | str] = {}
        with self._database.read() as session:
            if jobs:
                moved = select(JobRow.id, JobRow.event_seq).where(JobRow.id.in_(jobs))
                found.update((row.id, row.event_seq) for row in session.execute(moved))
            if analyses:
                made = select(AnalysisRow.id, AnalysisRow.status)
                made = made.where(AnalysisRow.id.in_(analyses))
                found.update((row.id, row.status) for row in session.execute(made))
        return found

    def end(self) -> None:
        """Send everybody who waits home. To be called in the event loop."""
        self.ending = True
        for waiters in self._waiting.values():
            for waiter in waiters:
                waiter.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
