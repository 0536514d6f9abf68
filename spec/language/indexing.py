"""Picks elements of named arrays: plain indices by renaming axes, everything else by gathers.

Used by the array evaluator after it has checked that every position is inside the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attnspec.spec.language.backend import Array, Backend
from attnspec.spec.language.named import Named, spread, union

Subscript = str | int | Named


def select(backend: Backend, target: Named, subscripts: Mapping[str, Subscript]) -> Named:
    """`target` with each axis in `subscripts` replaced.

    A string renames the axis to that index; a number picks one position; a Named integer array gathers. Axes
    that are not in `subscripts` (batch axes) stay, aligned with the same axes of the gathers. Subscripts of
    axes that the target lacks are ignored: it does not depend on them.
    """
    chosen = {axis: subscript for axis, subscript in subscripts.items() if axis in target.axes}
    for axis, subscript in list(chosen.items()):
        if isinstance(subscript, Named) and not subscript.axes:
            chosen[axis] = int(subscript.array)
    fixed = {axis: subscript for axis, subscript in chosen.items() if isinstance(subscript, int)}
    if fixed:
        target = _fixed(backend, target, fixed)
    gathers = {axis: subscript for axis, subscript in chosen.items() if isinstance(subscript, Named)}
    names = {axis: subscript for axis, subscript in chosen.items() if isinstance(subscript, str)}
    outer = set(union(gathers.values()))
    seen: set[str] = set()
    lengths = target.lengths()
    for axis in target.axes:
        name = names.get(axis, axis)
        if axis in gathers:
            continue
        if name in outer or name in seen:
            gathers[axis] = Named(backend.arange(lengths[axis]), (name,))
        seen.add(name)
    for axis in target.axes:
        name = names.get(axis, axis)
        if axis not in gathers and any(name in value.axes for value in gathers.values()):
            gathers[axis] = Named(backend.arange(lengths[axis]), (name,))
    if not gathers:
        return Named(target.array, tuple(names.get(axis, axis) for axis in target.axes))
    return _gather(backend, target, gathers, names)


def _fixed(backend: Backend, target: Named, fixed: Mapping[str, int]) -> Named:
    shape = target.lengths()
    axes = tuple(axis for axis in target.axes if axis not in fixed)
    if any(shape[axis] == 0 for axis in fixed):
        return Named(_zeros(backend, target.array, [shape[axis] for axis in axes]), axes)
    return Named(target.array[tuple(fixed.get(axis, slice(None)) for axis in target.axes)], axes)


def _zeros(backend: Backend, like: Array, shape: list[int]) -> Array:
    kind = backend.kind(like)
    return backend.full(shape, False if kind == "bool" else 0, kind)


def _gather(backend: Backend, target: Named, gathers: Mapping[str, Named], names: Mapping[str, str]) -> Named:
    front = [axis for axis in target.axes if axis in gathers]
    back = [axis for axis in target.axes if axis not in gathers]
    outer = union([gathers[axis] for axis in front])
    axes = (*outer, *(names.get(axis, axis) for axis in back))
    lengths = target.lengths()
    if any(lengths[axis] == 0 for axis in front):
        size = {axis: n for value in gathers.values() for axis, n in value.lengths().items()}
        return Named(_zeros(backend, target.array, [size[a] for a in outer] + [lengths[a] for a in back]), axes)
    order = [target.axes.index(axis) for axis in front + back]
    array = target.array if order == list(range(len(order))) else backend.permute(target.array, order)
    if len(front) == 1 and len(outer) == 1:
        return Named(backend.take(array, gathers[front[0]].array, 0), axes)
    return Named(array[tuple(spread(backend, gathers[axis], outer) for axis in front)], axes)


def positions(backend: Backend, values: Named, domain: tuple[int, ...]) -> Named:
    """Where each value stands in a sorted domain that contains it."""
    where = np.searchsorted(np.asarray(domain, dtype=np.int64), backend.to_numpy(values.array))
    return Named(backend.asarray(where, "int"), values.axes)
