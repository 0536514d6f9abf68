"""Bi-level routing attention on Triton, forward: arguments; the kernels are in `engines.biformer_regions`.

    O = biformer_bra(Q, K, V, lepe_w, lepe_b, n_win=7, topk=4)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # first: it decides how Triton is imported
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.biformer_launch import Problem, forward
from attnspec.impls.engines.softmax_configs import TileConfig

MOST_FEATURES = 256


@candidate(mechanism="biformer_bra", outputs=("O",), differentiable=False)
def biformer_bra(
    Q: Tensor, K: Tensor, V: Tensor, lepe_w: Tensor | None = None, lepe_b: Tensor | None = None, *, n_win: int = 7,
    topk: int = 4, soft_routing: bool = False, padding: str = "masked", scale: float | None = None,
    config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every region of a map to the regions that score best with it (Zhu et al., arXiv 2303.08810).

    Args:
        Q, K: `[b,h,y,x,d]`, V: `[b,h,y,x,e]` on the map. All of one dtype: fp16, bf16 or fp32.
        lepe_w: `[h * e,p,q]`, an odd depthwise kernel over the map of values, added to the output (Eq. 8); lepe_b:
            `[h * e]`, its bias.
        n_win: regions along a side. topk: regions that a region keeps (Eq. 4-5), of equal ones the lower number.
        soft_routing: keys and values of a kept region are multiplied by its share, a softmax over the kept ones.
        padding: cells that a cut region at the edge lacks are "masked", or "zeros" that take part in the softmax.
        scale: of the dot products, default (h * d) ** -0.5. config: a tile configuration of the attention kernel.

    Returns:
        O `[b,h,y,x,e]` in the inputs' dtype.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256 and for gradients.
    """
    call = Arguments("biformer_bra")
    call.tensor("Q", Q, "b h y x d")
    call.tensor("K", K, "b h y x d")
    call.tensor("V", V, "b h y x e")
    call.at_most("d e", MOST_FEATURES)
    H, Y, X, D, E = call.sizes("h y x d e")
    if Y < 1 or X < 1:
        raise call.wrong("Q", "a map of at least one cell", f"{Y} x {X} cells")
    call.tensor("lepe_w", lepe_w, "c p q", optional=True)
    call.tensor("lepe_b", lepe_b, "c", optional=True)
    if lepe_w is None and lepe_b is not None:
        raise ValueError("biformer_bra: lepe_b goes with lepe_w, got it alone")
    if lepe_w is not None:
        c, side, other = lepe_w.shape
        if c != H * E or side != other or side % 2 == 0:
            raise call.wrong("lepe_w", f"of shape [{H * E}, s, s] with s odd", list(lepe_w.shape))
    n_win, topk = call.count("n_win", n_win), call.count("topk", topk)
    if padding not in ("masked", "zeros"):
        raise call.wrong("padding", "'masked' or 'zeros'", repr(padding))
    given = (Q, K, V, lepe_w, lepe_b)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise Unsupported("biformer_bra: no backward kernel; call it under torch.no_grad()")
    factor = (H * D) ** -0.5 if scale is None else float(scale)
    high, wide = max(Y // n_win, 1), max(X // n_win, 1)
    zeros = padding == "zeros"
    p = Problem(Q, K, V, lepe_w, lepe_b, high, wide, topk, bool(soft_routing), zeros, factor, config)
    return forward(p, runtime.target_of(Q))


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: regions of 8 x 8 cells, with and without all that is optional."""

    def call(features: int, lepe: bool, soft: bool, padding: str) -> Callable[[], object]:
        def run() -> object:
            given = [torch.empty((1, 4, 56, 56, features), dtype=dtype) for _ in range(3)]
            extra = [torch.empty((4 * features, 5, 5), dtype=dtype), torch.empty(4 * features, dtype=dtype)]
            return biformer_bra(*given, *(extra if lepe else []), soft_routing=soft, padding=padding)

        return run

    yield "biformer_bra", "plain-64", call(64, False, False, "masked")
    yield "biformer_bra", "lepe-64", call(64, True, True, "zeros")
    yield "biformer_bra", "lepe-128", call(128, True, False, "masked")
    yield "biformer_bra", "lepe-256", call(256, True, True, "masked")
