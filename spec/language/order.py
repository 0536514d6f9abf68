"""Orders definitions so that each comes after what it uses, and recognises recurrences.

Used by `check`. A strongly connected set of definitions is a recurrence when there is one index `t`, on the
left side of each of them, at which they refer to each other only at `t` and `t-1` (or only at `t` and `t+1`),
with the references at `t` free of cycles and an initial line for every name referred to at the earlier step.
Any other cycle is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.macros import children
from attnspec.spec.language.syntax import (
    Binary,
    Declarations,
    Definition,
    Name,
    Node,
    Num,
    Place,
    Reduce,
    Ref,
    Scan,
    Unary,
)
from attnspec.spec.language.text import fail

_Definitions = Mapping[str, Definition]


def arrange(
    mains: _Definitions, boundaries: _Definitions, declarations: Declarations, file: str
) -> tuple[tuple[str, ...], tuple[Scan, ...]]:
    """The order of evaluation and the recurrences.

    Raises:
        SpecError: for a cycle that is no recurrence, and for a missing, misplaced or useless initial line.
    """
    uses = {name: _uses(definition, mains) for name, definition in mains.items()}
    for name, definition in boundaries.items():
        uses[name] = uses[name] + [used for used in _uses(definition, mains) if used not in uses[name]]
    order: list[str] = []
    scans: list[Scan] = []
    for group in _components(uses):
        if len(group) == 1 and group[0] not in uses[group[0]]:
            name = group[0]
            if name in boundaries:
                raise fail(
                    f"'{name}' has an initial line but does not refer to its own previous value",
                    Place(boundaries[name].line, 1),
                    file,
                )
            order.append(name)
            continue
        scan = _scan(sorted(group, key=lambda name: mains[name].line), mains, boundaries, declarations, uses, file)
        scans.append(scan)
        order.extend(scan.names)
    return tuple(order), tuple(scans)


def _uses(definition: Definition, mains: _Definitions) -> list[str]:
    """The definitions that a definition refers to, in order of appearance."""
    found: dict[str, None] = {}
    stack = [definition.body]
    while stack:
        node = stack.pop()
        name = node.name if isinstance(node, Ref) else node.id if isinstance(node, Name) else None
        if name in mains:
            found[str(name)] = None
        stack.extend(reversed(children(node)))
    return list(found)


def _components(uses: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Strongly connected components, each after those it uses (Tarjan 1972, without recursion)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    open_names: list[str] = []
    for root in uses:
        if root in number:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(uses[root]))]
        number[root] = low[root] = len(number)
        open_names.append(root)
        while work:
            name, rest = work[-1]
            for used in rest:
                if used not in number:
                    number[used] = low[used] = len(number)
                    open_names.append(used)
                    work.append((used, iter(uses[used])))
                    break
                if used in open_names:
                    low[name] = min(low[name], number[used])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == number[name]:
                    place = open_names.index(name)
                    yield open_names[place:]
                    del open_names[place:]


def _references(node: Node, names: set[str], bound: frozenset[str]) -> Iterator[tuple[Ref | Name, frozenset[str]]]:
    """References to `names` with the indices bound by the reductions around them."""
    if isinstance(node, Ref) and node.name in names:
        yield node, bound
    if isinstance(node, Name) and node.id in names:
        yield node, bound
    if isinstance(node, Reduce):
        bound = bound | frozenset(node.indices)
    for child in children(node):
        yield from _references(child, names, bound)


def shift_of(subscript: Node, index: str) -> int | None:
    """0 for `t`, -1 for `t-1`, 1 for `t+1`, None for anything else."""
    match subscript:
        case Name(id=name) if name == index:
            return 0
        case Binary(op="-", left=Name(id=name), right=Num(value=1)) if name == index:
            return -1
        case Binary(op="+", left=Name(id=name), right=Num(value=1)) if name == index:
            return 1
        case Binary(op="+", left=Num(value=1), right=Name(id=name)) if name == index:
            return 1
        case Binary(op="+", left=Unary(op="-", operand=Num(value=1)), right=Name(id=name)) if name == index:
            return -1
        case Binary(op="+", left=Num(value=-1), right=Name(id=name)) if name == index:
            return -1
    return None


def axis_of(definition: Definition, index: str) -> int | None:
    """The position of a plain index on a left side."""
    for position, subscript in enumerate(definition.subscripts):
        if isinstance(subscript, Name) and subscript.id == index:
            return position
    return None


def _scan(
    group: list[str],
    mains: _Definitions,
    boundaries: _Definitions,
    declarations: Declarations,
    uses: Mapping[str, list[str]],
    file: str,
) -> Scan:
    first = mains[group[0]]
    for subscript in first.subscripts:
        if isinstance(subscript, Name) and subscript.id in declarations.indices:
            found = _along(subscript.id, group, mains, file)
            if found is not None:
                scan, needed = found
                _check_boundaries(scan, needed, mains, boundaries, declarations, file)
                return scan
    cycle = " -> ".join([*_cycle(group, uses), ""]).removesuffix(" -> ")
    raise fail(
        f"cycle that is no recurrence: {cycle}; names in a cycle may refer to each other only at t-1 (or t+1) of "
        "one index t of all their left sides",
        Place(first.line, 1),
        file,
    )


def _cycle(group: list[str], uses: Mapping[str, list[str]]) -> list[str]:
    """A cycle through the first name of a component."""
    start = group[0]
    paths = [[start]]
    seen = {start}
    while paths:
        path = paths.pop(0)
        for used in uses[path[-1]]:
            if used == start:
                return [*path, start]
            if used in group and used not in seen:
                seen.add(used)
                paths.append([*path, used])
    return group


def _along(index: str, group: list[str], mains: _Definitions, file: str) -> tuple[Scan, dict[str, Place]] | None:
    """The recurrence along `index` and the names needed at the boundary, or None when it is none."""
    names = set(group)
    step = 0
    now: dict[str, list[str]] = {}
    needed: dict[str, Place] = {}
    for name in group:
        if axis_of(mains[name], index) is None:
            return None
        now[name] = []
        for reference, bound in _references(mains[name].body, names, frozenset()):
            if not isinstance(reference, Ref) or index in bound:
                return None
            axis = axis_of(mains[reference.name], index)
            if axis is None:
                return None
            shift = shift_of(reference.subscripts[axis], index)
            if shift is None or (shift and step and shift != -step):
                return None
            if shift:
                step = -shift
                needed.setdefault(reference.name, reference.at)
            elif reference.name not in now[name]:
                now[name].append(reference.name)
    if not step:
        return None
    inner: list[str] = []
    for component in _components(now):
        if len(component) > 1 or component[0] in now[component[0]]:
            return None
        inner.extend(component)
    return Scan(tuple(inner), index, step), needed


def _check_boundaries(
    scan: Scan,
    needed: Mapping[str, Place],
    mains: _Definitions,
    boundaries: _Definitions,
    declarations: Declarations,
    file: str,
) -> None:
    size = declarations.indices[scan.index]
    for name, at in needed.items():
        if name not in boundaries:
            shown = "-1" if scan.step > 0 else "size of " + scan.index
            raise fail(
                f"recurrence of '{name}' along '{scan.index}' has no initial line {name}[… {shown} …] = …",
                at,
                file,
            )
    for name in scan.names:
        if name not in boundaries:
            continue
        boundary, main = boundaries[name], mains[name]
        at = Place(boundary.line, 1)
        if len(boundary.subscripts) != len(main.subscripts):
            raise fail(
                f"initial line of '{name}' has {len(boundary.subscripts)} subscripts, its equation "
                f"{len(main.subscripts)}",
                at,
                file,
            )
        axis = axis_of(main, scan.index)
        for position, (edge, plain) in enumerate(zip(boundary.subscripts, main.subscripts)):
            if position != axis and edge != plain:
                raise fail(
                    f"initial line of '{name}': subscript {position + 1} must be the same index as in its equation",
                    edge.at,
                    file,
                )
            if position == axis and not _is_edge(edge, scan, size):
                wanted = "-1" if scan.step > 0 else f"the size of '{scan.index}'"
                raise fail(
                    f"initial line of '{name}': the recurrence runs along '{scan.index}', so subscript "
                    f"{position + 1} must be {wanted}",
                    edge.at,
                    file,
                )
        used = [n for n in _uses(boundary, mains) if n in scan.names]
        if used:
            raise fail(
                f"initial line of '{name}' refers to '{used[0]}', which belongs to the same recurrence",
                at,
                file,
            )


def _is_edge(edge: Node, scan: Scan, size: Node) -> bool:
    if scan.step > 0:
        return edge in (Unary("-", Num(1)), Num(-1))
    return edge == size


__all__ = ["SpecError", "arrange", "axis_of", "shift_of"]
