"""JSON logs with the request's and the job's id in every line."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from app.config import Settings
from app.masking import masking

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
subject_id: ContextVar[str | None] = ContextVar("subject_id", default=None)


class _Json(JsonFormatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """UTC, RFC 3339."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class _Context(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if (request := request_id.get()) is not None:
            record.request_id = request
        if (subject := subject_id.get()) is not None:
            record.subject_id = subject
        return True


class _Masked(logging.Formatter):
    """What another formatter makes, without secrets: in messages, their fields and tracebacks."""

    def __init__(self, inner: logging.Formatter, masked: Callable[[str], str]) -> None:
        super().__init__()
        self._inner, self._masked = inner, masked

    def format(self, record: logging.LogRecord) -> str:
        return self._masked(self._inner.format(record))


@contextmanager
def logged_as(request: str | None, subject: str) -> Iterator[None]:
    """Name the request and what is worked on in every log line of this block."""
    first, second = request_id.set(request), subject_id.set(subject)
    try:
        yield
    finally:
        request_id.reset(first)
        subject_id.reset(second)


def configure(settings: Settings, process: str) -> None:
    """Log to standard error, as JSON or as text, with `process` in every line."""
    handler = logging.StreamHandler(sys.stderr)
    formatter: logging.Formatter
    if settings.log_format == "json":
        formatter = _Json(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"process": process},
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        )
    else:
        formatter = logging.Formatter(
            f"%(asctime)s {process:6} %(levelname)s %(name)s: %(message)s"
        )
    handler.setFormatter(_Masked(formatter, masking(settings)))
    handler.addFilter(_Context())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("httpx", "httpcore", "uvicorn.access", "kombu", "celery.worker.strategy", "amqp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for own in ("uvicorn", "uvicorn.error", "uvicorn.access", "celery"):
        logging.getLogger(own).handlers[:] = []
        logging.getLogger(own).propagate = True
