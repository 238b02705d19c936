"""`litesmith doctor`: each part of this machine, and what it lacks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.cli_output import FAILED, out, stop

MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


def doctor(
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the service's data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine: versions, sandbox, compilers, database, storage, broker.

    Ends with 1 where something is wrong that the settings ask for.
    """
    from app.config import Settings
    from app.doctor import Finding, examine

    try:
        settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    except ValidationError as error:
        entry = error.errors()[0]
        field = ".".join(str(part) for part in entry["loc"])
        raise stop(f"setting {field} (LITESMITH_{field.upper()}): {entry['msg']}") from None
    findings: list[Finding] = []
    for finding in examine(settings):
        if not as_json:
            if not findings or findings[-1].section != finding.section:
                out(f"{finding.section}")
            out(f"  {MARKS[finding.state]}  {finding.part}: {finding.told}")
        findings.append(finding)
    if as_json:
        out(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(FAILED)
