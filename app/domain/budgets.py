"""Budgets: the limits that every requested variant must hold, and the verdict over them."""

from collections.abc import Callable, Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.domain.metrics import Metrics


class Budgets(BaseModel):
    """Limits that hold for each variant of a job; what is None is not judged."""

    model_config = ConfigDict(extra="forbid")

    max_accuracy_drop: float | None = Field(default=None, ge=-1, le=1)
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    max_size_bytes: int | None = Field(default=None, ge=1)
    max_gzip_size_bytes: int | None = Field(default=None, ge=1)
    max_size_ratio: float | None = Field(default=None, gt=0)
    max_latency_ratio: float | None = Field(default=None, gt=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_peak_memory_bytes: int | None = Field(default=None, ge=1)
    max_arena_bytes: int | None = Field(default=None, ge=1)
    max_flash_bytes: int | None = Field(default=None, ge=1)


# Budgets that need labelled evaluation data, and those that need any.
NEED_LABELS = ("max_accuracy_drop", "min_accuracy")
NEED_DATA = (*NEED_LABELS, "min_agreement")
# Those that are measured for microcontrollers only.
MICRO = ("max_arena_bytes", "max_flash_bytes")


def _p50(metrics: Metrics) -> float | None:
    return metrics.latency_ms.p50 if metrics.latency_ms else None


_MEASURED: dict[str, Callable[[Metrics], float | None]] = {
    "max_accuracy_drop": lambda m: m.accuracy_drop,
    "min_accuracy": lambda m: m.accuracy,
    "min_agreement": lambda m: m.agreement,
    "max_size_bytes": lambda m: m.size_bytes,
    "max_gzip_size_bytes": lambda m: m.gzip_size_bytes,
    "max_size_ratio": lambda m: m.size_ratio,
    "max_latency_ratio": lambda m: m.latency_ratio,
    "max_latency_ms": _p50,
    "max_peak_memory_bytes": lambda m: m.peak_memory_bytes,
    "max_arena_bytes": lambda m: m.arena_bytes,
    "max_flash_bytes": lambda m: m.flash_bytes,
}


class Check(BaseModel):
    """One budget of one variant. `value` is None where it could not be measured: that breaks it.

    Every variant has a check "succeeded" as well: one that failed holds no budget.
    """

    variant: str
    budget: str
    limit: float | bool
    value: float | bool | None
    passed: bool


class Verdict(BaseModel):
    verdict: Literal["pass", "fail"]
    checks: list[Check]


def judge(budgets: Budgets, variants: Iterable[tuple[str, bool, Metrics | None]]) -> Verdict:
    """The verdict over (name, succeeded, metrics) of every requested variant."""
    checks = []
    for name, succeeded, metrics in variants:
        checks.append(
            Check(variant=name, budget="succeeded", limit=True, value=succeeded, passed=succeeded)
        )
        for budget, limit in budgets.model_dump(exclude_none=True).items():
            value = _MEASURED[budget](metrics) if metrics else None
            passed = value is not None and (
                value >= limit if budget.startswith("min_") else value <= limit
            )
            checks.append(
                Check(variant=name, budget=budget, limit=limit, value=value, passed=passed)
            )
    return Verdict(verdict="pass" if all(c.passed for c in checks) else "fail", checks=checks)
