"""The report for a terminal: the verdict first, then counts, limits, what was not exercised, and each failure.

`render` gives plain text, so that a pipe or a log gets no escape codes; `show` colours it where the stream is a
terminal. It prints to standard output only; progress is the business of `conformance.progress`.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

from attnspec.conformance import outcome
from attnspec.conformance.report.text import explanation, tolerance_lines
from attnspec.conformance.types import CaseResult, Report

TOLD_IN_FULL = 10
_LABEL = 13
_STYLES = {outcome.CONFORMS: "32", outcome.DOES_NOT_CONFORM: "31", outcome.COULD_NOT_JUDGE: "33"}


def render(
    report: Report, axes: Mapping[str, Sequence[str]] | None = None, *, width: int = 110, quiet: bool = False
) -> str:
    """The report as plain text of at most `width` columns where words allow it.

    Args:
        axes: names of the axes of outputs, for messages.
        quiet: the verdict and the failures only.
    """
    lines = [f"{outcome.VERDICTS[report.exit_code].upper()}: {_after_verdict(report)}"]
    told: list[tuple[str, str]] = []
    most = outcome.headline(report.results)
    if most is not None:
        told.append(("diagnosis", str(most["sentence"])))
    if not quiet:
        told += [("candidate", _candidate(report)), ("judged", _judged(report))]
        told += tolerance_lines(report)
        if report.declares:
            told.append(("declared", ", ".join(f"{name} = {value}" for name, value in report.declares.items())))
        told += _grouped("unsupported", report.not_supported)
    told += [("problem", problem) for problem in report.problems]
    for label, text in told:
        lines += _field(label, text, width)
    if not quiet:
        lines += _table(report)
    lines += _failures(report, axes, width)
    return "\n".join(lines) + "\n"


def show(
    report: Report,
    axes: Mapping[str, Sequence[str]] | None = None,
    *,
    quiet: bool = False,
    stream: TextIO | None = None,
) -> None:
    """Print the report to standard output, coloured and fitted where that is a terminal."""
    out = stream or sys.stdout
    terminal = out.isatty()
    width = max(60, min(shutil.get_terminal_size().columns, 130)) if terminal else 110
    text = render(report, axes, width=width, quiet=quiet)
    if terminal:
        first, _, rest = text.partition("\n")
        verdict, _, sentence = first.partition(":")
        text = f"\x1b[1;{_STYLES[report.exit_code]}m{verdict}\x1b[0m:{sentence}\n{rest}"
    out.write(text)
    out.flush()


def _after_verdict(report: Report) -> str:
    verdict, colon, sentence = report.summary.partition(": ")
    return sentence if colon and verdict == outcome.VERDICTS[report.exit_code] else report.summary


def _candidate(report: Report) -> str:
    facts = [report.environment.get(name) for name in ("framework", "version", "device")]
    known = [str(fact) for fact in facts if fact]
    return f"{report.candidate} as {report.mechanism}" + (f" ({', '.join(known)})" if known else "")


def _judged(report: Report) -> str:
    return f"{len(report.results)} cases at level {report.level}, seed {report.seed}, in {report.seconds:.1f} s"


def _grouped(label: str, reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names that share a reason share a line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return [(label, f"{', '.join(names)}: {reason}") for reason, names in by_reason.items()]


def _field(label: str, text: str, width: int, indent: str = "  ") -> list[str]:
    head = f"{indent}{label:<{_LABEL}}"
    if label == "repeat":
        # A command is copied as one line; breaking it would break it.
        return [head + text]
    wrapped = textwrap.wrap(
        " ".join(text.split()), max(width - len(head), 30), break_long_words=False, break_on_hyphens=False
    )
    return [head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])] if wrapped else [head.rstrip()]


def _table(report: Report) -> list[str]:
    groups = outcome.groups(report.results)
    if not groups:
        return []
    statuses = [status for status in outcome.STATUSES if any(status in row for row in groups.values())]
    rows = [*groups.items(), ("all", outcome.counts(report.results))]
    first = max(len(name) for name, _ in rows)
    columns = {status: max(len(status), 5) for status in statuses}
    lines = ["", f"  {'group':<{first}}  " + "  ".join(f"{status:>{columns[status]}}" for status in statuses)]
    for name, row in rows:
        cells = "  ".join(f"{row.get(status, '') or '':>{columns[status]}}" for status in statuses)
        lines.append(f"  {name:<{first}}  {cells}".rstrip())
    return lines


def _failures(report: Report, axes: Mapping[str, Sequence[str]] | None, width: int) -> list[str]:
    failed = outcome.failures(report)
    shown = _representative(failed)
    lines: list[str] = []
    for result in shown:
        lines += ["", f"{result.status.upper()} {result.case.id}"]
        for label, text in explanation(result, report, axes):
            lines += _field(label, text, width)
    rest = len(failed) - len(shown)
    if rest:
        lines += ["", f"... and {rest} more failing cases; --json or --markdown lists them all"]
    return lines


def _representative(failed: Sequence[CaseResult]) -> list[CaseResult]:
    """A few failures that differ most: the explained ones first, and one of each group before a second of any."""
    ranked = sorted(
        enumerate(failed), key=lambda pair: (not pair[1].diagnosis, _nth_of_group(failed, pair[0]), pair[0])
    )
    return [result for _, result in ranked[:TOLD_IN_FULL]]


def _nth_of_group(failed: Sequence[CaseResult], place: int) -> int:
    group = failed[place].case.group
    return sum(1 for result in failed[:place] if result.case.group == group)
