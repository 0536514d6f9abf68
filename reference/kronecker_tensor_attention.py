"""Attention over pairs of keys as a streaming algorithm: one second key at a time, a running softmax over all pairs.

Alman and Song 2023 (arXiv 2310.04064), Section 1: D^-1 exp(Q (K1 (/) K2)^T) (V1 (/) V2) with the column-wise Kronecker
product (/). The rows of the products are made for one second key at a time and visited with a running maximum and sum,
so that no matrix over pairs exists.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def kronecker_tensor_attention(
    Q: Array, K1: Array, K2: Array, V1: Array, V2: Array, *, causal: bool = False, scale: float | None = None
) -> dict[str, Array]:
    """Outputs by name.

    Args:
        Q: `[b,h,i,d]`. K1: `[b,g,j,d]`. K2: `[b,g,l,d]`. V1: `[b,g,j,e]`. V2: `[b,g,l,e]`.
        causal: query i sees pairs with both indices at most i.
        scale: of the three-way products, 1 / D by default.

    Returns:
        `O` `[b,h,i,e]` and `LSE` `[b,h,i]`.
    """
    if Q.shape[1] % K1.shape[1]:
        raise ValueError(f"{Q.shape[1]} query heads cannot share {K1.shape[1]} key/value heads evenly")
    group = Q.shape[1] // K1.shape[1]
    factor = 1.0 / Q.shape[-1] if scale is None else scale
    out, log_sums = np.zeros((*Q.shape[:3], V1.shape[-1])), np.full(Q.shape[:3], -np.inf)
    for b, h, i in np.ndindex(*Q.shape[:3]):
        g = h // group
        firsts, seconds = (min(i + 1, n) if causal else n for n in (K1.shape[2], K2.shape[2]))
        if not firsts or not seconds:
            continue
        top, total, acc = -np.inf, 0.0, np.zeros(V1.shape[-1])
        for second in range(seconds):
            pair_keys = K1[b, g, :firsts] * K2[b, g, second]
            logits = factor * (pair_keys @ Q[b, h, i])
            new = max(top, float(logits.max()))
            shrink, raised = float(np.exp(top - new)), np.exp(logits - new)
            total = shrink * total + float(raised.sum())
            acc = shrink * acc + (raised @ V1[b, g, :firsts]) * V2[b, g, second]
            top = new
        out[b, h, i], log_sums[b, h, i] = acc / total, top + np.log(total)
    return {"O": out, "LSE": log_sums}
