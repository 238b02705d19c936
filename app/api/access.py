"""Which scope each operation needs, and which requests need no key."""

import re
from urllib.parse import urlsplit

from fastapi import Request

from app.config import is_loopback
from app.principal import OPERATOR

PUBLIC = {"/healthz", "/readyz"}
# What the protocol of uploads can do here: asked before anything else, by browsers without a key.
OPEN = {("OPTIONS", "/v1/uploads")}
# The whole service in figures, over all tenants.
OPERATORS = {"/metrics"}
ADMIN = re.compile(r"/v1/(keys|audit|webhooks)(/|$)")
# Changes nothing, though it is a POST.
READING = {("POST", "/v1/advise")}
# A proxy adds one of these: whoever stands behind it is not on this machine.
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


def scope_of(method: str, path: str) -> str | None:
    """The scope that an operation needs, by its method and its path as the route has it; None
    where it is open to all. What is not named here needs more rather than less."""
    if path in PUBLIC or (method, path) in OPEN:
        return None
    if path in OPERATORS:
        return OPERATOR
    if ADMIN.match(path):
        return "admin"
    if method in ("GET", "HEAD") or (method, path) in READING:
        return "read"
    return "write"


def from_this_machine(request: Request, origins: list[str]) -> bool:
    """Whether a request that came to a loopback address was also made here, by no stranger.

    Not through a proxy; not by a web page whose name was pointed at 127.0.0.1 (DNS rebinding: then
    `Host` has that name); not by a page of an origin that is not allowed (`origins`).
    """
    if request.client is None or not is_loopback(request.client.host):
        return False
    if any(name in request.headers for name in FORWARDED):
        return False
    if not _names_loopback(f"//{request.headers.get('host', '')}"):
        return False
    origin = request.headers.get("origin")
    return origin is None or origin in origins or _names_loopback(origin)


def _names_loopback(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname)
    except ValueError:
        return False
