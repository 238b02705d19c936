"""Webhooks by the Python client: `client.webhooks`."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from app.client_http import Connection, pages, path_part
from app.client_types import View


class Webhook(View):
    """A webhook; `secret` is there when it was just made or rotated, and never again."""

    id: str
    url: str
    events: list[str]
    enabled: bool
    description: str = ""
    disabled_reason: str | None = None
    failing_since: datetime | None = None
    created_at: datetime | None = None
    secret: str | None = None


class Delivery(View):
    """A message to a webhook, and what came of its last attempt."""

    id: str
    webhook: str
    event: str
    status: str
    attempts: int
    body: str
    created_at: datetime | None = None
    next_attempt_at: datetime | None = None
    delivered_at: datetime | None = None
    response_status: int | None = None
    response_excerpt: str | None = None
    latency_ms: float | None = None
    error: str | None = None


class Webhooks:
    """The calls of /v1/webhooks; they need a key with the scope admin."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self, url: str, events: Sequence[str] = ("job.finished",), description: str = ""
    ) -> Webhook:
        """Be told of events at a URL; keep the `secret` of what this returns."""
        body = {"url": url, "events": list(events), "description": description}
        return Webhook.model_validate(self._connection.json("POST", "/v1/webhooks", json=body))

    def list(self, limit: int | None = None) -> Iterator[Webhook]:
        """All webhooks, newest first, or the first `limit` of them."""
        found = pages(self._connection, "/v1/webhooks", limit)
        return (Webhook.model_validate(item) for item in found)

    def get(self, webhook_id: str) -> Webhook:
        """One webhook."""
        return self._one("GET", webhook_id)

    def change(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given; `enabled=True` takes up a webhook that was disabled."""
        asked = {"url": url, "description": description, "enabled": enabled}
        body: dict[str, object] = {key: value for key, value in asked.items() if value is not None}
        if events is not None:
            body["events"] = [*events]
        found = self._connection.json("PATCH", _path(webhook_id), json=body)
        return Webhook.model_validate(found)

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook and its deliveries."""
        self._connection.call("DELETE", _path(webhook_id))

    def rotate_secret(self, webhook_id: str) -> Webhook:
        """A new secret; for a day the old one signs as well."""
        return self._one("POST", webhook_id, "/rotate-secret")

    def test(self, webhook_id: str) -> Delivery:
        """Send a message of type `webhook.test`."""
        found = self._connection.json("POST", f"{_path(webhook_id)}/test")
        return Delivery.model_validate(found)

    def deliveries(
        self, webhook_id: str, status: str | None = None, limit: int | None = None
    ) -> Iterator[Delivery]:
        """What was sent, is to be sent or could not be, newest first."""
        query = {} if status is None else {"status": status}
        found = pages(self._connection, f"{_path(webhook_id)}/deliveries", limit, query)
        return (Delivery.model_validate(item) for item in found)

    def replay(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a message again, with the same id and body."""
        path = f"{_path(webhook_id)}/deliveries/{path_part(delivery_id)}/replay"
        return Delivery.model_validate(self._connection.json("POST", path))

    def _one(self, method: str, webhook_id: str, more: str = "") -> Webhook:
        found = self._connection.json(method, f"{_path(webhook_id)}{more}")
        return Webhook.model_validate(found)


def _path(webhook_id: str) -> str:
    return f"/v1/webhooks/{path_part(webhook_id)}"
