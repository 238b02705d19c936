"""What options of the `litesmith` command mean: files or ids, sizes, numbers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError

from app.cli_output import WRONG, stop

if TYPE_CHECKING:
    from app.config import Settings

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if not match:
        raise stop(f"--max-size: '{text}' is no size; write 500000, 500kB, 2MB or 1MiB")
    return int(float(match[1]) * _SIZES[match[2] or ""])


def numbers(option: str, text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise stop(
            f"--{option}: '{text}' must be a number, or one a channel: 0.1,0.2,0.3"
        ) from None
    return values[0] if len(values) == 1 else values


def height_width(text: str | None) -> list[int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match:
        raise stop(f"--resize: '{text}' must be HEIGHTxWIDTH, for example 224x224")
    return [int(match[1]), int(match[2])]


def check_file(what: str, given: Any, prefix: str) -> None:
    if given is None or (isinstance(given, str) and given.startswith(prefix)):
        return
    if not isinstance(given, str) or not Path(given).is_file():
        raise stop(
            f"{what}: there is no file '{given}'",
            hint=f"name a file, or an id that begins {prefix}",
        )


def settings(**given: Any) -> "Settings":
    """Settings from the environment, with what was given on the command line on top."""
    from app.config import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for entry in error.errors():
            field = ".".join(str(part) for part in entry["loc"])
            stop(f"setting {field} (LITESMITH_{field.upper()}): {entry['msg']}")
        raise typer.Exit(WRONG) from None
