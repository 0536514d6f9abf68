"""Guarded memory: what a candidate reads and writes outside of what it was given shows.

Inputs lie in larger buffers whose margins and gaps hold NaN (integers: huge values), so that a read outside
poisons the result; afterwards every byte must be as it was. What the candidate allocates in Python
(`torch.empty`, `numpy.zeros`, ...) during the call comes from guarded buffers too: an allocation that is
never written holds a NaN of its own, and a write outside breaks the margin. A result that is an input's
memory is reported as that. Used by `calling`; PyTorch's half is `memory_torch`. JAX arrays are immutable and
owned by the runtime: `Unguarded` checks only that inputs come back unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from attnspec.conformance.bridges import numpy_dtype, to_jax
from attnspec.conformance.layouts import Geometry, geometry

# Bytes that make a NaN in every floating-point format, a huge number in every integer, and True.
GUARD_BYTE = {"real": 0xFF, "int": 0x7F, "bool": 0x01}
# Bits of the NaN that fills a fresh allocation, by item size and format: no arithmetic makes exactly these.
POISON = {"fp32": 0x7FFA5A5A, "fp16": 0x7F5A, "bf16": 0x7FDA, "fp64": 0x7FFA5A5A5A5A5A5A}
MARGIN_MIN, MARGIN_MAX = 256, 65536
_empty = np.empty  # NumPy's own, also while the candidate's is watched


class Memory(Protocol):
    """What `calling` needs: place inputs, watch allocations during the call, and tell afterwards what
    happened."""

    def place(self, name: str, array: Any, kind: str, dtype: str, layout: str) -> Any: ...
    def watching(self) -> Any: ...
    def faults(self) -> list[str]: ...
    def alias(self, value: Any) -> str | None: ...
    def unwritten(self, value: Any) -> int: ...
    def layout_of(self) -> dict[str, str]: ...


def margin(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes on either side: 128 rows of the last axis (a tile's worth), within limits, a multiple of 64."""
    row = (shape[-1] if shape else 1) * itemsize
    return -(-max(MARGIN_MIN, min(MARGIN_MAX, 128 * row)) // 64) * 64


@dataclass
class Block:
    """A guarded buffer as bytes, with where the array lies in it. `before` is a copy to compare with
    (inputs)."""

    label: str
    shape: tuple[int, ...]
    itemsize: int
    place: Geometry
    start: int
    data: Any
    before: Any = None


def explain_change(block: Block, after: Any, before: Any) -> list[str]:
    """Sentences for the bytes of an input's buffer that differ: inside the array, and outside."""
    element = np.flatnonzero(after != before) // block.itemsize
    changed = np.unique(element)
    first = block.start // block.itemsize
    number = np.full(-(-after.size // block.itemsize), -1, dtype=np.int64)
    count = int(np.prod(block.shape))
    if count:
        window = np.lib.stride_tricks.as_strided(
            number[first + block.place.offset :],
            block.shape,
            tuple(8 * stride for stride in block.place.strides),
        )
        window[...] = np.arange(count).reshape(block.shape)
    inside = number[changed]
    lines = []
    if (inside >= 0).any():
        where = np.unravel_index(int(inside[inside >= 0].min()), block.shape)
        index = ", ".join(str(int(part)) for part in where)
        lines.append(
            f"changes its input {block.label}: {int((inside >= 0).sum())} of {count} elements, the first at [{index}]"
        )
    outside = changed[inside < 0]
    if outside.size:
        low, high = first + block.place.offset, first + block.place.span
        side = "before" if outside[0] < low else "after" if outside[0] >= high else "between the rows of"
        away = low - int(outside[-1]) if side == "before" else int(outside[0]) - high + 1
        near = "" if side.startswith("between") else f", {abs(away)} elements away"
        lines.append(f"writes out of bounds: {outside.size} elements {side} the input {block.label}{near}")
    return lines


def explain_margin(block: Block, low: Any, high: Any, byte: int) -> str | None:
    """A sentence for a broken margin of an allocation, from the bytes on its two sides."""
    under, over = np.flatnonzero(low != byte), np.flatnonzero(high != byte)
    if not under.size and not over.size:
        return None
    parts = []
    if under.size:
        parts.append(f"{-(-under.size // block.itemsize)} elements before its start")
    if over.size:
        away = int(over[0]) // block.itemsize
        parts.append(f"{-(-over.size // block.itemsize)} elements past its end (the first {away} past it)")
    return f"writes out of bounds: {' and '.join(parts)}, in a tensor of shape {block.shape} from {block.label}"


class NumpyMemory:
    """Guarded buffers for NumPy, and NumPy's allocators replaced while the candidate runs."""

    ALLOCATORS = ("empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like")

    def __init__(self, *, guard_outputs: bool = True, finite: bool = False) -> None:
        self.guard_outputs = guard_outputs
        self.finite = finite
        self.inputs: list[Block] = []
        self.allocated: list[Block] = []

    def place(self, name: str, array: Any, kind: str, dtype: str, layout: str) -> Any:
        values = np.asarray(array)
        target = numpy_dtype(dtype)
        place = geometry(values.shape, layout, values)
        side = margin(place.shape, target.itemsize)
        start = side + (target.itemsize if place.misaligned else 0)
        total = -(-(start + place.span * target.itemsize + side) // 64) * 64
        data = _aligned(total)
        data[...] = GUARD_BYTE[kind]
        if self.finite:
            data.view(target)[...] = 1
        view: Any = np.ndarray(
            place.shape,
            target,
            buffer=data.data,
            offset=start + place.offset * target.itemsize,
            strides=tuple(stride * target.itemsize for stride in place.strides),
        )
        np.copyto(
            _writable(view, place),
            values.astype(target) if not _is_expanded(place) else _collapsed(values, place),
        )
        self.inputs.append(Block(name, place.shape, target.itemsize, place, start, data, data.copy()))
        return view

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self.guard_outputs:
            yield
            return
        originals = {name: getattr(np, name) for name in self.ALLOCATORS}
        try:
            for name, original in originals.items():
                setattr(np, name, self._watched(name, original))
            yield
        finally:
            for name, original in originals.items():
                setattr(np, name, original)

    def _watched(self, name: str, original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            array = original(*args, **kwargs)
            return self._guarded(array, f"numpy.{name}", fresh=name.startswith("empty"))

        return allocate

    def _guarded(self, array: Any, label: str, *, fresh: bool) -> Any:
        if type(array) is not np.ndarray or array.dtype.hasobject or not array.size or not array.dtype.itemsize:
            return array
        size = array.dtype.itemsize
        side = margin(array.shape, size)
        data = _aligned(-(-(2 * side + array.nbytes) // 64) * 64)
        data[...] = GUARD_BYTE["real"]
        view: Any = np.ndarray(array.shape, array.dtype, buffer=data.data, offset=side, strides=array.strides)
        place = Geometry("contiguous", array.shape, (), 0, array.size)
        if fresh:
            bits = POISON.get(_format(array.dtype))
            if bits is not None:
                data[side : side + array.nbytes].view(f"u{size}")[...] = bits
        else:
            view[...] = array
        self.allocated.append(Block(label, array.shape, size, place, side, data))
        return view

    def faults(self) -> list[str]:
        lines: list[str] = []
        for block in self.inputs:
            if not np.array_equal(block.data, block.before):
                lines += explain_change(block, block.data, block.before)
        for block in self.allocated:
            end = block.start + block.place.span * block.itemsize
            line = explain_margin(block, block.data[: block.start], block.data[end:], GUARD_BYTE["real"])
            lines += [line] if line else []
        return lines

    def alias(self, value: Any) -> str | None:
        return next(
            (block.label for block in self.inputs if value.size and np.may_share_memory(value, block.data)),
            None,
        )

    def unwritten(self, value: Any) -> int:
        bits = POISON.get(_format(value.dtype))
        if bits is None or not value.size:
            return 0
        return int(np.count_nonzero(np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}") == bits))

    def layout_of(self) -> dict[str, str]:
        return {block.label: block.place.layout for block in self.inputs}


class Unguarded:
    """JAX: arrays that the runtime owns. Only "inputs unchanged" can be checked, and memory layouts do not
    exist."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.inputs: list[tuple[str, Any, Any]] = []

    def place(self, name: str, array: Any, kind: str, dtype: str, layout: str) -> Any:
        value = to_jax(array, dtype, self.device)
        self.inputs.append((name, value, np.array(value)))
        return value

    @contextmanager
    def watching(self) -> Iterator[None]:
        yield

    def faults(self) -> list[str]:
        return [
            f"changes its input {name}"
            for name, value, before in self.inputs
            if np.asarray(value).tobytes() != before.tobytes()
        ]

    def alias(self, value: Any) -> str | None:
        return next((name for name, given, _ in self.inputs if value is given and value.size), None)

    def unwritten(self, value: Any) -> int:
        return 0

    def layout_of(self) -> dict[str, str]:
        return {name: "the runtime's own" for name, _, _ in self.inputs}


def _aligned(size: int) -> Any:
    """`size` bytes that start at a multiple of 64, so that "misaligned" is one and "contiguous" is not."""
    raw = _empty(size + 64, dtype=np.uint8)
    shift = -raw.ctypes.data % 64
    return raw[shift : shift + size]


def _is_expanded(place: Geometry) -> bool:
    return place.layout == "expanded"


def _collapsed(values: Any, place: Geometry) -> Any:
    return values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in place.strides)]


def _writable(view: Any, place: Geometry) -> Any:
    """The view with every stride-0 axis cut to length 1, so that each element is written once."""
    return _collapsed(view, place) if _is_expanded(place) else view


def _format(dtype: Any) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(str(dtype), "")
