"""tinygrad's `Tensor.scaled_dot_product_attention`, on its CPU backend, which compiles every kernel with clang.

tinygrad's tensors are none of the suite's array types, so arrays pass as NumPy and the backward pass is explicit: the
adapter asks `Tensor.gradient` on its own graph. The function has one mask slot and no scale. bfloat16 needs a clang
that knows `__bf16` on the CPU (16 or later); with an older one it is refused.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.adapters._library import MECHANISM, library, one_of, versions
from attnspec.conformance.candidate import CandidateError, candidate
from attnspec.conformance.types import Unsupported

COMPILERS = ("clang", *(f"clang-{number}" for number in range(23, 14, -1)))


@functools.cache
def _compiler() -> tuple[str, bool]:
    """The clang that tinygrad is to use, and whether it has bfloat16: what CC says, else the first that has it.

    Raises:
        CandidateError: no clang.
    """
    stated = os.environ.get("CC")
    found = [name for name in ((stated,) if stated else COMPILERS) if shutil.which(name)]
    if not found:
        raise CandidateError("tinygrad's CPU backend needs clang, which is not installed: apt-get install clang")
    best = next((name for name in found if _has_bfloat16(name)), None)
    return best or found[0], best is not None


def _has_bfloat16(compiler: str) -> bool:
    source = "__bf16 same(__bf16 x) { return x; }"
    command = [compiler, "-x", "c", "-fsyntax-only", "-"]
    return subprocess.run(command, input=source.encode(), capture_output=True, check=False).returncode == 0


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tinygrad = library("tinygrad", "adapters")
    compiler, has_bfloat16 = _compiler()
    os.environ["CC"] = compiler
    tensors = {}
    for name, array in arrays.items():
        if array is None:
            continue
        plain = np.ascontiguousarray(array)
        if plain.dtype.name != "bfloat16":
            tensors[name] = tinygrad.Tensor(plain, device="CPU")
            continue
        if not has_bfloat16:
            raise Unsupported(f"{compiler} has no __bf16 on this CPU; clang 16 and later do")
        bits = tinygrad.Tensor(plain.view(np.uint16), device="CPU")
        tensors[name] = bits.bitcast(tinygrad.dtypes.bfloat16)
    return tensors


def _arrays(tensors: list[Any], like: Any) -> list[Any]:
    """Compute tensors together, so that they share what they have in common, as arrays of `like`'s dtype."""
    tinygrad = library("tinygrad", "adapters")
    narrow = like.dtype.name == "bfloat16"
    plain = [tensor.bitcast(tinygrad.dtypes.uint16) if narrow else tensor for tensor in tensors]
    tinygrad.Tensor.realize(*plain)
    return [tensor.numpy().view(like.dtype) if narrow else tensor.numpy() for tensor in plain]


def _attend(tensors: Mapping[str, Any], causal: bool) -> Any:
    return tensors["Q"].scaled_dot_product_attention(
        tensors["K"],
        tensors["V"],
        attn_mask=tensors.get("mask", tensors.get("bias")),
        is_causal=causal,
        enable_gqa=tensors["Q"].shape[1] != tensors["K"].shape[1],
    )


def _backward(
    dO: Any, Q: Any, K: Any, V: Any, *, bias: Any = None, mask: Any = None, causal: bool = False
) -> dict[str, Any]:
    one_of("attn_mask", bias=bias, mask=mask, causal=causal)
    tensors = _tensors({"Q": Q, "K": K, "V": V, "bias": bias, "mask": mask})
    given = _tensors({"dO": dO})["dO"]
    names = [name for name in ("Q", "K", "V", "bias") if name in tensors]
    grads = _attend(tensors, causal).gradient(*(tensors[name] for name in names), gradient=given)
    return {f"d{name}": array for name, array in zip(names, _arrays(grads, Q), strict=True)}


@candidate(
    mechanism=MECHANISM,
    framework="numpy",
    dtypes=("fp32", "fp16", "bf16", "fp64"),
    devices=("cpu",),
    declares={"causal_alignment": "top_left", "empty_rows": "nan", "unseen_values": "multiplied"},
    backward=_backward,
    differentiable=("Q", "K", "V", "bias"),
    rounding="materialized",
    outputs=("O",),
    guard_outputs=False,
    short_name="tinygrad",
    version=versions("tinygrad"),
)
def tinygrad_attention(Q: Any, K: Any, V: Any, *, bias: Any = None, mask: Any = None, causal: bool = False) -> Any:
    """tinygrad's attention; a causal mask and another one exclude each other, as in PyTorch's documentation."""
    one_of("attn_mask", bias=bias, mask=mask, causal=causal)
    return _arrays([_attend(_tensors({"Q": Q, "K": K, "V": V, "bias": bias, "mask": mask}), causal)], Q)[0]
