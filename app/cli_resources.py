"""`litesmith models | datasets | jobs`: what is on the service."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from app.cli_output import FAILED, Watch, connect, out, show_fields, show_job, show_list
from app.client import Client, Dataset, Job, Model
from app.domain.table import problem_text, size_text

models = typer.Typer(help="Models on the service.", no_args_is_help=True)
datasets = typer.Typer(help="Datasets on the service.", no_args_is_help=True)
jobs = typer.Typer(help="Jobs on the service.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID")]
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The file to upload.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's JSON.")]
Limit = Annotated[int, typer.Option(min=1, help="Show at most so many, newest first.")]
Name = Annotated[str | None, typer.Option(help="A name for it; the file's name by default.")]


@models.command("list")
def list_models(context: typer.Context, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the models, newest first."""
    with connect(context) as client:
        _list(list(client.models(limit)), as_json)


@datasets.command("list")
def list_datasets(context: typer.Context, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the datasets, newest first."""
    with connect(context) as client:
        _list(list(client.datasets(limit)), as_json)


@models.command("show")
def show_model(context: typer.Context, model_id: Id, as_json: AsJson = False) -> None:
    """Show what the inspection found in a model."""
    with connect(context) as client:
        _show(client.model(model_id), as_json)


@datasets.command("show")
def show_dataset(context: typer.Context, dataset_id: Id, as_json: AsJson = False) -> None:
    """Show what the data check found in a dataset."""
    with connect(context) as client:
        _show(client.dataset(dataset_id), as_json)


@models.command("upload")
def upload_model(
    context: typer.Context, file: File, name: Name = None, as_json: AsJson = False
) -> None:
    """Upload a model and wait for its inspection."""
    with connect(context) as client:
        with Watch(quiet=as_json) as watch:
            found = client.upload_model(file, name, _progress(watch, file))
            ready = client.wait_model(found.id)
        _show(ready, as_json)


@models.command("from-catalog")
def model_from_catalog(
    context: typer.Context,
    catalog_id: Annotated[str, typer.Argument(metavar="ID", help="See `litesmith catalog`.")],
    weights: Annotated[str, typer.Option(help="imagenet or random.")] = "imagenet",
    seed: Annotated[int, typer.Option(min=0, help="Of random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Bring in a model of the catalog, and wait until it is made and inspected."""
    with connect(context) as client:
        found = client.model_from_catalog(catalog_id, weights, seed)
        _show(client.wait_model(found.id), as_json)


@datasets.command("upload")
def upload_dataset(
    context: typer.Context, file: File, name: Name = None, as_json: AsJson = False
) -> None:
    """Upload a dataset and wait for its data check."""
    with connect(context) as client:
        with Watch(quiet=as_json) as watch:
            found = client.upload_dataset(file, name, _progress(watch, file))
            ready = client.wait_dataset(found.id)
        _show(ready, as_json)


@models.command("delete")
def delete_model(context: typer.Context, model_id: Id) -> None:
    """Delete a model."""
    with connect(context) as client:
        client.delete_model(model_id)
    out(f"deleted {model_id}")


@datasets.command("delete")
def delete_dataset(context: typer.Context, dataset_id: Id) -> None:
    """Delete a dataset."""
    with connect(context) as client:
        client.delete_dataset(dataset_id)
    out(f"deleted {dataset_id}")


@jobs.command("list")
def list_jobs(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="Only jobs in this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs on this model.")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List the jobs, newest first."""
    with connect(context) as client:
        found = list(client.jobs(status, model, limit))
    if as_json:
        out(json.dumps([job.model_dump(mode="json") for job in found], indent=2))
        return
    show_list(
        ("ID", "STATUS", "DONE", "MODEL", "VERDICT", "CREATED", "VARIANTS"),
        [
            (
                job.id,
                job.status,
                f"{job.progress:.0%}",
                job.model or "",
                job.verdict.verdict if job.verdict else "",
                _moment(job.created_at),
                ", ".join(variant.name for variant in job.variants),
            )
            for job in found
        ],
    )


@jobs.command("show")
def show_one_job(context: typer.Context, job_id: Id, as_json: AsJson = False) -> None:
    """Show a job and its table."""
    with connect(context) as client:
        _print_job(client.job(job_id), as_json)


@jobs.command("cancel")
def cancel_job(context: typer.Context, job_id: Id) -> None:
    """Cancel a job that is not finished."""
    with connect(context) as client:
        job = client.cancel(job_id)
    out(f"job {job.id}: {job.status}; running work stops within seconds")


@jobs.command("retry")
def retry_job(context: typer.Context, job_id: Id) -> None:
    """Run again what did not succeed."""
    with connect(context) as client:
        job = client.retry(job_id)
    out(f"job {job.id}: {job.status}; follow it with `litesmith jobs watch {job.id}`")


@jobs.command("watch")
def watch_job(context: typer.Context, job_id: Id, as_json: AsJson = False) -> None:
    """Follow a job to its end; exit 1 where it failed or a budget is broken."""
    with connect(context) as client:
        job = watched(client, job_id, quiet=as_json)
    _print_job(job, as_json)
    if not job.ok:
        raise typer.Exit(FAILED)


@jobs.command("delete")
def delete_job(context: typer.Context, job_id: Id) -> None:
    """Delete a job that has ended, with its files."""
    with connect(context) as client:
        client.delete_job(job_id)
    out(f"deleted {job_id}")


@jobs.command("report")
def report_job(
    context: typer.Context,
    job_id: Id,
    format: Annotated[
        str, typer.Option(help="json, markdown, html, csv or junit.", show_default=True)
    ] = "markdown",
    to: Annotated[Path | None, typer.Option("--out", help="Write it to this file.")] = None,
) -> None:
    """Print a job's report, or write it to a file."""
    with connect(context) as client:
        text = client.report(job_id, format)
        if to is not None:
            to.write_text(text, encoding="utf-8")
    out(text.rstrip("\n") if to is None else to)


@jobs.command("download")
def download_job(
    context: typer.Context,
    job_id: Id,
    to: Annotated[Path, typer.Option("--out", help="The folder for the files and reports.")],
) -> None:
    """Download a job's files and reports."""
    with connect(context) as client:
        for path in client.save(client.job(job_id), to):
            out(path)


def watched(client: Client, job_id: str, quiet: bool) -> Job:
    """The job once it has ended, with its progress shown meanwhile."""
    with Watch(quiet=quiet) as watch:
        watch.job_id = job_id
        for event in client.events(job_id):
            watch.event(event)
    return client.job(job_id)


def _progress(watch: Watch, file: Path) -> Callable[[int, int], None]:
    return lambda done, total: watch.upload(file, done, total)


def _print_job(job: Job, as_json: bool) -> None:
    if as_json:
        out(job.model_dump_json(indent=2))
    else:
        show_job(job)


def _list(found: list[Model] | list[Dataset], as_json: bool) -> None:
    if as_json:
        out(json.dumps([item.model_dump(mode="json") for item in found], indent=2))
        return
    show_list(
        ("ID", "STATUS", "FORMAT", "SIZE", "CREATED", "NAME"),
        [
            (
                item.id,
                item.status,
                item.format or "",
                "" if item.size_bytes is None else size_text(item.size_bytes),
                _moment(item.created_at),
                item.name,
            )
            for item in found
        ],
    )


def _show(found: Model | Dataset, as_json: bool) -> None:
    if as_json:
        out(found.model_dump_json(indent=2))
        return
    size = None if found.size_bytes is None else size_text(found.size_bytes)
    pairs: list[tuple[str, object]] = [
        ("id", found.id),
        ("name", found.name),
        ("status", found.status),
        ("error", problem_text(found.error.model_dump()) if found.error else None),
        ("format", found.format),
        ("size", size),
        ("sha256", found.sha256),
        ("created", _moment(found.created_at)),
    ]
    if isinstance(found, Model):
        pairs += [("origin", found.origin), ("parameters", found.parameters)]
        for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
            pairs += [(kind, f"{t.name} {t.dtype} {t.shape}") for t in tensors or []]
    else:
        pairs += [
            (f"split {name}", f"{s.samples} samples{', labelled' if s.labelled else ''}")
            for name, s in (found.splits or {}).items()
        ]
        classes = found.classes or []
        pairs.append(("classes", f"{len(classes)}: {', '.join(classes[:20])}" if classes else None))
        pairs += [("warning", note.message) for note in found.warnings or []]
    show_fields(pairs)


def _moment(value: datetime | None) -> str:
    return "" if value is None else value.strftime("%Y-%m-%d %H:%M:%S")
