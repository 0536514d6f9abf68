"""ProbSparse attention on Triton, forward: arguments; the kernels are in `engines.informer_rows`.

    O = informer_probsparse(Q, K, V, samp)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # first: it decides how Triton is imported
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.informer_launch import Problem, forward
from attnspec.impls.engines.softmax_configs import TileConfig

MOST_FEATURES = 256


@candidate(mechanism="informer_probsparse", outputs=("O",), differentiable=False)
def informer_probsparse(
    Q: Tensor, K: Tensor, V: Tensor, samp: Tensor, *, causal: bool = False, factor: int = 5, active: int | None = None,
    mean_over: str = "keys", mix: bool = False, scale: float | None = None, config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the queries with the most peaked sampled scores (Zhou et al., arXiv 2012.07436, Algorithm 1).

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. All of one dtype: fp16, bf16 or fp32.
        samp: `[i,s]` integers, the sampled keys of each query, shared by batch and heads; not checked to be keys.
        causal: an active query sees keys j <= i, and the others get the running sum of the values, not their mean.
        factor: factor * ceil(ln N) queries are active; active: so many are. Of equal ones the earlier.
        mean_over: the sum of a query's sampled scores is divided by the number of all "keys", or of the "sample".
        mix: the heads' rows, one after the other, are read position by position (a view of other strides).
        scale: of the dot products in the softmax, default d ** -0.5. config: a tile configuration of the attention.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256 and for gradients.
    """
    call = Arguments("informer_probsparse")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.at_most("d e", MOST_FEATURES)
    batch, H, N, M = call.sizes("b h i j")
    if M < 1:
        raise call.wrong("K", "of at least one key", M)
    if causal and N != M:
        raise call.wrong("K", f"of {N} keys, as many as queries (causal)", M)
    if not isinstance(samp, Tensor) or samp.is_floating_point() or samp.dtype == torch.bool or samp.ndim != 2:
        came = f"{samp.dtype} {list(samp.shape)}" if isinstance(samp, Tensor) else type(samp).__name__
        raise call.wrong("samp", "integers [i, s]", came)
    if samp.shape[0] != N or samp.shape[1] < 1 or samp.device != Q.device:
        raise call.wrong("samp", f"[{N}, at least 1] on {Q.device}", f"{list(samp.shape)} on {samp.device}")
    if mean_over not in ("keys", "sample"):
        raise call.wrong("mean_over", "'keys' or 'sample'", repr(mean_over))
    count = call.count("factor", factor) * math.ceil(math.log(max(N, 1)))
    if active is not None:
        count = call.count("active", active, 0)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (Q, K, V)):
        raise Unsupported("informer_probsparse: no backward kernel; call it under torch.no_grad()")
    divisor = M if mean_over == "keys" else int(samp.shape[1])
    weight = Q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Problem(Q, K, V, samp, bool(causal), min(N, count), divisor, weight, config)
    rows = forward(p, runtime.target_of(Q))
    return rows.view(batch, N, H, V.shape[-1]).transpose(1, 2) if mix else rows


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: both forms, 35 of 1024 queries active."""

    def call(features: int, causal: bool) -> Callable[[], object]:
        def run() -> object:
            Q, K, V = (torch.empty((1, 4, 1024, features), dtype=dtype) for _ in range(3))
            return informer_probsparse(Q, K, V, torch.zeros((1024, 35), dtype=torch.int64), causal=causal)

        return run

    yield "informer_probsparse", "bidirectional-64", call(64, False)
    yield "informer_probsparse", "causal-64", call(64, True)
    yield "informer_probsparse", "causal-128", call(128, True)
    yield "informer_probsparse", "causal-256", call(256, True)
