"""Memory layouts: where the elements of a logical array lie in a larger buffer.

`geometry` turns a shape and a layout's name into strides, an offset and a span, in elements; `memory` puts
guard bands around and NaN between. A layout that makes no sense for a shape (a transposed vector) falls back
to the nearest one that does, and the geometry says which it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LAYOUTS = ("contiguous", "transposed", "swapped", "strided", "padded", "offset", "expanded", "misaligned")


@dataclass(frozen=True)
class Geometry:
    """Strides and offset in elements; `span` elements hold the whole array, gaps included."""

    layout: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    span: int
    misaligned: bool = False


def geometry(shape: Sequence[int], layout: str, values: Any = None) -> Geometry:
    """Lay out an array.

    Args:
        shape: the logical shape.
        layout: contiguous; transposed (the last two axes are swapped in memory); swapped (the second and
            third last are: `[b,h,i,d]` stored as `[b,i,h,d]`); strided (every other element of the last
                axis); padded (rows lie
            further apart than they are long); offset (a slice, from index 1 on, of an array that is larger in
            every axis); expanded (stride 0 along every axis on which `values` do not vary); misaligned
            (starts one element after a multiple of 64 bytes).
        values: the array itself, needed for "expanded" only.

    Raises:
        ValueError: an unknown layout.
    """
    dims = tuple(int(size) for size in shape)
    axes = len(dims)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    order = list(range(axes))
    outer = list(dims)
    start = [0] * axes
    step = 1
    if layout == "transposed" and axes >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    elif layout == "swapped" and axes >= 3:
        order[-2], order[-3] = order[-3], order[-2]
    elif layout == "strided" and axes:
        outer[-1], step = 2 * dims[-1], 2
    elif layout == "padded" and axes:
        outer[-1] = dims[-1] + 3
    elif layout == "offset" and axes:
        outer, start = [size + 2 for size in dims], [1] * axes
    elif layout not in ("expanded", "misaligned"):
        layout = "contiguous"
    strides = [0] * axes
    run = 1
    for axis in reversed(order):
        strides[axis] = run
        run *= max(outer[axis], 1)
    if axes:
        strides[-1] *= step
    if layout == "expanded":
        strides, layout = _expand(dims, np.asarray(values))
    offset = sum(first * stride for first, stride in zip(start, strides, strict=True))
    if 0 in dims:
        return Geometry(layout, dims, tuple(strides), offset, offset, layout == "misaligned")
    last = offset + sum((size - 1) * stride for size, stride in zip(dims, strides, strict=True))
    return Geometry(layout, dims, tuple(strides), offset, last + 1, layout == "misaligned")


def _expand(dims: tuple[int, ...], values: Any) -> tuple[list[int], str]:
    """Stride 0 along axes of length > 1 on which the values are constant; NaN counts as equal to NaN."""
    constant = []
    for axis, size in enumerate(dims):
        first = np.take(values, [0], axis=axis) if size else values
        constant.append(
            size > 1 and bool(np.array_equal(np.broadcast_to(first, dims), values, equal_nan=_real(values)))
        )
    strides = [0] * len(dims)
    run = 1
    for axis in reversed(range(len(dims))):
        if not constant[axis]:
            strides[axis] = run
            run *= max(dims[axis], 1)
    return strides, "expanded" if any(constant) else "contiguous"


def _real(values: Any) -> bool:
    return bool(values.dtype.kind == "f")
