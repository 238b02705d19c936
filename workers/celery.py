"""The Celery app of the workers. `python -m workers.celery --queues inspect,fast,train`"""

import argparse
import logging
import os
import signal
from typing import Any

from celery import Celery, signals

from app.config import Settings
from app.logging import configure
from app.queue import QUEUES, WORK
from workers import tasks
from workers.worker import Worker, slots_of

log = logging.getLogger(__name__)


def create(settings: Settings, queues: list[str]) -> Celery:
    """A Celery app whose one task is to look into the queue that a message names.

    Acknowledged early: the message is a hint, and the database knows what is not done.
    """
    app = Celery("litesmith", broker=settings.broker)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "visibility_timeout": 60,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        },
    )
    holder: list[Worker] = []

    @signals.worker_init.connect(weak=False)
    def start(**_: Any) -> None:
        configure(settings, "worker")
        holder.append(Worker(settings, queues))

    @signals.worker_shutting_down.connect(weak=False)
    def stop(**_: Any) -> None:
        for worker in holder:
            worker.stop()
        # Celery's own second meaning of Ctrl-C waits, in the signal's handler, for the work's end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, at_once)

    def at_once(*_: Any) -> None:
        """The second signal: what runs is stopped and given back; the third waits for nothing."""
        for worker in holder:
            if worker.handing_back.is_set():
                os._exit(1)
            worker.stop()

    @signals.worker_shutdown.connect(weak=False)
    def close(**_: Any) -> None:
        for worker in holder:
            worker.close()

    @app.task(name=WORK)  # type: ignore[untyped-decorator, unused-ignore]
    def work(queue: str) -> None:
        for worker in holder:
            worker.run_queue(queue, tasks.handle)

    return app


def served(queues: list[str], slots: dict[str, int]) -> list[str]:
    """The queues asked for, with those that go with `fast`, but for those without slots: a worker
    that may not reach out has none for webhooks."""
    if "fast" in queues:
        queues = [*queues, *(name for name in ("inspect", "webhooks") if name not in queues)]
    return [name for name in queues if slots[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a worker.")
    parser.add_argument("--queues", default=",".join(QUEUES))
    parser.add_argument("--concurrency", type=int)
    arguments = parser.parse_args()
    settings = Settings()
    queues = [name for name in arguments.queues.split(",") if name]
    if unknown := set(queues) - set(QUEUES):
        parser.error(f"no such queue: {', '.join(sorted(unknown))}; there are {', '.join(QUEUES)}")
    slots = slots_of(settings)
    queues = served(queues, slots)
    concurrency = arguments.concurrency or sum(slots[name] for name in queues)
    create(settings, queues).worker_main(
        [
            "worker",
            "--pool=threads",
            f"--concurrency={concurrency}",
            f"--queues={','.join(queues)}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            f"--loglevel={settings.log_level}",
        ]
    )


if __name__ == "__main__":
    main()
