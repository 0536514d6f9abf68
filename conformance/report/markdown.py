"""The report as Markdown, for a pull request or a job summary: verdict, table, limits, failures with their commands.

Long runs stay readable: a fixed number of failures is told in full, the others are listed by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from attnspec.conformance import outcome
from attnspec.conformance.report.files import write
from attnspec.conformance.report.text import explanation, tolerance_lines
from attnspec.conformance.types import Report

TOLD_IN_FULL = 20


def markdown(report: Report, axes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The report as a Markdown document; `axes` names the axes of outputs in messages."""
    lines = [
        f"# {_cell(report.candidate)}: {outcome.VERDICTS[report.exit_code]}",
        "",
        f"{_cell(report.summary)}.",
        "",
        *_headline(report),
        f"Mechanism `{report.mechanism}`, level `{report.level}`, seed {report.seed}, {report.seconds:.1f} s.",
        "",
        *_table(report),
    ]
    told = tolerance_lines(report)
    if told:
        lines += ["", "## Tolerance", "", *(f"- {label}: {_cell(text)}" for label, text in told)]
    if report.declares:
        lines += ["", "## Declared conventions", ""]
        lines += [f"- `{name}` = `{value}`" for name, value in report.declares.items()]
    if report.not_supported:
        lines += ["", "## Not supported, not exercised", ""]
        lines += [f"- `{name}`: {_cell(reason)}" for name, reason in report.not_supported.items()]
    if report.problems:
        lines += ["", "## Problems beside the cases", "", *(f"- {_cell(problem)}" for problem in report.problems)]
    lines += _failures(report, axes)
    if report.environment:
        lines += ["", "## Environment", ""]
        lines += [f"- {name}: {_cell(str(value))}" for name, value in report.environment.items()]
    return "\n".join(lines) + "\n"


def write_markdown(report: Report, path: str | Path, axes: Mapping[str, Sequence[str]] | None = None) -> None:
    """Write the report.

    Raises:
        FileError: the path cannot be written.
    """
    write(path, markdown(report, axes))


def _headline(report: Report) -> list[str]:
    most = outcome.headline(report.results)
    return [f"Diagnosis: {_cell(str(most['sentence']))}.", ""] if most is not None else []


def _table(report: Report) -> list[str]:
    groups = outcome.groups(report.results)
    if not groups:
        return ["No case ran."]
    statuses = [status for status in outcome.STATUSES if any(status in row for row in groups.values())]
    lines = [f"| group | {' | '.join(statuses)} |", f"|---|{'---:|' * len(statuses)}"]
    for group, row in groups.items():
        lines.append(f"| {_cell(group)} | {' | '.join(str(row.get(status, '')) for status in statuses)} |")
    total = outcome.counts(report.results)
    lines.append(f"| **all** | {' | '.join(str(total.get(status, '')) for status in statuses)} |")
    return lines


def _failures(report: Report, axes: Mapping[str, Sequence[str]] | None) -> list[str]:
    failed = outcome.failures(report)
    if not failed:
        return []
    lines = ["", "## Failures"]
    for result in failed[:TOLD_IN_FULL]:
        lines += ["", f"### `{result.case.id}` ({result.status})", ""]
        for label, text in explanation(result, report, axes):
            if label == "repeat":
                lines += ["", "```", text, "```"]
            else:
                lines.append(f"- {label}: {_cell(text)}")
    rest = failed[TOLD_IN_FULL:]
    if rest:
        lines += ["", f"And {len(rest)} more:", "", *(f"- `{result.case.id}` ({result.status})" for result in rest)]
    return lines


def _cell(text: str) -> str:
    """Text that cannot break out of a table cell or a list item."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
