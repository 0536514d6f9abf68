"""References `name[subscripts]`: to inputs, definitions, and members of recurrences.

Used by the array evaluator (`arrays`). It decides for which values of its indices a definition is needed,
checks that every position lies inside the tensor, and picks the elements (`indexing`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnspec.spec.language.check import left_indices
from attnspec.spec.language.indexing import Subscript, positions, select
from attnspec.spec.language.named import Named, is_scalar, lift
from attnspec.spec.language.order import axis_of, shift_of
from attnspec.spec.language.scan import run_scan
from attnspec.spec.language.scope import Domain, Scope, Step
from attnspec.spec.language.syntax import Name, Node, Ref

if TYPE_CHECKING:
    from attnspec.spec.language.arrays import Evaluator


def reference(evaluator: Evaluator, node: Ref, scope: Scope) -> Named:
    """`name[subscripts]`: an input or a definition at the positions that the subscripts give."""
    name = node.name
    if scope.step is not None and name in scope.step.scan.names:
        return _in_step(evaluator, node, scope, scope.step)
    if name in evaluator.scans:
        return _scanned_reference(evaluator, node, scope)
    defined = name in evaluator.program.definitions
    if defined:
        axes = left_indices(evaluator.program.definitions[name])
    else:
        axes = evaluator.program.declarations.inputs[name].axes
        target = evaluator.input(name, node)
    chosen: dict[str, Subscript] = {}
    wanted: list[Domain] = []
    for position, (axis, subscript) in enumerate(zip(axes, node.subscripts), 1):
        last = evaluator.size(axis) - 1
        pick, domain = _subscript(evaluator, node, subscript, scope, position, 0, last, defined)
        chosen[axis] = pick
        wanted.append(domain)
    if defined:
        target = evaluator.tensor(name, tuple(wanted))
        for axis, domain in zip(axes, wanted):
            pick = chosen[axis]
            if domain is not None and isinstance(pick, int):
                chosen[axis] = domain.index(pick)
            elif domain is not None and isinstance(pick, Named):
                chosen[axis] = positions(evaluator.backend, pick, domain)
    else:
        for axis, pick in list(chosen.items()):
            if isinstance(pick, str) and axis in target.axes:
                rows = scope.domains[pick]
                if isinstance(rows, tuple):
                    target = Named(evaluator.backend.take(target.array, rows, target.axes.index(axis)), target.axes)
    return select(evaluator.backend, target, chosen)


def _subscript(
    evaluator: Evaluator, node: Ref, subscript: Node, scope: Scope, position: int, low: int, high: int, defined: bool
) -> tuple[Subscript, Domain]:
    """One subscript: an index to rename to, a number, or positions; and the values of the axis that it needs."""
    if isinstance(subscript, Name) and subscript.id in scope.domains:
        domain = scope.domains[subscript.id]
        if not isinstance(domain, int) and low == 0 and evaluator.size(subscript.id) == high + 1:
            return subscript.id, domain
        if isinstance(domain, int) and scope.step is not None and low <= domain <= high:
            reach = scope.step.reach
            return domain, reach if high + 1 == evaluator.size(subscript.id) else None
    value = evaluator.value(subscript, scope)
    value = evaluator.inside(value, low, high, subscript, scope, f"subscript {position} of '{node.name}'")
    if is_scalar(value.array) or not value.axes:
        number = int(value.array)
        return number, (number,) if defined and scope.step is None and low <= number <= high else None
    if defined and scope.restricted:
        values = tuple(sorted({int(v) for v in evaluator.backend.to_numpy(value.array).ravel().tolist()}))
        if len(values) < high - low + 1:
            return value, values
    return value, None


def _in_step(evaluator: Evaluator, node: Ref, scope: Scope, step: Step) -> Named:
    """A reference inside a recurrence to a member of it, at this step or the one before."""
    definition = evaluator.program.definitions[node.name]
    axis = axis_of(definition, step.scan.index)
    assert axis is not None
    target = step.before if shift_of(node.subscripts[axis], step.scan.index) else step.now
    chosen: dict[str, Subscript] = {}
    for position, (name, subscript) in enumerate(zip(left_indices(definition), node.subscripts)):
        if position != axis:
            last = evaluator.size(name) - 1
            chosen[name] = _subscript(evaluator, node, subscript, scope, position + 1, 0, last, False)[0]
    return select(evaluator.backend, target[node.name], chosen)


def _scanned_reference(evaluator: Evaluator, node: Ref, scope: Scope) -> Named:
    """A reference from outside to a member of a recurrence, its boundary included."""
    scan = evaluator.scans[node.name]
    definition = evaluator.program.definitions[node.name]
    size = evaluator.size(scan.index)
    edge = node.name in evaluator.program.boundaries
    low = -1 if edge and scan.step > 0 else 0
    high = size if edge and scan.step < 0 else size - 1
    chosen: dict[str, Subscript] = {}
    time_axis = scan.index
    needed = low if scan.step > 0 else high
    restricted: Domain = None
    for position, (axis, subscript) in enumerate(zip(left_indices(definition), node.subscripts), 1):
        if axis != time_axis:
            last = evaluator.size(axis) - 1
            pick, _ = _subscript(evaluator, node, subscript, scope, position, 0, last, False)
            if isinstance(pick, str) and isinstance(scope.domains[pick], tuple):
                pick = evaluator.name(subscript, pick, scope)
            chosen[axis] = pick
            continue
        if (
            isinstance(subscript, Name)
            and subscript.id in scope.domains
            and (scope.domains[subscript.id] is None and evaluator.size(subscript.id) == size)
        ):
            chosen[axis] = subscript.id
            needed = high if scan.step > 0 else low
            continue
        value = evaluator.value(subscript, scope)
        value = evaluator.inside(value, low, high, subscript, scope, f"subscript {position} of '{node.name}'")
        chosen[axis] = int(value.array) if is_scalar(value.array) or not value.axes else value
        flat = evaluator.backend.to_numpy(lift(evaluator.backend, value).array).ravel()
        if flat.size:
            needed = int(flat.max() if scan.step > 0 else flat.min())
        restricted = ()
    if restricted is None or not (scope.restricted or scope.step is None):
        needed = size - 1 if scan.step > 0 else 0
    state, start = run_scan(evaluator, scan, node.name, needed)
    pick = chosen[time_axis]
    if isinstance(pick, str):
        if time_axis in state.axes:
            at = state.axes.index(time_axis)
            cut = [slice(None)] * len(state.axes)
            cut[at] = slice(-start, -start + size)
            state = Named(state.array[tuple(cut)], state.axes)
    elif isinstance(pick, int):
        chosen[time_axis] = pick - start
    else:
        chosen[time_axis] = Named(pick.array - start, pick.axes)
    return select(evaluator.backend, state, chosen)
