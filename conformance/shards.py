"""A run in parts: which cases belong to a shard, and reports of shards put together again.

A case belongs to a shard by a hash of its id, so that the parts need no list and stay the same when cases are added.
`merge` refuses reports of different runs; a shard that is missing, or a case that two reports judged, is a problem of
the merged report and makes it fail. Used by `attnspec check --shard` and `attnspec merge`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from attnspec.conformance import outcome
from attnspec.conformance.types import Report

KEY = "shard"
"""Where a report's environment says which part of a run it holds: `2/4`."""


class ShardError(ValueError):
    """A shard that is none, or reports that do not belong together. One line."""


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, name: str) -> bool:
        """Whether the case or test of this name belongs to it."""
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1


def parse(text: str) -> Shard:
    """Read `2/4`.

    Raises:
        ShardError: it is not of that form, or out of range.
    """
    number, slash, count = text.partition("/")
    if slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count):
        return Shard(int(number), int(count))
    raise ShardError(f"{text!r} is no shard; expected NUMBER/COUNT with 1 <= NUMBER <= COUNT, such as 2/4")


def merge(reports: Sequence[Report]) -> Report:
    """The report of the whole run.

    Args:
        reports: of shards, or of selections, of one run: same candidate, mechanism, level, seed, declarations and
            rounding model. Machines may differ; what they do not share is left out of `environment`.

    Raises:
        ShardError: no reports, or reports of different runs.
    """
    if not reports:
        raise ShardError("no report to merge")
    first = reports[0]
    for other in reports[1:]:
        for name in ("candidate", "mechanism", "level", "seed", "declares", "rounding"):
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise ShardError(f"reports of different runs: {name} is {one!r} in one and {two!r} in another")
    shared = {
        key: value for key, value in first.environment.items()
        if key != KEY and all(report.environment.get(key) == value for report in reports)
    }  # fmt: skip
    merged = replace(
        first,
        results=[result for report in reports for result in report.results],
        environment=shared,
        seconds=sum(report.seconds for report in reports),
        problems=[*dict.fromkeys(problem for report in reports for problem in report.problems)],
        not_supported={name: why for report in reports for name, why in report.not_supported.items()},
    )
    merged.problems += _gaps([report.environment.get(KEY) for report in reports])
    merged.problems += _twice(result.case.id for result in merged.results)
    return outcome.conclude(merged)


def _gaps(stated: Sequence[str | None]) -> list[str]:
    parts = [parse(text) for text in stated if text is not None]
    counts = sorted({part.count for part in parts})
    if not parts:
        return []
    if len(counts) > 1 or len(parts) < len(stated):
        return ["merged reports are not the shards of one division"]
    missing = sorted(set(range(1, counts[0] + 1)) - {part.number for part in parts})
    return [f"shard {number}/{counts[0]} is missing" for number in missing]


def _twice(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    twice: list[str] = []
    for name in names:
        if name in seen:
            twice.append(name)
        seen.add(name)
    more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
    return [f"judged by two reports: {twice[0]}{more}"] if twice else []
