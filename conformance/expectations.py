"""Skip and xfail lists: known failures that live with the candidate, and cannot outlive their reason.

A list is a TOML file:

    [[xfail]]
    case = "softmax_attention/window/*/bf16/*"     # `*` and `?`, over whole case ids
    reason = "window off by one in the bf16 path, fixed in 2.4"
    until = 2026-12-31                             # optional: the last day on which the entry holds
    link = "https://…"                             # optional

    [[skip]]
    case = "*/N131072/*"
    reason = "does not fit the CI machine"

Used by the command line and the pytest plugin. An entry without a reason, with an unknown field, or past its date, one
that matches no case, and an xfail entry of which a case passes after all are errors: the run fails and says why.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attnspec.conformance.outcome import BROKEN
from attnspec.conformance.report.files import FileError
from attnspec.conformance.types import CaseResult, Report

Kind = Literal["skip", "xfail"]
KINDS: tuple[Kind, ...] = ("skip", "xfail")
FIELDS = {"case": str, "reason": str, "until": datetime.date, "link": str}


@dataclass(frozen=True)
class Entry:
    """One entry of a list; `place` is `file: xfail 2` for messages."""

    kind: Kind
    case: str
    reason: str
    place: str
    until: datetime.date | None = None
    link: str = ""

    def matches(self, case_id: str) -> bool:
        """Whether the pattern covers the whole id; only `*` and `?` are special, ids are full of brackets."""
        return covers(self.case, case_id)

    def told(self) -> str:
        """The reason with its link and date, as results carry it."""
        extra = [part for part in (self.link, f"until {self.until}" if self.until else "") if part]
        return self.reason + (f" ({', '.join(extra)})" if extra else "")


@dataclass
class Expectations:
    """The entries of one or several lists, and what is wrong with them.

    `everything` gives the ids of all cases there are, whatever the run was restricted to: an entry that matches none of
    the run's cases is in order when it matches one of these. It is called only where it is needed.
    """

    entries: tuple[Entry, ...] = ()
    everything: Callable[[], Iterable[str]] | None = None
    today: datetime.date = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date())

    def find(self, case_id: str, kind: Kind | None = None) -> Entry | None:
        """The first entry that covers the case and is not past its date."""
        for entry in self.entries:
            if (kind is None or entry.kind == kind) and entry.matches(case_id) and not self._late(entry):
                return entry
        return None

    def _late(self, entry: Entry) -> bool:
        return entry.until is not None and self.today > entry.until

    def skips(self, case_id: str) -> str | None:
        """The reason for which the case is not run; None: it runs."""
        entry = self.find(case_id, "skip")
        return entry.told() if entry else None

    def settle(self, result: CaseResult) -> CaseResult:
        """Turn a result into "xfail" or "xpass" where an entry expects it to fail. Refused cases stay refused."""
        entry = self.find(result.case.id, "xfail")
        if entry is None:
            return result
        if result.status in BROKEN:
            result.message = f"expected: {entry.told()}" + (f"; {result.message}" if result.message else "")
            result.status = "xfail"
        elif result.status == "pass":
            result.message = f"passes although {entry.place} expects it to fail: {entry.told()}"
            result.status = "xpass"
        return result

    def problems(self, case_ids: Iterable[str]) -> list[str]:
        """What is wrong with the entries for a run of these cases, one line each: past their date, matching no case."""
        late = [entry for entry in self.entries if self._late(entry)]
        found = [f"{entry.place}: is past its date {entry.until}: {entry.case}" for entry in late]
        known = list(case_ids)
        idle = [entry for entry in self.entries if entry not in late and not _any(entry, known)]
        if idle and self.everything is not None:
            known = list(self.everything())
            idle = [entry for entry in idle if not _any(entry, known)]
        return found + [f"{entry.place}: matches no case: {entry.case}" for entry in idle]

    def apply(self, report: Report, everything: Callable[[], Iterable[str]] | None = None) -> None:
        """Settle all results of a report and add the problems of the lists to it.

        Args:
            everything: used where the lists have no `everything` of their own.
        """
        for result in report.results:
            self.settle(result)
        self.everything = self.everything or everything
        report.problems += self.problems([result.case.id for result in report.results])


def _any(entry: Entry, case_ids: Iterable[str]) -> bool:
    return any(entry.matches(case) for case in case_ids)


def load(paths: Sequence[str | Path]) -> Expectations:
    """Read lists.

    Raises:
        FileError: no such file, not TOML, or a malformed entry; one line names the file and the entry.
    """
    return Expectations(tuple(entry for path in paths for entry in _read(Path(path))))


def _read(path: Path) -> list[Entry]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path}: not TOML: {error}") from None
    stray = sorted(set(raw) - set(KINDS))
    if stray:
        raise FileError(f"{path}: unknown table {stray[0]!r}; expected [[skip]] and [[xfail]]")
    entries: list[Entry] = []
    for kind in KINDS:
        listed = raw.get(kind, [])
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise FileError(f"{path}: {kind} must be an array of tables: [[{kind}]]")
        entries += [_entry(kind, item, f"{path}: {kind} {number}") for number, item in enumerate(listed, 1)]
    return entries


def _entry(kind: Kind, item: dict[str, Any], place: str) -> Entry:
    for name, value in item.items():
        if name not in FIELDS:
            raise FileError(f"{place}: unknown field {name!r}; expected {', '.join(FIELDS)}")
        wanted = FIELDS[name]
        if not isinstance(value, wanted) or isinstance(value, datetime.datetime):
            kind_name = "a date (2026-12-31, unquoted)" if wanted is datetime.date else "text"
            raise FileError(f"{place}: {name} must be {kind_name}, got {value!r}")
    for name in ("case", "reason"):
        if not item.get(name, "").strip():
            raise FileError(f"{place}: needs a {name}")
    return Entry(kind=kind, place=place, **item)


def covers(glob: str, case_id: str) -> bool:
    """Whether a pattern covers a whole case id. Only `*` and `?` are special."""
    return re.fullmatch(_pattern(glob), case_id, re.DOTALL) is not None


def _pattern(glob: str) -> str:
    return "".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in glob)
