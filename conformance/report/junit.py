"""JUnit XML, as CI servers read it: one test case per case of the run.

A wrong result is a `failure`, a crash, hang or exception an `error`; refused, skipped and expected failures are
`skipped` with their reason. What makes a run fail beside its cases (nothing judged, a stale entry of an expectation
list) becomes a failing test case of its own, so that a CI server which only reads this file cannot show it green.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from attnspec.conformance import outcome
from attnspec.conformance.report.files import write
from attnspec.conformance.report.text import explanation
from attnspec.conformance.types import CaseResult, Report

# XML 1.0 has no way to write these, escaped or not; kernels print them anyway.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    """The report as a JUnit document."""
    cases = [_case(result, report) for result in report.results]
    cases += [_own(f"problem[{number}]", problem) for number, problem in enumerate(report.problems)]
    if not outcome.judged(report.results):
        cases.append(_own("a run judges something", report.summary or "no case came to a verdict"))
    kinds = [child.tag for case in cases for child in case]
    figures = {
        "tests": str(len(cases)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
        "time": f"{report.seconds:.3f}",
    }
    suite = ET.Element("testsuite", {"name": _text(f"attnspec {report.mechanism}"), **figures})
    properties = ET.SubElement(suite, "properties")
    told = {"candidate": report.candidate, "level": report.level, "seed": report.seed, "summary": report.summary}
    for name, value in {**told, **{f"declares.{key}": value for key, value in report.declares.items()}}.items():
        ET.SubElement(properties, "property", {"name": name, "value": _text(str(value))})
    suite.extend(cases)
    root = ET.Element("testsuites", figures)
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def write_junit(report: Report, path: str | Path) -> None:
    """Write the report.

    Raises:
        FileError: the path cannot be written.
    """
    write(path, junit(report))


def _case(result: CaseResult, report: Report) -> ET.Element:
    case = ET.Element(
        "testcase",
        {
            "classname": _text(f"{result.case.mechanism}.{result.case.group}"),
            "name": _text(result.case.id),
            "time": f"{result.seconds:.3f}",
        },
    )
    if result.status in outcome.FAILING:
        tag = "failure" if result.status in ("fail", "xpass") else "error"
        told = explanation(result, report)
        node = ET.SubElement(case, tag, {"type": result.status, "message": _text(told[0][1] if told else "")})
        node.text = _text("\n".join(f"{label}: {text}" for label, text in told))
    elif result.status != "pass":
        ET.SubElement(case, "skipped", {"type": result.status, "message": _text(result.message or result.status)})
    return case


def _own(name: str, message: str) -> ET.Element:
    case = ET.Element("testcase", {"classname": "attnspec", "name": name, "time": "0"})
    ET.SubElement(case, "failure", {"type": "run", "message": _text(message)}).text = _text(message)
    return case


def _text(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
