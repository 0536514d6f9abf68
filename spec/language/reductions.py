"""Reductions and normalizers of named arrays that are no sums of products.

Each takes the operand, the condition (None: everything is included) and the reduced axes with their lengths.
Excluded elements never contribute; empty sets give the values that the language defines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from attnspec.spec.language.backend import Array, Backend
from attnspec.spec.language.named import Named, combine, expanded, lift, union


def masked(backend: Backend, value: Named, condition: Named | None, neutral: float | bool) -> Named:
    """The operand with `neutral` in excluded places."""
    value = lift(backend, value)
    if condition is None:
        return value
    condition = lift(backend, condition, "bool")
    if backend.kind(value.array) == "int" and isinstance(neutral, float):
        neutral = int(neutral)
    return combine(backend, lambda c, x: backend.where(c, x, neutral), condition, value)


def _over(value: Named, indices: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    positions = [value.axes.index(index) for index in indices if index in value.axes]
    return positions, tuple(axis for axis in value.axes if axis not in indices)


def _absent(value: Named, indices: Sequence[str], lengths: Mapping[str, int]) -> int:
    return math.prod(lengths[index] for index in indices if index not in value.axes)


def count(backend: Backend, condition: Named | None, indices: Sequence[str], lengths: Mapping[str, int]) -> Named:
    """The number of included elements."""
    if condition is None:
        return Named(math.prod(lengths[index] for index in indices))
    ones = Named(backend.to_int(lift(backend, condition, "bool").array), condition.axes)
    return total(backend, ones, None, indices, lengths)


def total(
    backend: Backend,
    value: Named,
    condition: Named | None,
    indices: Sequence[str],
    lengths: Mapping[str, int],
) -> Named:
    """The sum."""
    terms = masked(backend, value, condition, 0.0)
    positions, axes = _over(terms, indices)
    array = backend.sum(terms.array, positions)
    times = _absent(terms, indices, lengths)
    return Named(array if times == 1 else _times(array, times), axes)


def _times(array: Array, times: int) -> Array:
    return array * times if times else 0 * _zeroed(array)


def _zeroed(array: Array) -> Array:
    return array != array


def product(
    backend: Backend,
    value: Named,
    condition: Named | None,
    indices: Sequence[str],
    lengths: Mapping[str, int],
) -> Named:
    """The product."""
    terms = masked(backend, value, condition, 1.0)
    positions, axes = _over(terms, indices)
    array = backend.prod(terms.array, positions)
    times = _absent(terms, indices, lengths)
    return Named(array if times == 1 else array**times, axes)


def extreme(
    backend: Backend,
    op: str,
    value: Named,
    condition: Named | None,
    indices: Sequence[str],
    lengths: Mapping[str, int],
) -> Named:
    """max or min; over nothing, the infinities (integers: the smallest or largest int64)."""
    value = lift(backend, value)
    whole = backend.kind(value.array) == "int"
    edge: float = -math.inf if op == "max" else math.inf
    if whole:
        edge = -(2**63) if op == "max" else 2**63 - 1
    terms = masked(backend, value, condition, edge)
    positions, axes = _over(terms, indices)
    empty = any(lengths[index] == 0 for index in indices)
    if empty:
        shape = [n for axis, n in zip(terms.axes, terms.shape) if axis in axes]
        return Named(backend.full(shape, edge, "int" if whole else "real"), axes)
    return Named(backend.max(terms.array, positions) if op == "max" else backend.min(terms.array, positions), axes)


def quantifier(
    backend: Backend,
    op: str,
    value: Named,
    condition: Named | None,
    indices: Sequence[str],
    lengths: Mapping[str, int],
) -> Named:
    """any or all."""
    terms = masked(backend, lift(backend, value, "bool"), condition, op == "all")
    positions, axes = _over(terms, indices)
    if any(lengths[index] == 0 for index in indices):
        shape = [n for axis, n in zip(terms.axes, terms.shape) if axis in axes]
        return Named(backend.full(shape, op == "all", "bool"), axes)
    array = terms.array
    if positions:
        array = backend.any(array, positions) if op == "any" else backend.all(array, positions)
    return Named(array, axes)


def _complete(backend: Backend, value: Named, indices: Sequence[str], lengths: Mapping[str, int]) -> Named:
    """The value with all reduced axes present."""
    missing = [index for index in indices if index not in value.axes]
    if not missing:
        return value
    axes = (*value.axes, *missing)
    return Named(expanded(backend, value, axes, {**value.lengths(), **lengths}), axes)


def _top(backend: Backend, value: Named, indices: Sequence[str]) -> Named:
    """The maximum over the reduced axes, without gradient: softmax and logsumexp do not depend on the shift."""
    positions, axes = _over(value, indices)
    return Named(backend.max(backend.detach(value.array), positions), axes)


def softmax(
    backend: Backend,
    value: Named,
    condition: Named | None,
    indices: Sequence[str],
    lengths: Mapping[str, int],
) -> Named:
    """Softmax over the reduced axes, which stay; excluded places and rows of -inf are 0."""
    terms = _complete(backend, masked(backend, lift(backend, value, "real"), condition, -math.inf), indices, lengths)
    if any(lengths[index] == 0 for index in indices):
        return terms
    top = _top(backend, terms, indices)
    shift = Named(backend.where(top.array == -math.inf, 0.0, top.array), top.axes)
    weights = combine(backend, backend.exp_of_difference, terms, shift)
    positions, axes = _over(weights, indices)
    norm = backend.sum(weights.array, positions)
    norm = backend.where(norm == 0, 1.0, norm)
    return combine(backend, backend.divide_fresh, weights, Named(norm, axes))


def logsumexp(
    backend: Backend,
    value: Named,
    condition: Named | None,
    indices: Sequence[str],
    lengths: Mapping[str, int],
) -> Named:
    """log sum exp over the reduced axes; -inf for nothing or only -inf."""
    terms = _complete(backend, masked(backend, lift(backend, value, "real"), condition, -math.inf), indices, lengths)
    positions, axes = _over(terms, indices)
    if any(lengths[index] == 0 for index in indices):
        shape = [n for axis, n in zip(terms.axes, terms.shape) if axis in axes]
        return Named(backend.full(shape, -math.inf, "real"), axes)
    top = _top(backend, terms, indices)
    shift = Named(backend.where(backend.isfinite(top.array), top.array, 0.0), top.axes)
    weights = combine(backend, backend.exp_of_difference, terms, shift)
    norm = backend.sum(weights.array, positions)
    empty = norm == 0
    log = backend.function("log")(backend.where(empty, 1.0, norm)) + shift.array
    return Named(backend.where(empty, -math.inf, log), axes)


def has_nan(backend: Backend, value: Named, condition: Named | None) -> Named | None:
    """Where an included element is NaN, or None when there is none."""
    value = lift(backend, value)
    if backend.kind(value.array) != "real":
        return None
    found = Named(backend.isnan(value.array), value.axes)
    if not backend.truth(found.array):
        return None
    if condition is not None:
        found = combine(backend, lambda a, b: a & b, found, lift(backend, condition, "bool"))
    return found if backend.truth(found.array) else None


def argmax(backend: Backend, value: Named, condition: Named | None, index: str, lengths: Mapping[str, int]) -> Named:
    """The lowest index of the largest included element; -1 for nothing."""
    value, flags = _ordered_parts(backend, value, condition, index, lengths)
    axis = value.axes.index(index)
    axes = tuple(a for a in value.axes if a != index)
    if lengths[index] == 0:
        shape = [n for a, n in zip(value.axes, value.shape) if a != index]
        return Named(backend.full(shape, -1, "int"), axes)
    least = -math.inf if backend.kind(value.array) == "real" else -(2**63)
    top = backend.max(backend.where(flags, value.array, least), [axis])
    best = combine(backend, lambda x, m: x == m, value, Named(top, axes))
    hit = spread_like(backend, best, value.axes) & flags
    first = backend.argmax(backend.to_int(hit), axis)
    return Named(backend.where(backend.any(flags, [axis]), first, -1), axes)


def spread_like(backend: Backend, value: Named, axes: tuple[str, ...]) -> Array:
    """The array with its axes in the given order."""
    return value.array if value.axes == axes else backend.permute(value.array, [value.axes.index(a) for a in axes])


def _ordered_parts(
    backend: Backend, value: Named, condition: Named | None, index: str, lengths: Mapping[str, int]
) -> tuple[Named, Array]:
    """The operand and the flags of included elements, both with all axes."""
    value = lift(backend, value)
    condition = Named(True) if condition is None else condition
    condition = lift(backend, condition, "bool")
    axes = union([value, condition])
    if index not in axes:
        axes = (*axes, index)
    size = {**condition.lengths(), **value.lengths(), index: lengths[index]}
    return (
        Named(expanded(backend, value, axes, size), axes),
        expanded(backend, condition, axes, size),
    )


def order(
    backend: Backend, op: str, value: Named, condition: Named | None, index: str, lengths: Mapping[str, int]
) -> Named:
    """rank (position of each element, 0 = largest) or argsort (element at each position).

    Ties: the lower index first. Excluded elements come last, in the order of their index.
    """
    value, flags = _ordered_parts(backend, value, condition, index, lengths)
    axis = value.axes.index(index)
    array = backend.detach(value.array)
    if lengths[index] == 0:
        return Named(backend.to_int(array), value.axes)
    array = backend.where(flags, array, 0 * backend.to_int(flags)) if condition is not None else array
    by_value = backend.argsort(-array, axis)
    if condition is None:
        sorting = by_value
    else:
        outside = backend.to_int(~flags)
        sorting = backend.take_along(by_value, backend.argsort(backend.take_along(outside, by_value, axis), axis), axis)
    return Named(sorting if op == "argsort" else backend.argsort(sorting, axis), value.axes)
