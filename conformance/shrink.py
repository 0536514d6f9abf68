"""From a failing case to the smallest one that still fails.

`shrink` tries smaller sizes, fewer options and inputs, plainer values and layouts, one change at a time, and keeps
each change under which the case still fails. It is deterministic, never returns a case that was not seen to fail, and
stops at its budget. Used by the runner's explanations; it knows nothing of candidates or tolerances.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping

from attnspec.conformance.types import Case

PLAIN_VALUES = "normal"
PLAIN_LAYOUT = "contiguous"
MAX_ATTEMPTS = 150

Rename = Callable[[Case], Case | None]


def shrink(
    case: Case,
    still_fails: Callable[[Case], bool],
    budget_seconds: float,
    *,
    rename: Rename | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Case:
    """The smallest failing case found.

    Args:
        case: a case that fails.
        still_fails: runs a case; whether it fails in the same way. A case that cannot be built does not.
        budget_seconds: no attempt starts after this much time; the attempt that is running is finished.
        rename: gives a changed case its id, or None where there is no such case; `case_id.renamed` by default.

    Returns:
        A case for which `still_fails` said True, or `case` itself.
    """
    rename = rename or _rename()
    deadline = clock() + budget_seconds
    seen = {_key(case)}
    attempts = 0
    best = case
    progress = True
    while progress:
        progress = False
        for changed in reductions(best):
            if _key(changed) in seen:
                continue
            seen.add(_key(changed))
            named = rename(changed)
            if named is None:
                continue
            if attempts >= MAX_ATTEMPTS or clock() >= deadline:
                return best
            attempts += 1
            if still_fails(named):
                best = named
                progress = True
                break
    return best


def reductions(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one respect, the boldest first."""
    yield from _smaller(case)
    yield from _fewer(case)
    if case.values != PLAIN_VALUES:
        yield dataclasses.replace(case, values=PLAIN_VALUES)
    if case.layout != PLAIN_LAYOUT:
        yield dataclasses.replace(case, layout=PLAIN_LAYOUT)
    yield from _in_proportion(case)
    yield from _last_steps(case)


def _smaller(case: Case) -> Iterator[Case]:
    """All sizes at their least, groups of equal sizes together, then each size by itself, halving."""
    sizes = dict(case.sizes)
    yield _sized(case, {name: min(value, 1) for name, value in sizes.items()})
    yield _sized(case, {name: min(value, 2) for name, value in sizes.items()})
    heads = [name for name in sizes if name in ("B", "H", "Hk")]
    yield _sized(case, {**sizes, **{name: min(sizes[name], 1) for name in heads}})
    for value in sorted(set(sizes.values()), reverse=True):
        same = [name for name in sizes if sizes[name] == value]
        if len(same) > 1:
            for target in _targets(value):
                yield _sized(case, {**sizes, **dict.fromkeys(same, target)})
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        for target in _targets(sizes[name]):
            yield _sized(case, {**sizes, name: target})


def _in_proportion(case: Case) -> Iterator[Case]:
    """Two sizes divided by their common factor: grouped heads keep their ratio, tiles their number."""
    for first, second in itertools.combinations(sorted(case.sizes), 2):
        factor = math.gcd(case.sizes[first], case.sizes[second])
        if factor > 1:
            one, two = case.sizes[first] // factor, case.sizes[second] // factor
            yield _sized(case, {**case.sizes, first: one, second: two})


def _last_steps(case: Case) -> Iterator[Case]:
    """One less of each size: slow, so it comes when nothing bolder helps."""
    for name in sorted(case.sizes, key=lambda name: (-case.sizes[name], name)):
        if case.sizes[name] > 1:
            yield _sized(case, {**case.sizes, name: case.sizes[name] - 1})


def _targets(value: int) -> list[int]:
    """1, 2, then from far below to half of the value; kernels break at tile sizes, so powers of two plus one count."""
    targets = [1, 2, 3]
    power = 4
    while power < value:
        targets += [power, power + 1]
        power *= 2
    return sorted({target for target in (*targets, value // 2) if 0 < target < value})


def _sized(case: Case, sizes: Mapping[str, int]) -> Case:
    # Sampled rows belong to sizes that are too large to judge in full; a smaller case is judged in full.
    rows = case.rows if sizes == case.sizes else None
    return dataclasses.replace(case, sizes=dict(sizes), rows=rows)


def _fewer(case: Case) -> Iterator[Case]:
    """No options and no optional inputs at all, then one less of either."""
    if len(case.options) + len(case.inputs) > 1:
        yield dataclasses.replace(case, options={}, inputs=())
    for name in case.options:
        yield dataclasses.replace(case, options={key: value for key, value in case.options.items() if key != name})
    for name in case.inputs:
        yield dataclasses.replace(case, inputs=tuple(key for key in case.inputs if key != name))
    for name, value in case.options.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            for smaller in _targets(value):
                yield dataclasses.replace(case, options={**case.options, name: smaller})


def _key(case: Case) -> tuple[object, ...]:
    return (
        tuple(sorted(case.sizes.items())),
        tuple(sorted((name, repr(value)) for name, value in case.options.items())),
        tuple(sorted(case.inputs)),
        case.values,
        case.layout,
        repr(case.rows),
    )


def _rename() -> Rename:
    from attnspec.conformance.case_id import renamed

    return renamed
