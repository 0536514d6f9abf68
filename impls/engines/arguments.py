"""Checking the tensors of a call: axes by name, one dtype and device, and errors that name the argument.

    call = Arguments("lightning_attention")
    call.tensor("Q", Q, "b h i d")           # the first tensor fixes dtype, device and the lengths of its axes
    call.tensor("s", s, "h", real=True)      # any floating dtype
    B, H, N, D = call.sizes("b h i d")

Nothing is broadcast or cast. Used by the modules of `attnspec.impls`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.types import Unsupported

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Arguments:
    """The sizes, dtype and device that a call's tensors agree on so far."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.lengths: dict[str, int] = {}
        self.first: tuple[str, Tensor] | None = None

    def tensor(self, name: str, value: Any, axes: str, *, real: bool = False, optional: bool = False) -> Tensor | None:
        """Check one floating-point tensor.

        Args:
            axes: names of its axes; an axis met before must have the same length.
            real: whether any floating dtype is right, or only that of the first tensor.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            Unsupported: a dtype for which there is no kernel.
        """
        if value is None and optional:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.function}: {name} must be a torch tensor, got {type(value).__name__}")
        names = axes.split()
        if value.ndim != len(names):
            raise self.wrong(name, f"of {len(names)} axes [{', '.join(names)}]", f"shape {list(value.shape)}")
        for axis, length in zip(names, value.shape):
            known = self.lengths.setdefault(axis, length)
            if known != length:
                raise self.wrong(name, f"of length {known} along {axis} in [{', '.join(names)}]", list(value.shape))
        if not value.is_floating_point():
            raise self.wrong(name, "a floating-point tensor", value.dtype)
        if self.first is None:
            if value.dtype not in DTYPES:
                raise Unsupported(f"{self.function}: no kernel for {name} in {value.dtype}")
            self.first = name, value
        first, like = self.first
        if value.dtype != like.dtype and not real:
            raise self.wrong(name, f"of {first}'s dtype {like.dtype}", value.dtype)
        if value.device != like.device:
            raise self.wrong(name, f"on {first}'s device {like.device}", value.device)
        return value

    def sizes(self, axes: str) -> tuple[int, ...]:
        """The lengths of these axes."""
        return tuple(self.lengths[axis] for axis in axes.split())

    def count(self, name: str, value: Any, least: int = 1) -> int:
        """An integer option of at least `least`."""
        if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
            raise self.wrong(name, "an int", repr(value))
        if int(value) < least:
            raise self.wrong(name, f"at least {least}", int(value))
        return int(value)

    def at_most(self, axes: str, most: int) -> None:
        """Refuse lengths beyond what the kernels hold."""
        for axis in axes.split():
            if self.lengths[axis] > most:
                raise Unsupported(f"{self.function}: {axis} = {self.lengths[axis]}, the kernels hold at most {most}")

    def wrong(self, name: str, wanted: str, came: Any) -> ValueError:
        """The error of an argument."""
        return ValueError(f"{self.function}: {name} must be {wanted}, got {came}")
