"""The JSON report: a run as data, with a published schema (`report.schema.json`), written and read back.

Used by `attnspec check --json`, by whoever compares runs, and by the tests of the other reports. Numbers that JSON
cannot hold are written as the strings "inf", "-inf" and "nan". `read` refuses a file that does not follow the schema.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnspec.conformance import outcome
from attnspec.conformance.report.files import FileError, write
from attnspec.conformance.report.text import repeat_command
from attnspec.conformance.types import Case, CaseResult, OutputEvidence, Report

SCHEMA = Path(__file__).with_name("report.schema.json")
FORMAT = "attnspec.report"
VERSION = 1
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def document(report: Report) -> dict[str, Any]:
    """The report as a JSON-ready dictionary."""
    from attnspec import __version__

    return {
        "format": FORMAT,
        "version": VERSION,
        "attnspec": __version__,
        "verdict": outcome.VERDICTS[report.exit_code],
        "exit_code": report.exit_code,
        "summary": report.summary,
        "candidate": report.candidate,
        "mechanism": report.mechanism,
        "level": report.level,
        "seed": report.seed,
        "seconds": plain(report.seconds),
        "counts": outcome.counts(report.results),
        "groups": outcome.groups(report.results),
        "problems": list(report.problems),
        "declares": plain(report.declares),
        "not_supported": dict(report.not_supported),
        "rounding": plain(report.rounding),
        "environment": plain(report.environment),
        "results": [_result(result, report) for result in report.results],
    }


def write_json(report: Report, path: str | Path) -> None:
    """Write the report; it is checked against its schema first.

    Raises:
        FileError: the path cannot be written.
    """
    content = document(report)
    validate(content)
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Report:
    """Read a report back.

    Raises:
        FileError: no such file, not JSON, or not a report; the message says where.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        raise FileError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    try:
        validate(content)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return _report(content)


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def validate(content: Any) -> None:
    """Check a document against the published schema.

    Raises:
        FileError: names the place of the first departure and what was expected there.
    """
    errors = sorted(_validator().iter_errors(content), key=lambda error: [str(part) for part in error.absolute_path])
    if errors:
        place = ".".join(str(part) for part in errors[0].absolute_path) or "top level"
        raise FileError(f"{place}: {errors[0].message}")


def _result(result: CaseResult, report: Report) -> dict[str, Any]:
    return {
        "case": plain(dataclasses.asdict(result.case)),
        "status": result.status,
        "message": result.message,
        "evidence": [plain(dataclasses.asdict(evidence)) for evidence in result.evidence],
        "diagnosis": plain(result.diagnosis),
        "seconds": plain(result.seconds),
        "oracle_seconds": plain(result.oracle_seconds),
        "receipt": plain(result.receipt),
        "repeat": repeat_command(result.case.id, report) if result.status in outcome.FAILING else None,
    }


def plain(value: Any) -> Any:
    """Reduce to what JSON holds: NumPy scalars and arrays, tuples, sets and paths become their plain counterparts."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else ("nan" if math.isnan(number) else f"{number:+}".replace("+", ""))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _number(value: Any) -> float:
    return _SPECIAL[value] if isinstance(value, str) else float(value)


def _report(content: Mapping[str, Any]) -> Report:
    return Report(
        candidate=content["candidate"],
        mechanism=content["mechanism"],
        level=content["level"],
        results=[_case_result(entry) for entry in content["results"]],
        declares=dict(content["declares"]),
        not_supported=dict(content["not_supported"]),
        environment=dict(content["environment"]),
        seed=content["seed"],
        rounding=dict(content["rounding"]),
        seconds=_number(content["seconds"]),
        exit_code=content["exit_code"],
        summary=content["summary"],
        problems=list(content["problems"]),
    )


def _case_result(entry: Mapping[str, Any]) -> CaseResult:
    return CaseResult(
        case=_case(entry["case"]),
        status=entry["status"],
        evidence=[_evidence(item) for item in entry["evidence"]],
        message=entry["message"],
        diagnosis=dict(entry["diagnosis"]),
        seconds=_number(entry["seconds"]),
        oracle_seconds=_number(entry["oracle_seconds"]),
        receipt=dict(entry["receipt"]),
    )


def _case(entry: Mapping[str, Any]) -> Case:
    rows = entry["rows"]
    return Case(
        **{
            **entry,
            "inputs": tuple(entry["inputs"]),
            "rows": None if rows is None else {index: tuple(values) for index, values in rows.items()},
        }
    )


def _evidence(entry: Mapping[str, Any]) -> OutputEvidence:
    figures = ("rms_z", "max_z", "rms_limit", "max_limit", "worst_got", "worst_want", "worst_sigma")
    return OutputEvidence(
        **{
            **entry,
            **{name: _number(entry[name]) for name in figures},
            "worst_index": tuple(entry["worst_index"]),
        }
    )
