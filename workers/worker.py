"""A worker process: takes due tasks, holds their leases, runs their work in children."""

import logging
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app import queue
from app.config import Settings
from app.db import AWAY, Database
from app.domain.problems import Problem, WorkError
from app.domain.work import (
    AnalyzeWork,
    CatalogWork,
    Event,
    InspectDatasetWork,
    InspectModelWork,
    PrepareWork,
    TrainWork,
    VariantWork,
)
from app.logging import logged_as
from app.queue import Claim, Doorbell, LeaseLost
from app.services import damage
from app.services import tasks as abandoned
from app.storage import (
    CHUNK,
    Damaged,
    Storage,
    StorageAway,
    StorageFull,
    Stored,
    open_storage,
    room,
    store_file,
)
from app.tables import WorkerRow, new_id, now
from workers import compilers, runner
from workers.lease import Lease
from workers.outcome import Killed, log_tail, made_file
from workers.runner import Kind, Limits, Spares, Stopped
from workers.sandbox import probe
from workers.site import claim_work_dir, site_of

log = logging.getLogger(__name__)

Work = (
    CatalogWork
    | InspectModelWork
    | InspectDatasetWork
    | AnalyzeWork
    | PrepareWork
    | TrainWork
    | VariantWork
)
SEEN_EVERY_S = 3.0
STORAGE_AWAY_S = 5.0


def slots_of(settings: Settings) -> dict[str, int]:
    """How many tasks of each queue a worker runs at a time."""
    return {
        "inspect": 1,
        "fast": settings.fast_slots,
        "train": settings.train_slots,
        "webhooks": settings.webhook_slots,
    }


RETRY_S = 0.5


class ChildKilled(Exception):
    """Somebody killed the child: no finding about the file, so that it is made again."""


@dataclass(frozen=True)
class Made:
    """The result of a child's work, and its files in the storage."""

    result: dict[str, Any]
    files: dict[str, Stored]
    gzip_sizes: dict[str, int]
    seconds: float


def _gzip_size(path: Path) -> int:
    """Size of the file as `gzip -9` would leave it, without its name."""
    size, packer = 0, zlib.compressobj(9, wbits=31)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _unusable(name: str, *, damaged: bool) -> WorkError:
    """Why a stored file cannot be given to a child as `name`."""
    hint = (
        "Upload the same model and data again, which repairs them, and retry the job: what the"
        " service had made itself is made anew."
    )
    if damaged:
        found = "is damaged: its bytes do not have the digest under which they were kept"
        return WorkError("storage_corrupt", f"The stored file for '{name}' {found}.", hint)
    return WorkError("content_missing", f"The stored file for '{name}' is gone.", hint)


@contextmanager
def storing() -> Iterator[None]:
    """Tells a full disk, here or in the storage, as a WorkError."""
    try:
        with room():
            yield
    except StorageFull as error:
        raise WorkError(
            "insufficient_storage",
            f"There was no room left for the files of the work ({error}).",
            "Tell the operator; when there is room again, retry the job.",
        ) from error


class Worker:
    """The parts of a worker process; `run_queue` is called for every doorbell."""

    def __init__(self, settings: Settings, queues: list[str]) -> None:
        self.settings = settings
        self.id = f"{socket.gethostname()}-{os.getpid()}-{new_id('wrk')[-6:]}"
        self.database = Database(settings.database)
        self.storage: Storage = open_storage(settings)
        self.storage.sweep()
        self.doorbell = Doorbell(settings.broker)
        wanted: dict[Kind, int] = {
            "light": settings.light_spares,
            "tensorflow": settings.tensorflow_spares,
        }
        self.sandbox = probe.check(settings.sandbox, settings.sandbox_user)
        self._work_dir = settings.work_dir / self.id
        self._work_lock = claim_work_dir(self._work_dir)
        self._site = site_of(settings, self._work_dir)
        self.spares = Spares(wanted, self._site)
        self.compilers = compilers.installed(settings.edgetpu_compiler)
        # Set at the first signal to end: nothing more is claimed.
        self.stopping = threading.Event()
        # Set when the time to drain is up: what still runs is stopped and given back.
        self.handing_back = threading.Event()
        self.queues = queues
        slots = slots_of(settings)
        self._slots = {name: threading.Semaphore(slots[name]) for name in queues}
        self._seen = threading.Thread(target=self._report, name="seen", daemon=True)
        self._seen.start()

    def stop(self) -> None:
        """Claim nothing more, and give what runs `drain_s` to end; none when asked again."""
        if self.stopping.is_set() or self.settings.drain_s == 0:
            self.handing_back.set()
        else:
            drained = threading.Timer(self.settings.drain_s, self.handing_back.set)
            drained.daemon = True
            drained.start()
        self.stopping.set()

    def close(self) -> None:
        self.stopping.set()
        self.handing_back.set()
        self._seen.join()
        self._ring_for_what_is_left()
        self.spares.close()
        self.database.close()
        shutil.rmtree(self._work_dir, ignore_errors=True)
        self._work_lock.close()

    def _ring_for_what_is_left(self) -> None:
        """Doorbells that this worker heard while it stopped, others have not."""
        try:
            with self.database.read() as session:
                self.doorbell.ring(queue.waiting_queues(session))
        except AWAY:
            log.warning("the database is away: the reconciler will ring")

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction whose doorbell rings after the commit."""
        with self.database.write() as session:
            self.doorbell.ring_after_commit(session)
            yield session

    def run_queue(self, name: str, handle: Callable[["Worker", Lease], None]) -> None:
        """Run due tasks of a queue until none is left or all its slots are taken."""
        slot = self._slots.get(name)
        while slot is not None and not self.stopping.is_set() and slot.acquire(blocking=False):
            try:
                while not self.stopping.is_set() and (claim := self._claim(name)) is not None:
                    self._run(claim, handle)
            finally:
                slot.release()
            # What became due after the last look, while the slot was still taken.
            with self.database.read() as session:
                if name not in queue.waiting_queues(session):
                    return

    def _claim(self, name: str) -> Claim | None:
        with self.writing() as session:
            claim = queue.claim(session, name, self.id, self.settings.lease_s)
            if claim is not None and name in queue.waiting_queues(session):
                # For another slot, or another worker: a doorbell of this one may go unheard.
                queue.due(session, name)
            return claim

    def _run(self, claim: Claim, handle: Callable[["Worker", Lease], None]) -> None:
        started = time.perf_counter()
        with logged_as(claim.request_id, claim.subject_id):
            try:
                with Lease(self.database, self.settings, claim, self.handing_back) as lease:
                    handle(self, lease)
            except LeaseLost:
                log.info("stopped: cancelled, or given away", extra={"task": claim.kind})
            except Stopped:
                self._return(claim, failed=False)
            except StorageAway:
                # As when the database is away: it waits, and nothing has failed.
                log.exception("the storage does not answer", extra={"task": claim.kind})
                self._return(claim, failed=False, seconds=STORAGE_AWAY_S)
            except Exception as error:
                log.exception("task failed", extra={"task": claim.kind})
                # Of a database that went away under it: no fault of the task.
                gone = isinstance(error, AWAY) and getattr(error, "connection_invalidated", False)
                self._return(claim, failed=not gone)
            seconds = round(time.perf_counter() - started, 3)
            log.info("task ended", extra={"task": claim.kind, "duration_s": seconds})
            self.spares.refill()

    def _return(self, claim: Claim, *, failed: bool, seconds: float = 0.0) -> None:
        """Give the task back, or up where it has `failed` too often, as soon as the database
        answers. Past the lease, the reconciler does."""
        while True:
            try:
                if failed:
                    self._give_back_or_up(claim)
                else:
                    self._hand_back(claim, seconds)
                return
            except AWAY:
                log.warning("cannot give the task back: the database is away")
                failed = False
            if self.handing_back.wait(RETRY_S):
                return

    def _hand_back(self, claim: Claim, seconds: float, *, failed: bool = False) -> None:
        try:
            with self.writing() as session:
                queue.postpone(session, claim, seconds, failed=failed)
        except LeaseLost:
            log.info("stopped: cancelled, or given away", extra={"task": claim.kind})

    def _give_back_or_up(self, claim: Claim) -> None:
        """After an unexpected error: try again later, a few times."""
        lost = claim.lost + 1
        if lost < self.settings.max_attempts:
            self._hand_back(claim, queue.backoff(lost), failed=True)
            return
        problem = Problem(
            code="internal_error",
            message=f"The worker failed {lost} times at this.",
            hint="Report it with the job's id; the worker's log has the cause.",
        )
        try:
            with self.writing() as session:
                abandoned.lock_job(session, claim.kind, claim.subject_id)
                queue.finish(session, claim)
                abandoned.give_up(session, claim.kind, claim.subject_id, problem)
        except LeaseLost:
            log.warning("lease lost", extra={"task": claim.kind})

    def _report(self) -> None:
        """Say that this worker lives, until it ends."""
        while True:
            try:
                with self.database.write() as session:
                    details = {
                        "spares": self.spares.counts(),
                        "compilers": self.compilers,
                        "sandbox": self.sandbox,
                    }
                    session.merge(
                        WorkerRow(id=self.id, queues=self.queues, details=details, seen_at=now())
                    )
            except Exception:
                log.exception("cannot report")
            if self.stopping.wait(SEEN_EVERY_S):
                break
        try:
            with self.database.write() as session:
                session.execute(delete(WorkerRow).where(WorkerRow.id == self.id))
        except AWAY:
            log.warning("cannot say goodbye: the database is away")

    def _await_database(self, lease: Lease) -> None:
        """Until it answers: what took hours to make is not lost to its restart. Raises Stopped."""
        while not lease.should_stop():
            try:
                with self.database.read() as session:
                    session.execute(select(1))
                return
            except AWAY:
                log.warning("the result waits: the database is away")
                time.sleep(RETRY_S)
        raise Stopped

    @storing()
    def make(
        self,
        lease: Lease,
        work: Work,
        inputs: dict[str, str],
        on_event: Callable[[Event], None],
        *,
        tensorflow: bool,
        limits: Limits,
        outputs: Callable[[dict[str, Any]], dict[str, str]],
        gzipped: Callable[[str], bool] = lambda name: False,
    ) -> Made:
        """Have a child do `work`, and store what it made.

        `inputs`: file name below `in/` -> digest. `outputs` tells from the result which files to
        keep: name -> path; of those that are `gzipped` the compressed size is told. Raises
        WorkError, with the log's tail, Stopped and LeaseLost.
        """
        started = time.perf_counter()
        child = self.spares.take(
            "tensorflow" if tensorflow else "light",
            network=isinstance(work, CatalogWork) and work.weights != "random",
        )
        try:
            for name, digest in inputs.items():
                self._fetch(name, digest, child.inputs / name)
            directory = child.directory
            (directory / "spec.json").write_text(work.model_dump_json())
            if isinstance(work, TrainWork):
                # A training may take hours: who comes meanwhile should find a spare.
                self.spares.refill()
            # What compiles for a target starts the target's tools; nothing else starts anything.
            tools = isinstance(work, VariantWork) and work.target is not None
            try:
                result = runner.run(child, limits, on_event, lease.should_stop, tools=tools)
            except WorkError as error:
                again = lease.claim.lost + 1 < self.settings.max_attempts
                if isinstance(error, Killed) and again:
                    raise ChildKilled(str(error)) from error
                # What the child said itself needs no log beside it.
                if not (directory / "error.json").exists():
                    error.log_tail = log_tail(directory)
                raise
            kept = {name: made_file(directory, path) for name, path in outputs(result).items()}
            files = {name: self._store(lease, path) for name, path in kept.items()}
            sizes = {name: _gzip_size(path) for name, path in kept.items() if gzipped(name)}
            self._await_database(lease)
            return Made(result, files, sizes, round(time.perf_counter() - started, 3))
        finally:
            child.close()

    def _store(self, lease: Lease, path: Path) -> Stored:
        """Keep a file, as soon as the storage answers: it may have taken hours. Raises Stopped."""
        while not lease.should_stop():
            try:
                return store_file(self.storage, path)
            except StorageAway:
                log.warning("the result waits: the storage does not answer")
                time.sleep(STORAGE_AWAY_S)
        raise Stopped

    def _fetch(self, name: str, digest: str, to: Path) -> None:
        try:
            self.storage.fetch(digest, to)
        except (Damaged, FileNotFoundError) as error:
            with self.database.write() as session:
                damage.forget(session, digest)
            raise _unusable(name, damaged=isinstance(error, Damaged)) from error
        if self._site.user is not None:
            to.chmod(0o444)
