"""Recurrences: definitions that go step by step along one index, with their boundary.

Used by the array evaluator. All members of a group advance together; every step is kept, since equations
outside read them. Where only some steps are needed, the recurrence runs only as far as those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnspec.spec.language.check import left_indices
from attnspec.spec.language.named import Named, expanded
from attnspec.spec.language.scope import Scope, Step
from attnspec.spec.language.syntax import Scan

if TYPE_CHECKING:
    from attnspec.spec.language.arrays import Evaluator


def run_scan(evaluator: Evaluator, scan: Scan, name: str, needed: int) -> tuple[Named, int]:
    """The steps of a member up to the step `needed`, and the step that position 0 of its time axis stands
    for.

    Forward, positions begin at -1 where the member has an initial line, else at 0; in reverse, the last
    position is the boundary.
    """
    size = evaluator.size(scan.index)
    kept = evaluator.scanned.get(name)
    if kept is not None and (kept[1] >= needed if scan.step > 0 else kept[1] <= needed):
        return kept[0], kept[2]
    program = evaluator.program
    initial: dict[str, Named] = {}
    for member in scan.names:
        if member in program.boundaries:
            others = [axis for axis in left_indices(program.definitions[member]) if axis != scan.index]
            body = evaluator.plan.edge(member)
            initial[member] = evaluator.finish(member, body, evaluator.value(body, Scope(dict.fromkeys(others))))
    if scan.step > 0:
        steps = range(min(needed, size - 1) + 1)
    else:
        steps = range(size - 1, max(needed, 0) - 1, -1)
    reach = None if len(steps) == size else tuple(sorted(steps))
    history: dict[str, list[Named]] = {member: [] for member in scan.names}
    before = dict(initial)
    for time in steps:
        now: dict[str, Named] = {}
        for member in scan.names:
            left = left_indices(program.definitions[member])
            scope = Scope({**dict.fromkeys(left), scan.index: time}, (), Step(scan, now, before, reach))
            body = evaluator.plan.body(member)
            now[member] = evaluator.finish(member, body, evaluator.value(body, scope))
            history[member].append(now[member])
        before = now
    for member in scan.names:
        values = history[member]
        if member in initial:
            values = [initial[member], *values]
        if scan.step < 0:
            values = values[::-1]
        start = (-1 if member in initial else 0) if scan.step > 0 else (steps[-1] if len(steps) else size)
        evaluator.scanned[member] = (_stacked(evaluator, values, scan.index, member), needed, start)
    return evaluator.scanned[name][0], evaluator.scanned[name][2]


def _stacked(evaluator: Evaluator, values: list[Named], index: str, name: str) -> Named:
    """The steps along a new leading axis."""
    backend = evaluator.backend
    others = [axis for axis in left_indices(evaluator.program.definitions[name]) if axis != index]
    lengths: dict[str, int] = {}
    axes: list[str] = []
    for value in values:
        lengths.update(value.lengths())
        axes.extend(axis for axis in value.axes if axis not in axes and axis not in others)
    axes.extend(axis for axis in others if axis in lengths)
    if not values:
        return Named(backend.full([0], 0, evaluator.program.kinds[name]), (index,))
    stacked = backend.stack([expanded(backend, value, axes, lengths) for value in values], 0)
    return Named(stacked, (index, *axes))
