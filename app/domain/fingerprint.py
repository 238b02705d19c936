"""The key of everything that is costly and reused: a digest of all that determines it."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

# Raised whenever the engine would give other bytes or other figures for the same request.
ENGINE_VERSION = 4


def fingerprint(kind: str, **determinants: Any) -> str:
    """SHA-256 of `kind`, the engine's version and the JSON of `determinants` (order-free keys)."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        raise TypeError(f"{type(value).__name__} has no canonical JSON")

    text = json.dumps(
        {"kind": kind, "engine": ENGINE_VERSION, **determinants},
        sort_keys=True,
        separators=(",", ":"),
        default=plain,
    )
    return hashlib.sha256(text.encode()).hexdigest()
