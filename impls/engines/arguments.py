"""Checking the tensors of a call: axes by name, one dtype and device, and errors that name the argument.

    call = Arguments("lightning_attention")
    call.tensor("Q", Q, "b h i d")           # the first tensor fixes dtype, device and the lengths of its axes
    call.tensor("s", s, "h", real=True)      # any floating dtype
    B, H, N, D = call.sizes("b h i d")

Nothing is broadcast or cast. Used by the modules of `attnspec.impls`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime

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

    def block(self, value: int | None, choices: tuple[int, ...], interpreted: int, tensor: Tensor) -> int:
        """The length of a tile: one of `choices`, by default the first.

        Triton's interpreter takes as long for a small tile as for a large one; there `interpreted` is allowed too, and
        is the default. Raises Unsupported where kernels cannot run on `tensor`.
        """
        known = choices if runtime.target_of(tensor) else (interpreted, *choices)
        if value is None:
            return known[0]
        if value not in known:
            raise self.wrong("block", f"one of {known}", value)
        return value

    def boolean(self, name: str, value: Any, axes: str, broadcast: str = "") -> Tensor | None:
        """Check an optional mask; its axes of length 1 named in `broadcast` come back expanded."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.function}: {name} must be a torch tensor, got {type(value).__name__}")
        if value.dtype != torch.bool:
            raise self.wrong(name, "of dtype torch.bool", value.dtype)
        shape, wide = self.sizes(axes), broadcast.split()
        fits = value.ndim == len(shape) and all(
            got == want or (got == 1 and axis in wide) for axis, got, want in zip(axes.split(), value.shape, shape)
        )
        if not fits:
            extra = f" ({', '.join(wide)} may be 1)" if wide else ""
            raise self.wrong(name, f"of shape [{axes.replace(' ', ', ')}] = {list(shape)}{extra}", list(value.shape))
        self._same_device(name, value)
        return value.expand(shape)

    def integers(
        self, name: str, value: Any, axes: str, low: int | None = None, high: int | None = None
    ) -> Tensor | None:
        """Check an optional tensor of integers; its values only on the CPU, where looking does not wait."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.function}: {name} must be a torch tensor, got {type(value).__name__}")
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise self.wrong(name, "an integer tensor", value.dtype)
        shape = self.sizes(axes)
        if tuple(value.shape) != shape:
            raise self.wrong(name, f"of shape [{axes.replace(' ', ', ')}] = {list(shape)}", list(value.shape))
        self._same_device(name, value)
        if value.device.type == "cpu" and value.numel():
            least, most = int(value.min()), int(value.max())
            if (low is not None and least < low) or (high is not None and most > high):
                raise self.wrong(name, f"within {low}..{high}", f"{least}..{most}")
        return value

    def flag(self, name: str, value: Any) -> bool:
        """A boolean option."""
        if not isinstance(value, bool):
            raise self.wrong(name, "True or False", repr(value))
        return value

    def number(self, name: str, value: Any, default: float | None = None) -> float:
        """A finite real option; None stands for the default where there is one."""
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a finite number", repr(value))
        return float(value)

    def _same_device(self, name: str, value: Tensor) -> None:
        assert self.first is not None
        first, like = self.first
        if value.device != like.device:
            raise self.wrong(name, f"on {first}'s device {like.device}", value.device)

    def no_gradients(self, *inputs: Tensor | None) -> None:
        """Refuse inputs that want a gradient, for kernels that have no backward pass."""
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            raise Unsupported(f"{self.function}: no kernel computes gradients; call it under torch.no_grad()")

    def at_most(self, axes: str, most: int) -> None:
        """Refuse lengths beyond what the kernels hold."""
        for axis in axes.split():
            if self.lengths[axis] > most:
                raise Unsupported(f"{self.function}: {axis} = {self.lengths[axis]}, the kernels hold at most {most}")

    def wrong(self, name: str, wanted: str, came: Any) -> ValueError:
        """The error of an argument."""
        return ValueError(f"{self.function}: {name} must be {wanted}, got {came}")
