"""Reports of a job: pure functions from the Job as the API's JSON to text, standard library only.

Whatever a user can name (models, variants, notes) is escaped for the format that it goes into.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from html import escape
from typing import Any

from app.domain.table import (
    HEADINGS,
    NOTES,
    budget_checks,
    budget_text,
    details,
    problem_text,
    rows,
)
from app.services.report_junit import to_junit

Json = Mapping[str, Any]

_CSV_METRICS = (
    "size_bytes",
    "gzip_size_bytes",
    "size_ratio",
    "gzip_size_ratio",
    "accuracy",
    "accuracy_drop",
    "accuracy_drop_ci95_low",
    "accuracy_drop_ci95_high",
    "agreement",
    "sqnr_db",
    "mse",
    "mae",
    "samples_evaluated",
    "latency_p50_ms",
    "latency_p90_ms",
    "latency_p99_ms",
    "latency_ratio",
    "peak_memory_bytes",
    "macs",
    "parameters",
    "sparsity",
    "integer_only",
    "arena_bytes",
    "flash_bytes",
    "edgetpu_ops_mapped",
    "edgetpu_ops_cpu",
    "ethos_u_inference_ms",
    "ethos_u_sram_bytes",
)


def render(job: Json, format: str) -> tuple[str, str]:
    """The report of a job in `format` (a key of FORMATS), and its media type.

    Raises KeyError for a format that is not in FORMATS.
    """
    write, media_type = FORMATS[format]
    return write(job), media_type


def to_json(job: Json) -> str:
    """The whole job, indented."""
    return json.dumps(job, indent=2, ensure_ascii=False, default=str) + "\n"


def to_markdown(job: Json) -> str:
    """A page for a pull request or a terminal: the verdict first, then the table."""
    lines = [f"# {_markdown(_title(job))}", "", _markdown(_summary(job)), ""]
    if job.get("error"):
        lines += [f"**Error:** {_markdown(problem_text(job['error']))}", ""]
    checks = budget_checks(job)
    if checks:
        lines += [f"**Verdict: {_markdown(str(job['verdict']['verdict']))}**", ""]
        lines += [f"- {_markdown(budget_text(check))}" for check in checks] + [""]
    lines.append("| " + " | ".join(HEADINGS) + " |")
    lines.append("|" + "|".join("---:" if 0 < i < NOTES else "---" for i in range(7)) + "|")
    for row in rows(job):
        cells = [
            f"**{_markdown(cell)}**" if i in row.best else _markdown(cell)
            for i, cell in enumerate(row.cells)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if told := details(job):
        lines += ["## Notes", ""]
        lines += [f"- **{_markdown(name)}**: {_markdown(text)}" for name, text in told] + [""]
    lines += ["## How it was measured", ""]
    lines += [f"- {_markdown(name)}: {_markdown(text)}" for name, text in _method(job)]
    if files := _files(job):
        lines += ["", "## Files", "", "| File | Kind | Bytes | sha256 |", "|---|---|---:|---|"]
        lines += [f"| {' | '.join(_markdown(cell) for cell in file)} |" for file in files]
    return "\n".join(lines) + "\n"


def to_html(job: Json) -> str:
    """One page that needs nothing else: no script, no font, no picture from anywhere."""
    head = "".join(
        f'<th scope="col"{_numeric(i)}>{escape(heading)}</th>' for i, heading in enumerate(HEADINGS)
    )
    body = "".join(
        f'<tr class="{escape(row.status)}">'
        + "".join(_html_cell(i, cell, i in row.best) for i, cell in enumerate(row.cells))
        + "</tr>"
        for row in rows(job)
    )
    parts = [
        f"<h1>{escape(_title(job))}</h1>",
        f"<p>{escape(_summary(job))}</p>",
        _html_verdict(job),
        _html_table(head, body),
        '<p class="quiet">Marked: the best of its column. Ratios are variant / baseline.</p>',
    ]
    if told := details(job):
        items = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in told)
        parts.append(f"<h2>Notes</h2><ul>{items}</ul>")
    method = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _method(job)
    )
    parts.append(f"<h2>How it was measured</h2><dl>{method}</dl>")
    if files := _files(job):
        lines = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(kind)}</td><td class=n>{escape(size)}</td>"
            f"<td><code>{escape(digest)}</code></td></tr>"
            for name, kind, size, digest in files
        )
        head = "<th>File</th><th>Kind</th><th class=n>Bytes</th><th>sha256</th>"
        parts.append(f"<h2>Files</h2>{_html_table(head, lines)}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(job))}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def to_csv(job: Json) -> str:
    """One line a variant, raw numbers; empty where something was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("variant", "status", *_CSV_METRICS, "cached", "error", "notes"))
    baseline: Json | None = job.get("baseline")
    subjects = [(b, True) for b in [baseline] if b] + [
        (v, False) for v in job.get("variants") or []
    ]
    for subject, is_baseline in subjects:
        values = _flat(subject.get("metrics") or {})
        writer.writerow(
            (
                _csv("baseline" if is_baseline else str(subject.get("name"))),
                subject.get("status"),
                *(values.get(name) for name in _CSV_METRICS),
                subject.get("cached"),
                (subject.get("error") or {}).get("code"),
                _csv("; ".join(str(note.get("message")) for note in subject.get("notes") or [])),
            )
        )
    return text.getvalue()


def _title(job: Json) -> str:
    return f"Litesmith report: {job.get('model_name') or _name(job.get('model'))}"


def _name(reference: Any) -> str:
    """A model or dataset as the job names it: its id, or an object with a name."""
    if isinstance(reference, Mapping):
        return str(reference.get("name") or reference.get("id"))
    return str(reference)


def _summary(job: Json) -> str:
    variants = job.get("variants") or []
    done = sum(variant.get("status") == "succeeded" for variant in variants)
    text = f"Job {job.get('id')} {job.get('status')}: {done} of {len(variants)} variants delivered"
    try:
        start = datetime.fromisoformat(str(job["started_at"]))
        seconds = (datetime.fromisoformat(str(job["finished_at"])) - start).total_seconds()
    except (KeyError, ValueError, TypeError):
        return text + "."
    return f"{text} in {seconds:.1f} s."


def _method(job: Json) -> list[tuple[str, str]]:
    """What a reader needs to trust the figures: data, split, samples, latency, tools, times."""
    spec: Json = job.get("spec") or {}
    baseline: Json = (job.get("baseline") or {}).get("metrics") or {}
    model = _name(job.get("model"))
    told = [("Model", f"{job['model_name']} ({model})" if job.get("model_name") else model)]
    for role in ("dataset", "calibration_dataset", "training_dataset", "evaluation_dataset"):
        value = job.get(role) or spec.get(role)
        if value:
            told.append((role.replace("_", " ").capitalize(), _name(value)))
    split = job.get("split") or job.get("splits")
    if split:
        told.append(("Split", _flatten(split)))
    told.append(("Seed", str(spec.get("seed", 0))))
    if samples := baseline.get("samples_evaluated"):
        told.append(
            (
                "Accuracy",
                f"on the delivered files, {samples} samples that calibration and training did not"
                " see; the interval is of the paired drop against the baseline, 95 %",
            )
        )
    told += _latency_method(job)
    if tools := job.get("tools") or job.get("tool_versions"):
        told.append(("Tools", _flatten(tools)))
    for key, title in (("created_at", "Created"), ("finished_at", "Finished")):
        if job.get(key):
            told.append((title, str(job[key])))
    return told


def _latency_method(job: Json) -> list[tuple[str, str]]:
    subjects = [job.get("baseline") or {}, *(job.get("variants") or [])]
    measured = [
        latency
        for subject in subjects
        if (latency := (subject.get("metrics") or {}).get("latency_ms"))
    ]
    if not measured:
        return []
    runs = sorted({int(latency.get("runs") or 0) for latency in measured})
    threads = sorted({int(latency.get("threads") or 0) for latency in measured})
    span = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    text = f"warm; {span} runs on {' or '.join(map(str, threads))} thread{'s' * (threads != [1])}"
    processors = sorted({str(m["processor"]) for m in measured if m.get("processor")})
    if processors:
        text += f" of {', '.join(processors)}"
    text += (
        "; each variant in turns with a baseline of its own, so that noise hits both: the ratio is"
        " of these two, and may differ from that of two rows"
    )
    return [("Latency", text)]


def _files(job: Json) -> list[tuple[str, str, str, str]]:
    return [
        (
            str(artifact.get("file_name")),
            str(artifact.get("kind")),
            str(artifact.get("size_bytes")),
            str(artifact.get("sha256")),
        )
        for variant in [job.get("baseline") or {}, *(job.get("variants") or [])]
        for artifact in variant.get("artifacts") or []
    ]


def _flatten(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flatten(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(_flatten(item) for item in value)
    return str(value)


def _flat(metrics: Json) -> dict[str, Any]:
    interval = metrics.get("accuracy_drop_ci95") or (None, None)
    latency: Json = metrics.get("latency_ms") or {}
    edgetpu: Json = metrics.get("edgetpu") or {}
    ethos_u: Json = metrics.get("ethos_u") or {}
    return {
        **metrics,
        "edgetpu_ops_mapped": edgetpu.get("mapped"),
        "edgetpu_ops_cpu": edgetpu.get("cpu"),
        "ethos_u_inference_ms": ethos_u.get("inference_ms"),
        "ethos_u_sram_bytes": ethos_u.get("sram_bytes"),
        "accuracy_drop_ci95_low": interval[0],
        "accuracy_drop_ci95_high": interval[1],
        **{f"latency_{key}_ms": latency.get(key) for key in ("p50", "p90", "p99")},
    }


def _markdown(text: str) -> str:
    """Text as itself: nothing in it is markup, ends a table's cell, or is HTML."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([\\`*_\[\]|<>])", r"\\\1", text.replace("&", "&amp;"))
    return re.sub(r"^([#+-]|\d+\.)(?=\s)", r"\\\1", text)


def _csv(text: str) -> str:
    """A text that a spreadsheet will not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _numeric(column: int) -> str:
    return " class=n" if 0 < column < NOTES else ""


def _html_table(head: str, body: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _html_cell(column: int, text: str, best: bool) -> str:
    if column == 0:
        return f'<th scope="row">{escape(text)}</th>'
    inner = f"<b>{escape(text)}</b>" if best else escape(text)
    classes = " ".join(name for name, on in (("n", 0 < column < NOTES), ("best", best)) if on)
    return f'<td class="{classes}">{inner}</td>' if classes else f"<td>{inner}</td>"


def _html_verdict(job: Json) -> str:
    text = ""
    if job.get("error"):
        text += f'<p class="fail"><b>Error</b>: {escape(problem_text(job["error"]))}</p>'
    checks = budget_checks(job)
    if not checks:
        return text
    verdict = str(job["verdict"]["verdict"])
    items = "".join(
        f'<li class="{"pass" if check.get("passed") else "fail"}">{escape(budget_text(check))}</li>'
        for check in checks
    )
    kind = "pass" if verdict == "pass" else "fail"
    return f'{text}<p class="{kind}"><b>Verdict: {escape(verdict)}</b></p><ul>{items}</ul>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --paper: #fff; --line: #d5dae1; --quiet: #5b6470;
  --good: #0b6b3a; --tint: #e3f4ea; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #15181c; --line: #3a4048;
  --quiet: #9aa4b0; --good: #7fdca6; --tint: #173324; --bad: #ff9a91; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
tbody th { white-space: nowrap; } td:last-child:not(.n) { min-width: 9rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.best { background: var(--tint); color: var(--good); }
.pass { color: var(--good); } .fail { color: var(--bad); } tr.failed th { color: var(--bad); }
.quiet { color: var(--quiet); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; } code { overflow-wrap: anywhere; font-size: .85em; }
"""

FORMATS: dict[str, tuple[Callable[[Json], str], str]] = {
    "json": (to_json, "application/json"),
    "markdown": (to_markdown, "text/markdown; charset=utf-8"),
    "html": (to_html, "text/html; charset=utf-8"),
    "csv": (to_csv, "text/csv; charset=utf-8"),
    "junit": (to_junit, "application/xml"),
}
