"""`litesmith techniques | targets | catalog | advise`: what is known, and what it advises."""

import json
from typing import Annotated, Any

import typer

from app.cli_options import check_file, size_bytes
from app.cli_output import connect, out, show_list

AsJson = Annotated[bool, typer.Option("--json", help="Print the service's JSON.")]


def techniques(context: typer.Context, as_json: AsJson = False) -> None:
    """List the techniques: the data they need and what they give."""
    with connect(context) as client:
        found = client.techniques()
    if as_json:
        out(json.dumps(found, indent=2))
        return
    for technique in found:
        identifier = technique.get("id") or technique.get("technique")
        title = technique.get("title") or technique.get("name") or ""
        out(f"{identifier}" + (f": {title}" if title and title != identifier else ""))
        for key, value in technique.items():
            if key not in ("id", "technique", "title", "name", "options") and value not in (
                None,
                [],
            ):
                out(f"  {key.replace('_', ' ')}: {_plain(value)}")
        options = (technique.get("options") or {}).get("properties") or {}
        if named := [name for name in options if name != "technique"]:
            out(f"  options: {', '.join(named)}")


def targets(context: typer.Context, as_json: AsJson = False) -> None:
    """List the targets: what they run, and whether this service makes files for them."""
    with connect(context) as client:
        found = client.targets()
    if as_json:
        out(json.dumps(found, indent=2))
        return
    for target in found:
        out(f"{target['id']}: {target['title']}")
        compiler = target.get("compiler")
        for key, value in (
            ("number formats", target["number_formats"]),
            ("options", target["options"]),
            ("compiler", compiler and f"{compiler['name']}, {_compiler(compiler)}"),
            ("notes", target["notes"]),
        ):
            if value:
                out(f"  {key}: {_plain(value)}")


def _compiler(compiler: dict[str, Any]) -> str:
    return str(compiler["version"] or "installed") if compiler["installed"] else "not installed"


def catalog(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models to start from."""
    with connect(context) as client:
        found = client.catalog()
    if as_json:
        out(json.dumps(found, indent=2))
        return
    show_list(
        ("ID", "PARAMETERS", "TOP-1", "LICENCE", "TITLE"),
        [
            (
                model["id"],
                f"{model['parameters']:,}",
                f"{model['accuracy']:.1%}",
                model["licence"],
                model["title"],
            )
            for model in found
        ],
    )


def advise(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A model file, or the id of a model (mdl_…).")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="A dataset file, or an id (dat_…).")
    ] = None,
    labels: Annotated[
        bool | None, typer.Option("--labels/--no-labels", help="Labelled data is at hand.")
    ] = None,
    representative_data: Annotated[
        bool | None,
        typer.Option("--samples-only/--no-samples", help="Unlabelled samples are at hand."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=0, help="How many samples.")] = None,
    target: Annotated[str, typer.Option(help="See `litesmith targets`.")] = "cpu",
    goal: Annotated[str, typer.Option(help="size, latency, accuracy or balanced.")] = "balanced",
    max_drop: Annotated[
        float | None, typer.Option(help="Limit: accuracy drop, a fraction (0.01 is one point).")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Limit: file size (500000, 500kB, 2MB, 1MiB).")
    ] = None,
    rejected: Annotated[bool, typer.Option(help="Show what is out, and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell which recipes are worth trying, and why."""
    check_file("model", model, "mdl_")
    check_file("dataset", data, "dat_")
    given: dict[str, Any] = {
        "has_labels": labels,
        "has_representative_data": representative_data,
        "samples": samples,
        "target": target,
        "goal": goal,
        "max_accuracy_drop": max_drop,
        "max_size_bytes": size_bytes(max_size),
    }
    known = {key: value for key, value in given.items() if value is not None}
    with connect(context) as client:
        found = client.advise(model, data, **known)
    if as_json:
        out(json.dumps(found, indent=2))
        return
    for note in found["notes"]:
        out(f"note: {note}")
    if not found["recommended"]:
        out("nothing fits; --rejected tells why")
    for one in found["recommended"]:
        out(f"{one['rank']}. {one['recipe']}: {_figures(one['expected'])}")
        for reason in one["reasons"]:
            out(f"     {reason}")
        for need in one["needs"]:
            out(f"     needs {need}")
    for one in found["rejected"] if rejected else []:
        out(f"not {one['recipe']}: {'; '.join(one['why_not'])}")
    for one in found["missing"]:
        out(f"missing {one['what']}: {one['message']}")
        out(f"     would allow: {', '.join(one['would_allow'])}")


def _figures(expected: dict[str, Any]) -> str:
    parts = [
        f"size {_span(expected['size_ratio'])}×",
        f"download {_span(expected['gzip_size_ratio'])}×",
        f"drop {_span(expected['accuracy_drop'])}",
    ]
    if expected.get("latency_ratio"):
        parts.append(f"latency {_span(expected['latency_ratio'])}×")
    return ", ".join(parts)


def _span(range_: list[float]) -> str:
    low, high = range_
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)
