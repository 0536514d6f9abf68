"""Sums of products of named arrays, contracted pairwise with matrix products.

`contract` sums a product of operands over some axes. It picks pairs greedily by cost, sums what only one
operand has first, and never builds the full outer product unless a pair forces it. Non-finite entries are
exact: an entry that the mask excludes does not contribute, whatever its value, and an included one makes the
sums it takes part in what IEEE addition of the same terms would give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from attnspec.spec.language.backend import Array, Backend
from attnspec.spec.language.named import Named, combine, lift, spread, union

_CHUNK = 1 << 21


def contract(
    backend: Backend,
    operands: Sequence[Named],
    summed: frozenset[str],
    mask: Named | None,
    lengths: Mapping[str, int],
) -> Named:
    """The sum over `summed` of the product of `operands`, over the places where `mask` is true.

    Args:
        operands: real arrays; axes of length `lengths[axis]`.
        summed: axes to sum; one that no operand has multiplies by its length.
        mask: bool array, or None for all places.
        lengths: length of every summed axis.
    """
    odd = [
        backend.detach(_nonfinite(backend, operand)) if _suspicious(backend, operand) else None for operand in operands
    ]
    if all(entries is None for entries in odd):
        return _finite(backend, list(operands), summed, mask, lengths)
    clean = [
        operand if entries is None else Named(backend.where(entries, 0.0, operand.array), operand.axes)
        for operand, entries in zip(operands, odd)
    ]
    result = _finite(backend, clean, summed, mask, lengths)
    touched: Named | None = None
    for operand, entries in zip(operands, odd):
        if entries is None:
            continue
        count = _finite(backend, [Named(backend.to_real(entries), operand.axes)], summed, mask, lengths)
        found = Named(count.array > 0, count.axes)
        touched = found if touched is None else combine(backend, lambda a, b: a | b, touched, found)
    assert touched is not None
    return _repaired(backend, result, touched, operands, summed, mask, lengths)


def _suspicious(backend: Backend, operand: Named) -> bool:
    """Whether an operand may hold a non-finite entry: one cheap pass (a sum that overflows is a false alarm)."""
    if not operand.axes:
        return not math.isfinite(float(operand.array))
    total = backend.detach(backend.sum(backend.detach(operand.array), range(len(operand.axes))))
    return not math.isfinite(float(total))


def _nonfinite(backend: Backend, operand: Named) -> Array:
    return ~backend.isfinite(operand.array)


def _finite(
    backend: Backend,
    operands: list[Named],
    summed: frozenset[str],
    mask: Named | None,
    lengths: Mapping[str, int],
) -> Named:
    """`contract` for finite operands."""
    parts = list(operands)
    if mask is not None:
        host = next((k for k, part in enumerate(parts) if set(mask.axes) <= set(part.axes)), None)
        if host is None:
            parts.append(Named(backend.to_real(mask.array), mask.axes))
        else:
            part = parts[host]
            parts[host] = Named(backend.where(spread(backend, mask, part.axes), part.array, 0.0), part.axes)
    factor = math.prod(lengths[axis] for axis in summed if not any(axis in part.axes for part in parts))
    left = {axis for axis in summed if any(axis in part.axes for part in parts)}
    parts = [_presum(backend, part, parts, k, left) for k, part in enumerate(parts)]
    left = {axis for axis in left if any(axis in part.axes for part in parts)}
    while len(parts) > 1:
        a, b = _cheapest(parts, left)
        rest = [part for k, part in enumerate(parts) if k not in (a, b)]
        inner = {axis for axis in left if not any(axis in part.axes for part in rest)}
        rest.append(_pair(backend, parts[a], parts[b], inner))
        left -= inner
        parts = rest
    result = parts[0]
    return result if factor == 1 else Named(result.array * float(factor), result.axes)


def _presum(backend: Backend, part: Named, parts: list[Named], position: int, summed: set[str]) -> Named:
    """Sums the axes that no other operand has."""
    own = [
        axis
        for axis in part.axes
        if axis in summed and not any(axis in other.axes for k, other in enumerate(parts) if k != position)
    ]
    if not own:
        return part
    array = backend.sum(part.array, [part.axes.index(axis) for axis in own])
    return Named(array, tuple(axis for axis in part.axes if axis not in own))


def _cheapest(parts: list[Named], summed: set[str]) -> tuple[int, int]:
    """The pair to contract next: fewest multiplications, then the smallest result."""
    sizes: dict[str, int] = {}
    for part in parts:
        sizes.update(part.lengths())
    best: tuple[float, float] | None = None
    chosen = (0, 1)
    for a, b in itertools.combinations(range(len(parts)), 2):
        both = set(parts[a].axes) | set(parts[b].axes)
        rest = {axis for k, part in enumerate(parts) if k not in (a, b) for axis in part.axes}
        kept = {axis for axis in both if axis not in summed or axis in rest}
        cost = (math.prod(sizes[axis] for axis in both), math.prod(sizes[axis] for axis in kept))
        if best is None or cost < best:
            best, chosen = cost, (a, b)
    return chosen


def _pair(backend: Backend, a: Named, b: Named, inner: set[str]) -> Named:
    """The product of two operands, summed over the axes `inner` (which both have)."""
    shared = set(a.axes) & set(b.axes)
    batch = [axis for axis in a.axes if axis in shared and axis not in inner]
    middle = [axis for axis in a.axes if axis in shared and axis in inner]
    outer_a = [axis for axis in a.axes if axis not in shared]
    outer_b = [axis for axis in b.axes if axis not in shared]
    if not middle or not (outer_a or outer_b):
        product = combine(backend, lambda x, y: x * y, a, b)
        if not middle:
            return product
        array = backend.sum(product.array, [product.axes.index(axis) for axis in middle])
        return Named(array, tuple(axis for axis in product.axes if axis not in inner))
    size = {**a.lengths(), **b.lengths()}

    def count(axes: list[str]) -> int:
        return math.prod(size[axis] for axis in axes)

    shape = [size[axis] for axis in batch]
    left = backend.reshape(_ordered(backend, a, batch + outer_a + middle), [*shape, count(outer_a), count(middle)])
    right = _ordered(backend, b, batch + middle + outer_b)
    right = backend.reshape(right, [*shape, count(middle), count(outer_b)])
    axes = batch + outer_a + outer_b
    array = backend.matmul(left, right)
    return Named(backend.reshape(array, [size[axis] for axis in axes]), tuple(axes))


def _ordered(backend: Backend, value: Named, axes: list[str]) -> Array:
    order = [value.axes.index(axis) for axis in axes]
    return value.array if order == list(range(len(order))) else backend.permute(value.array, order)


def _repaired(
    backend: Backend,
    result: Named,
    touched: Named,
    operands: Sequence[Named],
    summed: frozenset[str],
    mask: Named | None,
    lengths: Mapping[str, int],
) -> Named:
    """`result` with the touched elements summed term by term.

    The replacements carry no gradient: a non-finite value has none, and a zero cotangent must not meet it.
    """
    if not touched.axes:
        if not bool(touched.array):
            return result
        return Named(_exact(backend, operands, summed, mask, lengths), result.axes)
    axes = result.axes
    shape = [dict(zip(axes, result.shape))[axis] for axis in axes]
    everywhere = backend.to_numpy(backend.expand(spread(backend, touched, axes), shape))
    places = everywhere.nonzero()
    if not len(places[0]):
        return result
    terms = max(1, math.prod(lengths[axis] for axis in summed))
    step = max(1, _CHUNK // terms)
    pieces = []
    for start in range(0, len(places[0]), step):
        at = {axis: backend.asarray(place[start : start + step], "int") for axis, place in zip(axes, places)}
        chosen = [_picked(backend, operand, at) for operand in operands]
        pieces.append(_exact(backend, chosen, summed, None if mask is None else _picked(backend, mask, at), lengths))
    values = pieces[0] if len(pieces) == 1 else backend.xp.concat(pieces) if hasattr(backend.xp, "concat") else None
    # scatter without writing: rank the touched places, gather the recomputed values back
    flat = everywhere.ravel()
    rank = (flat.cumsum() - 1).clip(0)
    gathered = backend.reshape(backend.take(values, rank, 0), shape)
    return Named(backend.where(backend.asarray(everywhere, "bool"), gathered, result.array), axes)


def _picked(backend: Backend, value: Named, at: Mapping[str, Array]) -> Named:
    """The value at a list of places along the kept axes: axes [places, its summed axes]."""
    kept = [axis for axis in value.axes if axis in at]
    rest = [axis for axis in value.axes if axis not in at]
    if not kept:
        return value
    array = _ordered(backend, Named(backend.detach(value.array), value.axes), kept + rest)
    return Named(array[tuple(at[axis] for axis in kept)], ("@", *rest))


def _exact(
    backend: Backend,
    operands: Sequence[Named],
    summed: frozenset[str],
    mask: Named | None,
    lengths: Mapping[str, int],
) -> Array:
    """Sum of products, term by term, on detached operands."""
    product = lift(backend, Named(backend.detach(operands[0].array), operands[0].axes))
    for operand in operands[1:]:
        product = combine(backend, lambda a, b: a * b, product, Named(backend.detach(operand.array), operand.axes))
    if mask is not None:
        product = combine(backend, lambda m, x: backend.where(m, x, 0.0), mask, product)
    absent = math.prod(lengths[axis] for axis in summed if axis not in product.axes)
    array = backend.sum(product.array, [k for k, axis in enumerate(product.axes) if axis in summed])
    return array if absent == 1 else array * float(absent)


__all__ = ["contract", "union"]
