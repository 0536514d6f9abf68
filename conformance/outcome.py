"""What a run amounts to: counts, the exit code and the sentence that says so.

The rules that keep a green run honest stand here: a run that judged nothing is no success, a case that was expected
to fail and passes fails the run, and a refusal is neither a pass nor a failure. Every report writer reads from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, get_args

from attnspec.conformance.types import CaseResult, Report, Status

CONFORMS = 0
DOES_NOT_CONFORM = 1
COULD_NOT_JUDGE = 2
INTERRUPTED = "interrupted: "
"""How the problem of a run begins that was stopped: what was not run may have failed."""
VERDICTS = {CONFORMS: "conforms", DOES_NOT_CONFORM: "does not conform", COULD_NOT_JUDGE: "could not judge"}

STATUSES: tuple[Status, ...] = get_args(Status)
FAILING: frozenset[str] = frozenset({"fail", "error", "crash", "timeout", "xpass"})
"""Statuses that make a run fail."""
BROKEN: frozenset[str] = frozenset({"fail", "error", "crash", "timeout"})
"""Statuses of a candidate that got a case wrong: what an xfail entry may expect."""
JUDGED: frozenset[str] = FAILING | {"pass", "xfail"}
"""Statuses of cases that came to a verdict."""


def counts(results: Iterable[CaseResult]) -> dict[str, int]:
    """How many cases ended in each status that occurs, in the order of `Status`."""
    seen = Counter(str(result.status) for result in results)
    return {status: seen[status] for status in STATUSES if seen[status]}


def groups(results: Iterable[CaseResult]) -> dict[str, dict[str, int]]:
    """The counts of each group of cases, in the order of first appearance."""
    by_group: dict[str, list[CaseResult]] = {}
    for result in results:
        by_group.setdefault(result.case.group, []).append(result)
    return {group: counts(members) for group, members in by_group.items()}


def failures(report: Report) -> list[CaseResult]:
    """The results that make the run fail, in the order in which they ran."""
    return [result for result in report.results if result.status in FAILING]


def judged(results: Iterable[CaseResult]) -> int:
    """How many cases came to a verdict."""
    return sum(result.status in JUDGED for result in results)


def exit_code(results: Iterable[CaseResult], problems: Iterable[str] = ()) -> int:
    """0 conforms, 1 does not, 2 nothing was judged, or the run was interrupted before anything failed.

    A candidate that raised an error in every case it was given has been judged (and fails); one that refused every
    case has not.
    """
    listed, found = list(results), list(problems)
    if not judged(listed):
        return COULD_NOT_JUDGE
    if any(result.status in FAILING for result in listed):
        return DOES_NOT_CONFORM
    if any(problem.startswith(INTERRUPTED) for problem in found):
        return COULD_NOT_JUDGE
    return DOES_NOT_CONFORM if found else CONFORMS


def conclude(report: Report) -> Report:
    """Set the exit code and the summary from the results and problems, and return the report."""
    report.exit_code = exit_code(report.results, report.problems)
    report.summary = summary(report)
    return report


def summary(report: Report) -> str:
    """One sentence: the verdict and the counts behind it."""
    seen = counts(report.results)
    total = judged(report.results)
    if not total:
        why = ", ".join(f"{number} {status}" for status, number in seen.items()) or "no case ran"
        return f"could not judge: no case came to a verdict ({why})"
    failed = sum(seen.get(status, 0) for status in FAILING)
    parts = []
    if failed:
        kinds = ", ".join(f"{seen[status]} {status}" for status in STATUSES if status in FAILING and status in seen)
        parts.append(f"{failed} of {total} judged cases fail ({kinds})")
    else:
        parts.append(f"{total} cases judged")
    parts += [f"{seen[status]} {label}" for status, label in _ASIDE.items() if seen.get(status)]
    if report.problems:
        parts.append(f"{len(report.problems)} {_plural('problem', 'problems', len(report.problems))} beside the cases")
    return f"{VERDICTS[report.exit_code]}: {', '.join(parts)}"


def headline(results: Iterable[CaseResult]) -> dict[str, Any] | None:
    """The diagnosis that says most about a run: the commonest kind of region with a structure, or else the first."""
    told = [result.diagnosis for result in results if result.diagnosis.get("region")]
    if not told:
        return None
    kinds = Counter(entry["region"]["kind"] for entry in told if entry["region"]["kind"] != "everything")
    if not kinds:
        return told[0]
    most = kinds.most_common(1)[0][0]
    return next(entry for entry in told if entry["region"]["kind"] == most)


_ASIDE = {
    "xfail": "expected to fail",
    "refused": "refused",
    "not_supported": "not supported",
    "skip": "skipped by a list",
}


def _plural(one: str, many: str, number: int) -> str:
    return one if number == 1 else many
