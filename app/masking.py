"""Takes secrets out of text that is logged or shown."""

import json
import re
from collections.abc import Callable
from urllib.parse import quote, unquote

from app.config import Settings

# An API key but for its first characters, which name it; passwords in URLs.
API_KEY = re.compile(r"\b(ls_[A-Za-z0-9_-]{8})[A-Za-z0-9_-]{43}")
WEBHOOK_SECRET = re.compile(r"\b(whsec_)[A-Za-z0-9+/=]{20,}")
USER_PASSWORD = re.compile(r"(://[^\s:/@\"']*:)([^\s/@\"']+)@")
QUERY_PASSWORD = re.compile(r"([?&]password=)([^\s&\"']+)")
# What is shorter is no secret, and would be found in other words.
SHORTEST = 6


def mask(text: str) -> str:
    """Without API keys, secrets of webhooks and passwords of URLs."""
    text = WEBHOOK_SECRET.sub(r"\1***", API_KEY.sub(r"\1…", text))
    text = USER_PASSWORD.sub(r"\1***@", text)
    return QUERY_PASSWORD.sub(r"\1***", text)


def masking(settings: Settings) -> Callable[[str], str]:
    """`mask`, and without the secrets of these settings wherever they stand."""
    known = {settings.s3_secret_access_key or ""}
    for url in (settings.database, settings.broker):
        for pattern in (USER_PASSWORD, QUERY_PASSWORD):
            known |= {unquote(password) for _, password in pattern.findall(url)}
    secrets = {
        form
        for secret in known
        if len(secret) >= SHORTEST
        for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])
    }

    def masked(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        return mask(text)

    return masked
