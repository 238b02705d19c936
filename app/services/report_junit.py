"""A job's report as JUnit XML, for CI."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from app.domain.table import budget_checks, budget_text, problem_text

Json = Mapping[str, Any]

# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(job: Json) -> str:
    """JUnit XML for CI: a test case for each variant and each budget.

    A broken budget is a failure, a variant that failed or was cancelled an error, one
    that is not finished skipped.
    """
    suites = ET.Element("testsuites", name=_xml(f"litesmith {job.get('id')}"))
    delivery = ET.SubElement(suites, "testsuite", name="variants")
    if job.get("error"):
        case = ET.SubElement(delivery, "testcase", classname="litesmith.job", name="job")
        _outcome(case, "error", job["error"].get("code"), problem_text(job["error"]))
    for variant in job.get("variants") or []:
        case = ET.SubElement(
            delivery, "testcase", classname="litesmith.variants", name=_xml(str(variant["name"]))
        )
        status = variant.get("status")
        if status == "failed":
            error = variant.get("error") or {"code": "failed", "message": "It failed"}
            _outcome(case, "error", error.get("code"), problem_text(error))
        elif status in ("cancelled", "skipped"):
            # Not as skipped: CI takes that for well, and nothing was delivered.
            _outcome(case, "error", status, f"The variant was {status}.")
        elif status != "succeeded":
            _outcome(case, "skipped", status, f"The variant is {status}.")
    checks = budget_checks(job)
    if checks:
        budgets = ET.SubElement(suites, "testsuite", name="budgets")
        for check in checks:
            name = _xml(f"{check.get('variant')} {check.get('budget')}")
            case = ET.SubElement(budgets, "testcase", classname="litesmith.budgets", name=name)
            if not check.get("passed"):
                _outcome(case, "failure", check.get("budget"), budget_text(check))
    _count(suites)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=False) + "\n"


def _outcome(case: ET.Element, tag: str, kind: object, text: str) -> None:
    outcome = ET.SubElement(case, tag, message=_xml(text))
    if tag != "skipped":
        outcome.set("type", _xml(str(kind)))
    outcome.text = _xml(text)


def _count(suites: ET.Element) -> None:
    for suite in [*suites, suites]:
        counts = {"tests": "testcase", "failures": "failure", "errors": "error"}
        for name, tag in (counts | {"skipped": "skipped"}).items():
            suite.set(name, str(len(list(suite.iter(tag)))))


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)
