"""Arrays whose axes have names: the value type of the array evaluator.

An axis is named after the index it runs over (batch axes included). A value that does not depend on an index
has no axis for it: that is how `allowed[i,j]` stays one small array for all batches and heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnspec.spec.language.backend import Array, Backend


@dataclass(frozen=True, slots=True)
class Named:
    """`array` with one axis per name in `axes`. Without axes, `array` may be a plain Python number."""

    array: Array
    axes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape) if self.axes else ()

    def lengths(self) -> dict[str, int]:
        """The length of each axis."""
        return dict(zip(self.axes, self.shape))


def is_scalar(value: Any) -> bool:
    """Whether a value is a plain Python number."""
    return isinstance(value, bool | int | float)


def kind_of_array(backend: Backend, array: Array) -> str:
    """real, int or bool, for arrays and plain numbers."""
    if isinstance(array, bool):
        return "bool"
    if isinstance(array, int):
        return "int"
    return "real" if isinstance(array, float) else backend.kind(array)


def lift(backend: Backend, value: Named, kind: str | None = None) -> Named:
    """The value with a real array instead of a plain number, converted to `kind` if given."""
    have = kind_of_array(backend, value.array)
    if is_scalar(value.array):
        return Named(backend.asarray(value.array, kind or have), value.axes)
    if kind is None or kind == have:
        return value
    return Named(backend.asarray(value.array, kind), value.axes)


def union(values: Iterable[Named]) -> tuple[str, ...]:
    """All axes: those of the widest value first, in its order, then the others as they come."""
    every = list(values)
    if not every:
        return ()
    axes = list(max(every, key=lambda value: len(value.axes)).axes)
    for value in every:
        axes.extend(axis for axis in value.axes if axis not in axes)
    return tuple(axes)


def spread(backend: Backend, value: Named, axes: Sequence[str]) -> Array:
    """The array permuted to the order of `axes`, with length 1 where it lacks an axis."""
    if value.axes == tuple(axes) or not value.axes:
        return value.array
    order = [value.axes.index(axis) for axis in axes if axis in value.axes]
    array = value.array if order == list(range(len(order))) else backend.permute(value.array, order)
    if len(order) == len(axes):
        return array
    lengths = value.lengths()
    leading = next((k for k, axis in enumerate(axes) if axis in lengths), 0)
    return backend.reshape(array, [lengths.get(axis, 1) for axis in axes[leading:]])


def expanded(backend: Backend, value: Named, axes: Sequence[str], lengths: Mapping[str, int]) -> Array:
    """The array with exactly `axes`, those it lacks expanded to their length."""
    value = lift(backend, value)
    array = spread(backend, value, axes)
    shape = tuple(lengths[axis] for axis in axes)
    return array if tuple(array.shape) == shape else backend.expand(array, shape)


def combine(backend: Backend, function: Any, *values: Named) -> Named:
    """`function` of the arrays, broadcast against each other by axis name."""
    first = values[0].axes
    if all(value.axes == first or not value.axes for value in values) and first:
        return Named(function(*(value.array for value in values)), first)
    axes = union(values)
    return Named(function(*(spread(backend, value, axes) for value in values)), axes)


def conjunction(backend: Backend, values: Sequence[Named]) -> Named | None:
    """The logical and of conditions, None for no condition."""
    result: Named | None = None
    for value in values:
        value = lift(backend, value, "bool")
        result = value if result is None else combine(backend, lambda a, b: a & b, result, value)
    return result
