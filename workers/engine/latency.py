"""Latency of one sample, warm, measured in turns with the baseline so that noise hits both."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from app.domain.metrics import Latency
from app.domain.work import LatencySettings
from workers.engine.evaluate import Model
from workers.engine.samples import Array, Batch, Emit, silent

_WARM_RUNS = 5
# Long enough for the processor's clock to rise, and to see what else runs (ticks of 10 ms).
_WARM_S = 0.1
_LEAST_RUNS = 5
# A variant so slow that even the least runs would take this many times the limit is cut shorter.
_OVERTIME = 3.0
_CONTENDED_CORES = 0.2
# cpu_times counts ticks of 10 ms: fewer than these say nothing.
_CONTENDED_S = 0.05


@dataclass(frozen=True)
class Timing:
    """`latency` of the model measured; `baseline` and `ratio` (p50 / p50) where there was one."""

    latency: Latency
    baseline: Latency | None = None
    ratio: float | None = None


def measure(
    content: bytes,
    baseline: bytes | None,
    sample: Batch | None,
    settings: LatencySettings,
    emit: Emit = silent,
) -> Timing:
    """Time single invocations (batch 1) of a file, in turns with the baseline: A B A B ...

    `sample` is a batch of one (zeros where None). Stops after `settings.runs` turns or
    once `settings.time_limit_s` is spent, but not before 5 turns unless those would take three
    times the limit. With `settings.lock_file` no other measurement of this machine runs
    meanwhile. Setting inputs is not timed. Raises WorkError `does_not_load`,
    `does_not_allocate`, `does_not_run`, `inputs_do_not_fit`.
    """
    models = [Model(each, settings.threads) for each in (content, baseline) if each is not None]
    fed = [model.feed(sample if sample is not None else model.zeros()) for model in models]
    with machine_lock(settings.lock_file):
        load = _Load()
        _warm(models, fed, settings.time_limit_s * 0.2)
        turns: list[list[float]] = [[] for _ in models]
        started = time.monotonic()
        while len(turns[0]) < settings.runs:
            for model, arrays, times in zip(models, fed, turns, strict=True):
                model.set_again(arrays)
                begun = time.perf_counter_ns()
                model.invoke()
                times.append((time.perf_counter_ns() - begun) / 1e6)
            done, spent = len(turns[0]), time.monotonic() - started
            emit("latency", done / settings.runs, None)
            least = done >= _LEAST_RUNS or spent > _OVERTIME * settings.time_limit_s
            if spent > settings.time_limit_s and least:
                break
        contended = load.contended()
    found = [summary(times, settings.threads, contended) for times in turns]
    if len(found) == 1:
        return Timing(found[0])
    ratio = found[0].p50 / found[1].p50 if found[1].p50 > 0 else None
    return Timing(found[0], found[1], ratio)


def summary(times_ms: Sequence[float], threads: int, contended: bool = False) -> Latency:
    p50, p90, p99 = (float(p) for p in np.percentile(times_ms, [50, 90, 99]))
    return Latency(
        p50=p50,
        p90=p90,
        p99=p99,
        mean=float(np.mean(times_ms)),
        runs=len(times_ms),
        threads=threads,
        processor=processor(),
        contended=contended,
    )


def processor() -> str:
    """The processor's name as the kernel tells it, else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def machine_lock(path: str | None) -> Iterator[None]:
    """Hold a file's lock against every other process that measures; ends with the process."""
    if path is None:
        yield
        return
    # A lock needs no right to write, which a sandbox does not give.
    opened = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _warm(models: list[Model], fed: list[list[Array]], limit_s: float) -> None:
    """Run all models until caches, frequency and packed weights have settled."""
    started, rounds, spent = time.monotonic(), 0, 0.0
    while rounds == 0 or (spent < limit_s and (rounds < _WARM_RUNS or spent < _WARM_S)):
        for model, arrays in zip(models, fed, strict=True):
            model.set_again(arrays)
            model.invoke()
        rounds, spent = rounds + 1, time.monotonic() - started


class _Load:
    """What processes other than this one used of the machine since it was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Wall time, busy CPU seconds of the machine, CPU seconds of this process."""
        cpu = psutil.cpu_times()
        busy = sum(getattr(cpu, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        own = self._process.cpu_times()
        return time.monotonic(), busy + getattr(cpu, "steal", 0.0), own.user + own.system

    def contended(self) -> bool:
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return busy - own > max(_CONTENDED_CORES * wall, _CONTENDED_S)
