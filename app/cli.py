"""The `litesmith` command: use a service, or run one.

Exit codes: 0 all well; 1 the job failed, or a budget is broken; 2 what was asked is wrong (usage,
a bad file, a refused request); 3 no service answers, or it failed; 130 interrupted.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from app.cli_analyze import analyze
from app.cli_doctor import doctor
from app.cli_keys import keys
from app.cli_knowledge import advise, catalog, targets, techniques
from app.cli_options import check_file, height_width, numbers, settings_of, size_bytes
from app.cli_output import FAILED, Target, Watch, connect, out, show_job, stop
from app.cli_resources import datasets, jobs, models
from app.cli_storage import backup, gc, restore
from app.cli_tenants import tenants
from app.cli_webhooks import usage, webhooks
from app.client import DEFAULT_URL
from app.domain.recipes import InvalidRecipe, parse_variant

main = typer.Typer(
    help="Make TensorFlow models small and fast for edge devices, and see it measured.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
main.add_typer(models, name="models")
main.add_typer(datasets, name="datasets")
main.add_typer(jobs, name="jobs")
main.add_typer(webhooks, name="webhooks")
for command in (advise, analyze, techniques, targets, catalog, usage):
    main.command()(command)

RUN = "Run a service"
main.add_typer(tenants, name="tenants", rich_help_panel=RUN)
main.add_typer(keys, name="keys", rich_help_panel=RUN)
for service_command in (gc, backup, restore, doctor):
    main.command(rich_help_panel=RUN)(service_command)

OptionalPath = Path | None
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.")]
DataDir = Annotated[OptionalPath, typer.Option(help="Folder for the database and files.")]


@main.callback()
def _target(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="LITESMITH_URL", help="The service to use.")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LITESMITH_API_KEY", help="The API key, where it needs one."),
    ] = None,
) -> None:
    context.obj = Target(url, api_key)


@main.command()
def optimize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model file, or the id of a model (mdl_…).")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="A dataset file, or an id (dat_…).")
    ] = None,
    calibration_data: Annotated[
        str | None, typer.Option(help="Another dataset to calibrate with.")
    ] = None,
    training_data: Annotated[
        str | None, typer.Option(help="Another dataset to train on (prune, cluster, qat).")
    ] = None,
    evaluation_data: Annotated[
        str | None, typer.Option(help="Another dataset to measure accuracy on.")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants", "-v", help="Comma-separated recipes: float16,int8,prune+int8; or auto."
        ),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(help="Let the advice choose: size, latency, accuracy or balanced."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="See `litesmith targets`; cpu by default.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Budget: accuracy drop, a fraction (0.01 is one point).")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Budget: file size (500000, 500kB, 2MB, 1MiB).")
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Budget: latency, as a part of the baseline's (0.8).")
    ] = None,
    max_arena: Annotated[
        str | None, typer.Option(help="Budget: tensor arena on a microcontroller (100KiB).")
    ] = None,
    max_flash: Annotated[
        str | None, typer.Option(help="Budget: the model in a microcontroller's flash (200KiB).")
    ] = None,
    out_dir: Annotated[
        OptionalPath, typer.Option("--out", "-o", help="Folder for the files and reports.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="fed = value × SCALE + offset; comma-separated per channel.")
    ] = None,
    offset: Annotated[str | None, typer.Option(help="See --scale.")] = None,
    resize: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize pictures to this height and width.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on at most so many samples.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the splits and of everything else.")
    ] = None,
    spec: Annotated[
        OptionalPath,
        typer.Option(exists=True, dir_okay=False, help="A JSON file of job fields; options win."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name for the uploaded model.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the job.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job as JSON.")] = False,
) -> None:
    """Upload a model and data, make the variants, and show what was gained and what it cost."""
    body = _read_spec(spec)
    for field, value in (
        ("dataset", data),
        ("calibration_dataset", calibration_data),
        ("training_dataset", training_data),
        ("evaluation_dataset", evaluation_data),
        ("seed", seed),
        ("goal", goal),
        ("target", target),
    ):
        if value is not None:
            body[field] = value
    _set(body, "budgets", max_accuracy_drop=max_drop, max_latency_ratio=max_latency_ratio)
    _set(body, "budgets", max_size_bytes=size_bytes(max_size))
    _set(body, "budgets", max_arena_bytes=size_bytes(max_arena))
    _set(body, "budgets", max_flash_bytes=size_bytes(max_flash))
    _set(body, "preprocessing", scale=numbers("scale", scale), offset=numbers("offset", offset))
    _set(body, "preprocessing", resize=height_width(resize))
    _set(body, "evaluation", max_samples=samples)
    check_file("model", model, "mdl_")
    for role in ("dataset", "calibration_dataset", "training_dataset", "evaluation_dataset"):
        check_file(role, body.get(role), "dat_")
    asked = _variants(variants, body)
    body.pop("model", None)
    with connect(context) as client, Watch(quiet=as_json) as watch:
        given: str | Path = model
        if name is not None and Path(model).exists():
            given = client.upload_model(
                model, name, lambda done, total: watch.upload(Path(model), done, total)
            ).id
        job = client.optimize(
            given,
            variants=asked,
            on_upload=watch.upload,
            on_event=watch.event,
            wait=wait,
            **body,
        )
    if as_json:
        out(job.model_dump_json(indent=2))
    elif wait:
        show_job(job)
    else:
        out(f"job {job.id}: {job.status}; follow it with `litesmith jobs watch {job.id}`")
    if not wait:
        return
    if out_dir is not None:
        with connect(context) as client:
            paths = client.save(job, out_dir)
        if not as_json:
            out("\n".join(["written:", *(f"  {path}" for path in paths)]))
    elif not as_json and any(variant.artifacts for variant in job.variants):
        out(f"get the files with `litesmith jobs download {job.id} --out DIR`")
    if not job.ok:
        raise typer.Exit(FAILED)


@main.command(rich_help_panel=RUN)
def serve(host: Host = None, port: Port = None, data_dir: DataDir = None) -> None:
    """Run the whole service on this machine, with nothing else installed."""
    from app.embedded import serve as serve_all

    raise typer.Exit(serve_all(settings_of(host=host, port=port, data_dir=data_dir)))


@main.command(rich_help_panel=RUN)
def api(host: Host = None, port: Port = None, data_dir: DataDir = None) -> None:
    """Run the HTTP API alone."""
    from app.serving import serve as serve_api

    serve_api(settings_of(host=host, port=port, data_dir=data_dir))


@main.command(rich_help_panel=RUN)
def worker(
    queues: Annotated[str, typer.Option(help="Comma-separated queues to serve.")] = "fast,train",
    concurrency: Annotated[int | None, typer.Option(min=1, help="Tasks at a time.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Run a worker alone."""
    from app.embedded import run_worker

    names = [queue.strip() for queue in queues.split(",") if queue.strip()]
    if not names or not set(names) <= {"fast", "train", "webhooks"}:
        raise stop(f"--queues: '{queues}' must name one or more of fast, train, webhooks")
    run_worker(settings_of(data_dir=data_dir), names, concurrency)


@main.command(rich_help_panel=RUN)
def beat(data_dir: DataDir = None) -> None:
    """Run the reconciler's clock alone."""
    from app.embedded import run_beat

    run_beat(settings_of(data_dir=data_dir))


@main.command(rich_help_panel=RUN)
def migrate(data_dir: DataDir = None) -> None:
    """Bring the database to this version's schema."""
    from app.db import DatabaseBusy
    from app.db import migrate as migrate_database

    try:
        migrate_database(settings_of(data_dir=data_dir))
    except DatabaseBusy as error:
        raise stop(str(error)) from None
    out("the database is at this version's schema")


def _read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise stop(f"--spec: {path} is not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise stop(f"--spec: {path} must hold one JSON object, the body of POST /v1/jobs")
    return found


def _set(body: dict[str, Any], section: str, **values: Any) -> None:
    """Put the values that were given into a section of the spec, which may be there or not."""
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return
    before = body.get(section) or {}
    if not isinstance(before, dict):
        raise stop(f"--spec: '{section}' must be an object")
    body[section] = {**before, **known}


def _variants(option: str | None, body: dict[str, Any]) -> list[Any] | Literal["auto"]:
    """The variants asked for, checked by the grammar before anything is uploaded."""
    from_spec = body.pop("variants", None)
    if option is not None:
        asked: Any = [part.strip() for part in option.split(",") if part.strip()]
    elif from_spec is not None:
        asked = from_spec
    elif body.get("goal") is not None:
        asked = "auto"
    else:
        has_data = any(body.get(role) for role in ("dataset", "calibration_dataset"))
        asked = ["float16", "dynamic_range", *(["int8"] if has_data else [])]
    if asked in ("auto", ["auto"]):
        return "auto"
    if not isinstance(asked, list) or not asked:
        raise stop("--variants: name at least one recipe, for example int8")
    for variant in asked:
        try:
            parse_variant(variant)
        except InvalidRecipe as error:
            raise stop(f"--variants: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise stop(f"--variants: {field}: {first['msg']}") from None
    return asked
