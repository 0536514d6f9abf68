"""ProbSparse attention as its paper computes it: sample scores, pick the active queries, fill in the rest.

Zhou et al. 2020 (arXiv 2012.07436), Algorithm 1: every query is measured on sampled keys (Eq. 4 on the sample), the
output starts as the mean (causal: the running sum) of the values, and the rows of the active queries are overwritten by
softmax attention. The sampled keys are an input. Running sum, divisor of the measure and the decoder's reading of the
output's memory are those of the authors' code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def informer_probsparse(
    Q: Array, K: Array, V: Array, samp: Array, *, causal: bool = False, factor: int = 5, active: int | None = None,
    mean_over: str = "keys", mix: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. samp: `[i,s]`, sampled keys of each query.
        factor: with N queries, `factor * ceil(ln N)` are active; `active` gives the number instead.
        mean_over: "keys" or "sample". mix: the heads' outputs, one after the other, are read token by token.

    Returns:
        `O` `[b,h,i,e]`.
    """
    batch, heads, queries, width = Q.shape
    if causal and queries != K.shape[2]:
        raise ValueError(f"the causal form is self-attention, got {queries} queries and {K.shape[2]} keys")
    divisor = {"keys": K.shape[2], "sample": samp.shape[1]}[mean_over]
    factor_of_logits = width**-0.5 if scale is None else scale
    if active is None:
        active = factor * math.ceil(math.log(queries)) if queries else 0
    out = np.zeros((batch, heads, queries, V.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        q, k, v = Q[b, h], K[b, h], V[b, h]
        out[b, h] = np.cumsum(v, axis=0) if causal else v.mean(axis=0)
        for i in active_queries(q, k, samp, min(active, queries), divisor):
            last = i + 1 if causal else len(k)
            logits = factor_of_logits * (k[:last] @ q[i])
            raised = np.exp(logits - logits.max())
            out[b, h, i] = raised @ v[:last] / raised.sum()
    if mix:
        out = out.reshape(batch, queries, heads, V.shape[-1]).transpose(0, 2, 1, 3)
    return {"O": out}


def active_queries(q: Array, k: Array, samp: Array, count: int, divisor: int) -> list[int]:
    """The `count` queries with the largest max minus mean of sampled scores; of equal ones the earlier."""
    measure = []
    for i in range(len(q)):
        scores = k[samp[i]] @ q[i]
        measure.append(float(scores.max() - scores.sum() / divisor))
    return sorted(range(len(q)), key=lambda i: (-measure[i], i))[:count]
