"""Where kernels run: on the device of their tensors, or in Triton's interpreter on the CPU.

Import this module before Triton: Triton decides at import whether it interprets. Without an accelerator the
interpreter is the only way to run, so that it is switched on here unless TRITON_INTERPRET is set already; nothing
changes on a machine that has one. `recorded` takes launches down instead of running them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.types import Unsupported

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


Target = tuple[str, int | str]


@dataclass
class Recording:
    """Launches taken down for a target: ("cuda", 90), ("hip", "gfx942"), ..."""

    target: Target
    launches: list[Any] = field(default_factory=list)


TILES = "ATTNSPEC_TILES"
"""Environment: a target, `cuda:90` say, whose tiles the interpreter takes, so that they are judged without a GPU."""
recording: Recording | None = None
interpreted_launches = 0
"""Kernels run in the interpreter so far: their time says nothing, which a benchmark must know."""


@contextmanager
def recorded(target: Target) -> Iterator[list[Any]]:
    """Collect the launches of the calls inside, planned for `target`, instead of running them."""
    global recording
    before, recording = recording, Recording(target)
    try:
        yield recording.launches
    finally:
        recording = before


def parsed(text: str) -> Target:
    """("cuda", 90) from cuda:90. Raises ValueError for anything else than a vendor and an architecture."""
    vendor, _, arch = text.partition(":")
    if vendor not in ("cuda", "hip") or not arch or (vendor == "cuda" and not arch.isdigit()):
        raise ValueError(f"expected a target such as cuda:90 or hip:gfx942, got {text!r}")
    return vendor, int(arch) if vendor == "cuda" else arch


def assumed() -> Target | None:
    """The target whose tiles the interpreter takes; None: tiles of its own.

    Raises:
        ValueError: the environment names something that is no target.
    """
    text = os.environ.get(TILES, "")
    try:
        return parsed(text) if text else None
    except ValueError as error:
        raise ValueError(f"{TILES}: {error}") from None


def interpreted() -> bool:
    """Whether the kernels were loaded for the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    from attnspec.impls.engines.softmax_forward import softmax_forward_kernel

    return isinstance(softmax_forward_kernel, InterpretedFunction)


def target_of(tensor: Tensor) -> Target | None:
    """("cuda", 90), ("hip", "gfx942"), ..., or None for the interpreter (but see `assumed`); while launches are
    recorded, their target.

    Raises Unsupported when the tensor's device and the way in which the kernels were loaded do not fit.
    """
    if recording is not None:
        return recording.target
    if interpreted():
        return assumed()
    if tensor.device.type != "cuda":
        raise Unsupported(
            f"kernels for an accelerator got tensors on {tensor.device}: set TRITON_INTERPRET=1 before importing "
            "Triton to run them on the CPU"
        )
    return current_target()


def current_target() -> Target | None:
    """The active device as Triton names it, or None for the interpreter (but see `assumed`)."""
    if interpreted():
        return assumed()
    import triton

    target: Any = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; a fixed number under the interpreter or where launches are recorded."""
    if tensor.device.type == "cuda":
        return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)
    return 8 if recording is None and assumed() is None else 132
