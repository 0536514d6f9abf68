"""The linear memory of Titans on Triton: gradient steps with momentum and forgetting, over `engines.memory_chunks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.memory_launch import TILES, forward

MOST_FEATURES = 256
TWO_LAYERS = "no kernel for a memory of two layers"


@candidate(
    mechanism="titans_memory", outputs=("Y", "W_last", "S_last"), output_dtypes={"W_last": "fp32", "S_last": "fp32"},
    differentiable=False, refuses={"W1": TWO_LAYERS, "W2": TWO_LAYERS},
)  # fmt: skip
def titans_memory(
    Q: Tensor, K: Tensor, V: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, W0: Tensor | None = None,
    S0: Tensor | None = None, W1: Tensor | None = None, W2: Tensor | None = None, *, read: str = "post",
    chunk: int = 1, loss: str = "sum", activation: str = "gelu", tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Titans' neural memory as one matrix (Behrouz et al., arXiv 2501.00663, equations 8-15, section 3.2).

    Args:
        Q, K: `[b,h,i,d]`. V: `[b,h,i,e]`. One dtype: fp16, bf16 or fp32.
        alpha, eta, theta: `[b,h,i]`, forgetting and momentum from 0 to 1, and step size; any floating dtype.
        W0: `[b,h,e,d]` or `[1,h,e,d]`, the memory before the first token. S0: `[b,h,e,d]`, its momentum, or None.
        W1, W2: of a memory of two layers: refused. activation: "gelu" or "silu", of such a memory; without effect.
        read: "post" or "pre", after or before a token's own update. chunk: tokens whose gradients are taken at the
            same memory; the result depends on it. loss: "sum" or "mean" of the squares.
        tile: tokens that a program takes together, one of TILES, or None for what suits the device; the result does
            not depend on it.

    Returns:
        Y `[b,h,i,e]` in the inputs' dtype, and memory and momentum after the last token `[b,h,e,d]` in float32.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256, two layers and gradients.
    """
    call = Arguments("titans_memory")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h i d")
    call.tensor("V", V, "b h i e")
    for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta)):
        call.tensor(name, gate, "b h i", real=True)
    if W1 is not None or W2 is not None:
        raise Unsupported(f"titans_memory: {TWO_LAYERS}")
    if W0 is None:
        raise ValueError("titans_memory: give the memory W0 before the first token")
    call.tensor("W0", W0, "c h e d", real=True)
    call.tensor("S0", S0, "b h e d", real=True, optional=True)
    call.at_most("d e", MOST_FEATURES)
    B, H, E, D = call.sizes("b h e d")
    if W0.shape[0] not in (1, B):
        raise call.wrong("W0", f"of length {B} or 1 along b", list(W0.shape))
    if read not in ("post", "pre"):
        raise call.wrong("read", "'post' or 'pre'", repr(read))
    if loss not in ("sum", "mean"):
        raise call.wrong("loss", "'sum' or 'mean'", repr(loss))
    if activation not in ("gelu", "silu"):
        raise call.wrong("activation", "'gelu' or 'silu'", repr(activation))
    if tile is not None and tile not in TILES:
        raise call.wrong("tile", f"one of {TILES}", repr(tile))
    chunk = call.count("chunk", chunk)
    call.no_gradients(Q, K, V, alpha, eta, theta, W0, S0)
    return forward(
        Q, K, V, alpha, eta, theta, W0.expand(B, H, E, D), S0, chunk=chunk, slope=2.0 / E if loss == "mean" else 2.0,
        post=read == "post", tile=tile,
    )  # fmt: skip


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call); `call` launches everything that is compiled.

    With 128 features and more these kernels run, but on CUDA a few addresses spill, which are read again after the last
    token: they are not listed.
    """
    for width in (32, 64):
        for chunk in (1, 64):

            def call(width: int = width, chunk: int = chunk) -> object:
                Q, K, V = (torch.zeros(2, 4, 512, width, dtype=dtype) for _ in range(3))
                gate = torch.zeros(2, 4, 512)
                return titans_memory(Q, K, V, gate, gate, gate, torch.zeros(1, 4, width, width), chunk=chunk)

            yield "titans_memory", f"D{width} chunk {chunk}", call
