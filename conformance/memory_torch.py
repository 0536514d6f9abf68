"""Guarded memory for PyTorch tensors, on the CPU and on a GPU: the other half of `memory`.

Tensors are made from raw storages (no autograd views), and a `TorchFunctionMode` replaces what the candidate
allocates in Python. Allocations inside compiled code (`torch.compile`, C++) are not seen; a candidate that
cannot be traced under the mode states `guard_outputs=False` and the receipt says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from attnspec.conformance.bridges import dtype_name, torch_dtype
from attnspec.conformance.layouts import Geometry, geometry
from attnspec.conformance.memory import (
    GUARD_BYTE,
    POISON,
    Block,
    explain_change,
    explain_margin,
    margin,
)

ALLOCATORS = {
    torch.empty: "torch.empty",
    torch.empty_like: "torch.empty_like",
    torch.empty_strided: "torch.empty_strided",
    torch.zeros: "torch.zeros",
    torch.zeros_like: "torch.zeros_like",
    torch.ones: "torch.ones",
    torch.ones_like: "torch.ones_like",
    torch.full: "torch.full",
    torch.full_like: "torch.full_like",
    torch.Tensor.new_empty: "Tensor.new_empty",
    torch.Tensor.new_empty_strided: "Tensor.new_empty_strided",
    torch.Tensor.new_zeros: "Tensor.new_zeros",
    torch.Tensor.new_ones: "Tensor.new_ones",
    torch.Tensor.new_full: "Tensor.new_full",
}
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TorchMemory:
    """Guarded buffers for torch on one device."""

    def __init__(self, device: str, *, guard_outputs: bool = True, finite: bool = False) -> None:
        self.device = device
        self.guard_outputs = guard_outputs
        self.finite = finite
        self.inputs: list[Block] = []
        self.allocated: list[Block] = []

    def place(self, name: str, array: Any, kind: str, dtype: str, layout: str) -> Any:
        values = np.asarray(array)
        target = torch_dtype(dtype)
        place = geometry(values.shape, layout, values)
        size = target.itemsize
        side = margin(place.shape, size)
        start = side + (size if place.misaligned else 0)
        total = -(-(start + place.span * size + side) // 64) * 64
        data = torch.full((total,), GUARD_BYTE[kind], dtype=torch.uint8, device=self.device)
        if self.finite:
            data.view(target).fill_(1)
        tensor = _at(data, target, start // size + place.offset, place.shape, place.strides)
        source = torch.from_numpy(np.ascontiguousarray(values)).to(target)
        if place.layout == "expanded":
            cut = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in place.strides)
            tensor[cut].copy_(source[cut])
        else:
            tensor.copy_(source)
        self.inputs.append(Block(name, place.shape, size, place, start, data, data.clone()))
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self.guard_outputs:
            yield
            return
        with _Watch(self):
            yield

    def guarded(self, tensor: Any, label: str) -> Any:
        """The same tensor in a guarded buffer; anything but a plain dense tensor with elements is left as it
        is."""
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or not tensor.numel() or tensor.device.type not in ("cpu", "cuda"):
            return tensor
        size = tensor.dtype.itemsize
        strides = tensor.stride()
        span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, strides, strict=True))
        side = margin(tuple(tensor.shape), size)
        total = -(-(2 * side + span * size) // 64) * 64
        data = torch.empty((total,), dtype=torch.uint8, device=tensor.device)
        data[:side].fill_(GUARD_BYTE["real"])
        data[side + span * size :].fill_(GUARD_BYTE["real"])
        copy = _at(data, tensor.dtype, side // size, tuple(tensor.shape), strides)
        if "empty" in label:
            bits = POISON.get(dtype_name(tensor.dtype))
            inner = data[side : side + span * size]
            if bits is not None:
                inner.view(_INTEGER[size]).fill_(bits)
            elif tensor.dtype is not torch.bool:
                inner.fill_(GUARD_BYTE["int"])
        elif "zeros" in label:
            copy.zero_()
        else:
            copy.copy_(tensor.detach())
        place = Geometry("contiguous", tuple(tensor.shape), tuple(strides), 0, span)
        self.allocated.append(Block(label, tuple(tensor.shape), size, place, side, data))
        return copy.requires_grad_(tensor.requires_grad)

    def faults(self) -> list[str]:
        lines: list[str] = []
        for block in self.inputs:
            if not torch.equal(block.data, block.before):
                lines += explain_change(block, block.data.cpu().numpy(), block.before.cpu().numpy())
        for block in self.allocated:
            end = block.start + block.place.span * block.itemsize
            low, high = block.data[: block.start], block.data[end:]
            byte = GUARD_BYTE["real"]
            if bool((low != byte).any()) or bool((high != byte).any()):
                line = explain_margin(block, low.cpu().numpy(), high.cpu().numpy(), byte)
                lines += [line] if line else []
        return lines

    def alias(self, value: Any) -> str | None:
        if not value.numel() or value.layout is not torch.strided:
            return None
        address = value.untyped_storage().data_ptr()
        return next((block.label for block in self.inputs if block.data.untyped_storage().data_ptr() == address), None)

    def unwritten(self, value: Any) -> int:
        bits = POISON.get(dtype_name(value.dtype))
        if bits is None or not value.numel():
            return 0
        flat = value.detach().contiguous().view(_INTEGER[value.dtype.itemsize])
        return int((flat == bits).sum())

    def layout_of(self) -> dict[str, str]:
        return {block.label: block.place.layout for block in self.inputs}


class _Watch(TorchFunctionMode):  # type: ignore[misc]
    """Replaces the result of every allocator by the same tensor in a guarded buffer."""

    def __init__(self, memory: TorchMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        label = ALLOCATORS.get(func)
        if label is None or (kwargs and kwargs.get("out") is not None):
            return result
        return self.memory.guarded(result, label)


def _at(data: Any, dtype: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A tensor over the buffer's storage that is no autograd view of it."""
    return torch.empty(0, dtype=dtype, device=data.device).set_(data.untyped_storage(), offset, shape, strides)
