"""The comparison table of a job: its rows, made once for the CLI and for every report.

Everything here takes the Job as the plain JSON of the API, and is lenient: what a job that is not
finished, or failed, does not have is shown as a dash.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain.target_text import target_texts

HEADINGS = (
    "Variant",
    "Size",
    "Download (gzip)",
    "p50 latency",
    "Accuracy",
    "Drop [95 % interval]",
    "Notes",
)
# The columns where one value can be the best; the others hold text.
SIZE, DOWNLOAD, LATENCY, QUALITY, DROP, NOTES = 1, 2, 3, 4, 5, 6
DASH = "–"
CONTENDED = ("latency contended", "Something else loaded the machine while it was measured.")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One variant: its cells in the order of HEADINGS, and the columns where it is the best."""

    name: str
    status: str
    cells: tuple[str, ...]
    best: frozenset[int]


def rows(job: Json) -> list[Row]:
    """The baseline, where there is one, and then every variant in the order of the request."""
    baseline: Json | None = job.get("baseline")
    variants: Sequence[Json] = job.get("variants") or []
    subjects = ([baseline] if baseline else []) + list(variants)
    best = _best(variants)
    return [
        Row(
            name=display_name(subject, is_baseline=subject is baseline),
            status=str(subject.get("status") or ""),
            cells=_cells(subject, is_baseline=subject is baseline),
            best=frozenset(column for column, winners in best.items() if subject in winners),
        )
        for subject in subjects
    ]


def details(job: Json) -> list[tuple[str, str]]:
    """What the notes column only names: ("int8 (bias correction)", sentence) for each error and
    note, in full; and what each training took.

    What is said of several variants in the same words is said once.
    """
    told: dict[tuple[str, str], list[str]] = {}
    baseline: Json | None = job.get("baseline")
    subjects = [(b, True) for b in [baseline] if b] + [
        (v, False) for v in job.get("variants") or []
    ]
    for subject, is_baseline in subjects:
        texts = [("", problem_text(subject["error"]))] if subject.get("error") else []
        for note in subject.get("notes") or []:
            code = str(note.get("code"))
            texts.append((_words(code), _sentence(str(note.get("message") or code))))
        for stage in subject.get("training") or []:
            texts.append((f"{stage.get('technique')} training", training_text(stage)))
        texts += target_texts(subject.get("metrics") or {})
        if ((subject.get("metrics") or {}).get("latency_ms") or {}).get("contended"):
            texts.append(CONTENDED)
        for entry in dict.fromkeys(texts):
            told.setdefault(entry, []).append(display_name(subject, is_baseline=is_baseline))
    found = []
    for (about, text), names in told.items():
        who = "all" if 1 < len(names) == len(subjects) else ", ".join(names)
        found.append((f"{who} ({about})" if about else who, text))
    return found


def text_table(job: Json) -> str:
    """The table as aligned plain text, without control characters, for logs and terminals."""
    lines = [HEADINGS, *(row.cells for row in rows(job))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if 0 < i < NOTES else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def display_name(subject: Json, *, is_baseline: bool = False) -> str:
    """How a variant is called in tables; the baseline by what it is."""
    return "baseline (float32)" if is_baseline else str(subject.get("name") or DASH)


def problem_text(problem: Json) -> str:
    """A Problem as one or two sentences: what happened, and what to do next."""
    text = _sentence(str(problem.get("message") or problem.get("code") or "unknown error"))
    hint = problem.get("hint")
    return f"{text} {_sentence(str(hint))}" if hint else text


def training_text(stage: Json) -> str:
    """A trained stage as a sentence: "4 epochs on 1005 samples, best: 3 (accuracy 0.974 on
    held-out ones)."."""
    epochs, best = stage.get("epochs") or 0, stage.get("best_epoch")
    text = f"{epochs} epoch{'s' * (epochs != 1)} on {stage.get('samples')} samples"
    for figures in stage.get("history") or []:
        if figures.get("epoch") == best:
            score = figures.get("score")
            told = DASH if score is None else f"{score:.4g}"
            # Of too few samples none were held out: the loss is that of the training itself.
            whose = "training loss" if figures.get("metric") == "loss" else figures.get("metric")
            of = "" if figures.get("metric") == "loss" else " on held-out ones"
            text += f", best: {best} ({whose} {told}{of})"
    return text + (", taught by the original model." if stage.get("distilled") else ".")


def budget_checks(job: Json) -> list[Json]:
    """The checks of the job's verdict that judge a budget; whether a variant came at all is left
    to its own row."""
    checks = (job.get("verdict") or {}).get("checks") or []
    return [check for check in checks if check.get("budget") != "succeeded"]


def budget_text(check: Json) -> str:
    """One budget check as a sentence: "int8: accuracy drop 0.30 pp, at most 1.00 pp: kept"."""
    budget = str(check.get("budget"))
    bound = "at least" if budget.startswith("min_") else "at most"
    title = re.sub(r"^(max|min)_|_(bytes|ms)$", "", budget).replace("_", " ")
    value, limit = (budget_value(budget, check.get(key)) for key in ("value", "limit"))
    outcome = "kept" if check.get("passed") else "BROKEN"
    return f"{check.get('variant')}: {title} {value}, {bound} {limit}: {outcome}"


def budget_value(budget: str, value: float | None) -> str:
    """A budget's value or limit in the unit that its name gives."""
    if value is None:
        return "not measured"
    if budget.endswith("_bytes"):
        return size_text(value)
    if budget == "max_accuracy_drop":
        return f"{_signed(100 * value)} pp"
    if budget in ("min_accuracy", "min_agreement"):
        return f"{100 * value:.2f} %"
    if budget.endswith("_ratio"):
        return f"{value:.3g}×"
    if budget.endswith("_ms"):
        return f"{_milliseconds(value)} ms"
    return f"{value:.4g}"


def size_text(size_bytes: float) -> str:
    """Bytes in decimal units, three digits: "26.4 kB"."""
    if abs(size_bytes) < 1000:
        return f"{size_bytes:.0f} B"
    value = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.5 or unit == "TB":
            break
    return f"{value:.3g} {unit}"


def _cells(subject: Json, *, is_baseline: bool) -> tuple[str, ...]:
    metrics: Json = subject.get("metrics") or {}
    latency: Json = metrics.get("latency_ms") or {}
    return (
        display_name(subject, is_baseline=is_baseline),
        _with_ratio(_size(metrics.get("size_bytes")), metrics.get("size_ratio"), is_baseline),
        _with_ratio(
            _size(metrics.get("gzip_size_bytes")), metrics.get("gzip_size_ratio"), is_baseline
        ),
        _with_ratio(_latency(latency.get("p50")), metrics.get("latency_ratio"), is_baseline),
        _quality(metrics, is_baseline),
        DASH if is_baseline else _drop(metrics),
        _notes(subject),
    )


def _size(value: float | None) -> str:
    return DASH if value is None else size_text(value)


def _latency(value: float | None) -> str:
    return DASH if value is None else f"{_milliseconds(value)} ms"


def _milliseconds(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def _with_ratio(text: str, ratio: float | None, is_baseline: bool) -> str:
    if is_baseline or ratio is None or text == DASH:
        return text
    return f"{text} ({ratio:.2f}×)" if ratio < 10 else f"{text} ({ratio:.0f}×)"


def _quality(metrics: Json, is_baseline: bool) -> str:
    """Accuracy; for regression the error; without labels, how far it agrees with the baseline."""
    if (accuracy := metrics.get("accuracy")) is not None:
        return f"{100 * accuracy:.2f} %"
    for key, title in (("mse", "MSE"), ("mae", "MAE")):
        if (value := metrics.get(key)) is not None:
            return f"{title} {value:.4g}"
    if is_baseline:
        return DASH
    parts = []
    if (agreement := metrics.get("agreement")) is not None:
        parts.append(f"agrees {100 * agreement:.1f} %")
    if (sqnr := metrics.get("sqnr_db")) is not None:
        parts.append(f"SQNR {sqnr:.1f} dB")
    return ", ".join(parts) or DASH


def _drop(metrics: Json) -> str:
    drop = metrics.get("accuracy_drop")
    if drop is None:
        return DASH
    interval = metrics.get("accuracy_drop_ci95")
    if not interval:
        return f"{_signed(100 * drop)} pp"
    low, high = interval
    return f"{_signed(100 * drop)} pp [{_signed(100 * low)}, {_signed(100 * high)}]"


def _signed(points: float) -> str:
    """Points with two decimals; never "-0.00"."""
    return f"{round(points, 2) + 0.0:.2f}"


def _notes(subject: Json) -> str:
    status = subject.get("status")
    parts = []
    if error := subject.get("error"):
        parts.append(f"{status}: {error.get('code')}")
    elif status and status not in ("succeeded", "running"):
        parts.append(str(status))
    elif status == "running":
        parts.append(str(subject.get("stage") or status))
    parts += [_words(str(note.get("code"))) for note in subject.get("notes") or []]
    if subject.get("cached"):
        parts.append("cached")
    return ", ".join(dict.fromkeys(parts))


def _words(code: str) -> str:
    return code.replace("_", " ")


def _best(variants: Sequence[Json]) -> dict[int, list[Json]]:
    """The winners of each column, where at least two delivered variants differ in it."""
    done = [v for v in variants if v.get("status") == "succeeded" and v.get("metrics")]
    found: dict[int, list[Json]] = {}
    for column, key, sign in (
        (SIZE, "size_bytes", 1),
        (DOWNLOAD, "gzip_size_bytes", 1),
        (LATENCY, "p50", 1),
        (QUALITY, "accuracy", -1),
        (DROP, "accuracy_drop", 1),
    ):
        scored: list[tuple[float, Json]] = []
        for variant in done:
            metrics: Json = variant["metrics"]
            source = (metrics.get("latency_ms") or {}) if key == "p50" else metrics
            if (value := source.get(key)) is not None:
                scored.append((sign * value, variant))
        values = {value for value, _ in scored}
        if len(values) > 1:
            found[column] = [variant for value, variant in scored if value == min(values)]
    return found


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
