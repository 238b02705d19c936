"""`litesmith webhooks`: who is told of events, and what came of it. `litesmith usage`."""

import json
from typing import Annotated

import typer

from app.cli_output import connect, out, say, show_fields, show_list
from app.client_webhooks import Delivery, Webhook

webhooks = typer.Typer(help="Be told of events over HTTP.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's JSON.")]
Limit = Annotated[int, typer.Option(min=1, help="Show at most so many, newest first.")]


@webhooks.command("create")
def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to POST; https://, or an allowed network.")],
    events: Annotated[str, typer.Option(help="Comma-separated; see docs/webhooks.md.")] = (
        "job.finished"
    ),
    description: Annotated[str, typer.Option(help="For people.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add a webhook and show its secret: this once."""
    names = [name.strip() for name in events.split(",") if name.strip()]
    with connect(context) as client:
        made = client.webhooks.create(url, names, description)
    _with_secret(made, as_json)


@webhooks.command("list")
def list_all(context: typer.Context, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List the webhooks, newest first."""
    with connect(context) as client:
        found = list(client.webhooks.list(limit))
    if as_json:
        out(json.dumps([item.model_dump(mode="json", exclude={"secret"}) for item in found]))
        return
    rows = [
        (hook.id, _state(hook), ",".join(hook.events), hook.url, hook.description) for hook in found
    ]
    show_list(("ID", "STATE", "EVENTS", "URL", "DESCRIPTION"), rows)


@webhooks.command("show")
def show(context: typer.Context, webhook_id: Id, as_json: AsJson = False) -> None:
    """Show one webhook."""
    with connect(context) as client:
        _show(client.webhooks.get(webhook_id), as_json)


@webhooks.command("enable")
def enable(context: typer.Context, webhook_id: Id) -> None:
    """Take up a webhook again that was disabled; what it missed can be replayed."""
    with connect(context) as client:
        _show(client.webhooks.change(webhook_id, enabled=True), False)


@webhooks.command("disable")
def disable(context: typer.Context, webhook_id: Id) -> None:
    """Send nothing to a webhook any more."""
    with connect(context) as client:
        _show(client.webhooks.change(webhook_id, enabled=False), False)


@webhooks.command("delete")
def delete(context: typer.Context, webhook_id: Id) -> None:
    """Delete a webhook and its deliveries."""
    with connect(context) as client:
        client.webhooks.delete(webhook_id)
    out(f"deleted {webhook_id}")


@webhooks.command("rotate-secret")
def rotate_secret(context: typer.Context, webhook_id: Id, as_json: AsJson = False) -> None:
    """Make a new secret and show it: this once. For a day the old one signs as well."""
    with connect(context) as client:
        made = client.webhooks.rotate_secret(webhook_id)
    _with_secret(made, as_json)


@webhooks.command("test")
def test(context: typer.Context, webhook_id: Id) -> None:
    """Send a message of type webhook.test."""
    with connect(context) as client:
        sent = client.webhooks.test(webhook_id)
    out(f"{sent.id}: {sent.status}; see `litesmith webhooks deliveries {webhook_id}`")


@webhooks.command("deliveries")
def deliveries(
    context: typer.Context,
    webhook_id: Id,
    status: Annotated[str | None, typer.Option(help="pending, delivered or failed.")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List what was sent, is to be sent, or could not be."""
    with connect(context) as client:
        found = list(client.webhooks.deliveries(webhook_id, status, limit))
    if as_json:
        out(json.dumps([item.model_dump(mode="json") for item in found], indent=2))
        return
    show_list(
        ("ID", "EVENT", "STATUS", "ATTEMPTS", "NEXT", "LAST ANSWER"),
        [
            (
                item.id,
                item.event,
                item.status,
                item.attempts,
                item.next_attempt_at.strftime("%m-%d %H:%M:%S") if item.next_attempt_at else "–",
                _answer(item),
            )
            for item in found
        ],
    )


@webhooks.command("replay")
def replay(
    context: typer.Context,
    webhook_id: Id,
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY")],
) -> None:
    """Send a message again, with the same id and body."""
    with connect(context) as client:
        sent = client.webhooks.replay(webhook_id, delivery_id)
    out(f"{sent.id}: {sent.status}")


def usage(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what your tenant uses, and its limits."""
    with connect(context) as client:
        found = client.usage()
    if as_json:
        out(json.dumps(found, indent=2))
        return
    used, limits = found["used"], found["limits"]
    names = {
        "storage_bytes": "max_storage_bytes",
        "concurrent_jobs": "max_concurrent_jobs",
        "jobs_today": "max_jobs_per_day",
        "queued_jobs": "max_queued_jobs",
    }
    rows = [
        (name, used[name], "none" if limits[limit] is None else limits[limit])
        for name, limit in names.items()
    ]
    show_list(("", "USED", "LIMIT"), rows)


def _state(hook: Webhook) -> str:
    if not hook.enabled:
        return "disabled"
    return "failing" if hook.failing_since else "enabled"


def _answer(item: Delivery) -> str:
    if item.error:
        return item.error
    return f"{item.response_status} in {item.latency_ms:.0f} ms" if item.latency_ms else ""


def _with_secret(made: Webhook, as_json: bool) -> None:
    if as_json:
        out(made.model_dump_json(indent=2))
        return
    _show(made, False)
    say("Keep the secret now: it is not shown again.")
    out(made.secret)


def _show(hook: Webhook, as_json: bool) -> None:
    if as_json:
        out(hook.model_dump_json(indent=2, exclude={"secret"}))
        return
    show_fields(
        [
            ("id", hook.id),
            ("url", hook.url),
            ("events", ", ".join(hook.events)),
            ("description", hook.description),
            ("state", _state(hook)),
            ("reason", hook.disabled_reason),
            ("failing since", hook.failing_since),
        ]
    )
