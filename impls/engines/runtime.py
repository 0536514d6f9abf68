"""Where kernels run: on the device of their tensors, or in Triton's interpreter on the CPU.

Import this module before Triton: Triton decides at import whether it interprets. Without an accelerator the
interpreter is the only way to run, so that it is switched on here unless TRITON_INTERPRET is set already; nothing
changes on a machine that has one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.types import Unsupported

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def interpreted() -> bool:
    """Whether the kernels were loaded for the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    from attnspec.impls.engines.softmax_forward import softmax_forward_kernel

    return isinstance(softmax_forward_kernel, InterpretedFunction)


def target_of(tensor: Tensor) -> tuple[str, int | str] | None:
    """("cuda", 90), ("hip", "gfx942"), ..., or None for the interpreter.

    Raises Unsupported when the tensor's device and the way in which the kernels were loaded do not fit.
    """
    if interpreted():
        return None
    if tensor.device.type != "cuda":
        raise Unsupported(
            f"kernels for an accelerator got tensors on {tensor.device}: set TRITON_INTERPRET=1 before importing "
            "Triton to run them on the CPU"
        )
    return current_target()


def current_target() -> tuple[str, int | str] | None:
    """The active device as Triton names it, or None for the interpreter."""
    if interpreted():
        return None
    import triton

    target: Any = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; a fixed small number under the interpreter, so that results repeat."""
    if tensor.device.type == "cuda":
        return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)
    return 8
