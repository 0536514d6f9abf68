"""Agent attention as its paper computes it: two softmax attentions, agents read the keys and queries read the agents.

Han et al. 2023 (arXiv 2312.08874), Section 3 (two attentions through the agents, depthwise convolution of the values);
pooled agents as in the authors' code, as a matrix over the queries. The order is that of linear cost: the agents'
values first. The backward pass goes back through the second attention into the agents and their values, then through
the first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def agent_attention(
    Q: Array, K: Array, V: Array, A: Array | None = None, pool: Array | None = None, B1: Array | None = None,
    B2: Array | None = None, mask: Array | None = None, dwc_w: Array | None = None, dwc_b: Array | None = None, *,
    width: int | None = None, class_token: bool = False, shortcut: float = 0.0, scale: float | None = None,
    query_scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. A: `[b,h,r,d]` agents, or pool: `[r,i]` over the queries.
        B1: `[h,r,j]`. B2: `[h,i,r]`. mask: `[b,j]`, True = agents may read the key.
        dwc_w: `[c,3,3]`, channel c = h * E + e. dwc_b: `[c]`. width: columns of the map of tokens.

    Returns:
        `O` `[b,h,i,e]`.
    """
    _check(Q, V, A, pool, dwc_w, dwc_b, shortcut)
    first, second = (Q.shape[-1] ** -0.5 if one is None else one for one in (scale, query_scale))
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h in np.ndindex(*Q.shape[:2]):
        agents = _agents(Q, A, pool, b, h)
        keys = _visible(K.shape[2], mask, b)
        reads = attend(first, agents, K[b, h, keys], None if B1 is None else B1[h][:, keys])
        out[b, h] = attend(second, Q[b, h], agents, None if B2 is None else B2[h]) @ (reads @ V[b, h, keys])
    if shortcut:
        out += shortcut * V
    if dwc_w is not None:
        spread = _Map(V.shape, width, class_token)
        out += spread.tokens(_convolved(spread.map(V), _kernel(dwc_w, V), dwc_b))
    return {"O": out}


def agent_attention_backward(
    dO: Array, *, Q: Array, K: Array, V: Array, A: Array | None = None, pool: Array | None = None,
    B1: Array | None = None, B2: Array | None = None, mask: Array | None = None, dwc_w: Array | None = None,
    dwc_b: Array | None = None, width: int | None = None, class_token: bool = False, shortcut: float = 0.0,
    scale: float | None = None, query_scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O)` by input name; the pooling matrix is a constant."""
    _check(Q, V, A, pool, dwc_w, dwc_b, shortcut)
    first, second = (Q.shape[-1] ** -0.5 if one is None else one for one in (scale, query_scale))
    given = {"Q": Q, "K": K, "V": V, "A": A, "B1": B1, "B2": B2, "dwc_w": dwc_w, "dwc_b": dwc_b}
    found = {name: np.zeros(array.shape) for name, array in given.items() if array is not None}
    for b, h in np.ndindex(*Q.shape[:2]):
        agents, g = _agents(Q, A, pool, b, h), dO[b, h]
        keys = _visible(K.shape[2], mask, b)
        reads = attend(first, agents, K[b, h, keys], None if B1 is None else B1[h][:, keys])
        asks = attend(second, Q[b, h], agents, None if B2 is None else B2[h])
        values = reads @ V[b, h, keys]
        dvalues = asks.T @ g
        dsecond = _softmax_back(asks, g @ values.T)
        dfirst = _softmax_back(reads, dvalues @ V[b, h, keys].T)
        dagents = second * dsecond.T @ Q[b, h] + first * dfirst @ K[b, h, keys]
        found["Q"][b, h] = second * dsecond @ agents
        found["K"][b, h, keys] = first * dfirst.T @ agents
        found["V"][b, h, keys] = reads.T @ dvalues
        if pool is not None:
            found["Q"][b, h] += pool.T @ dagents
        if B1 is not None:
            found["B1"][h][:, keys] += dfirst
        if B2 is not None:
            found["B2"][h] += dsecond
        if A is not None:
            found["A"][b, h] = dagents
    if shortcut:
        found["V"] += shortcut * dO
    if dwc_w is not None:
        spread = _Map(V.shape, width, class_token)
        onto, over = spread.map(dO), spread.map(V)
        # The transpose of a correlation is the correlation with the turned kernel.
        found["V"] += spread.tokens(_convolved(onto, _kernel(dwc_w, V)[..., ::-1, ::-1], None))
        for y, x in np.ndindex(3, 3):
            found["dwc_w"][:, y, x] = (onto * _shifted(over, y, x)).sum((0, 2, 3)).reshape(-1)
        if dwc_b is not None:
            found["dwc_b"][:] = onto.sum((0, 2, 3)).reshape(-1)
    return found


def attend(scale: float, q: Array, k: Array, bias: Array | None) -> Array:
    """Softmax weights `[queries,keys]`."""
    logits = scale * q @ k.T
    if bias is not None:
        logits = logits + bias
    raised = np.exp(logits - logits.max(1, initial=-np.inf, keepdims=True))
    weights: Array = raised / raised.sum(1, keepdims=True)
    return weights


def _visible(keys: int, mask: Array | None, b: int) -> Array:
    """The keys that the agents read: the others are left out, so that what they hold does not matter."""
    return np.arange(keys) if mask is None else np.flatnonzero(mask[b])


def _softmax_back(weights: Array, gradient: Array) -> Array:
    found: Array = weights * (gradient - (weights * gradient).sum(1, keepdims=True))
    return found


def _agents(Q: Array, A: Array | None, pool: Array | None, b: int, h: int) -> Array:
    if A is not None:
        return np.asarray(A[b, h])
    assert pool is not None
    return np.asarray(pool @ Q[b, h])


def _check(
    Q: Array, V: Array, A: Array | None, pool: Array | None, dwc_w: Array | None, dwc_b: Array | None, shortcut: float
) -> None:
    if (A is None) == (pool is None):
        raise ValueError("give the agents A, or pool")
    if dwc_b is not None and dwc_w is None:
        raise ValueError("dwc_b goes with dwc_w")
    if (dwc_w is not None or shortcut) and Q.shape[2] != V.shape[2]:
        raise ValueError(f"convolution and shortcut need as many queries as keys, got {Q.shape[2]} and {V.shape[2]}")


class _Map:
    """How tokens `[b,h,j,e]` lie on a map `[b,h,y,x,e]`, row after row; a class token is not on it."""

    def __init__(self, shape: tuple[int, ...], width: int | None, class_token: bool) -> None:
        self.count = shape[2]
        self.first = min(1, self.count) if class_token else 0
        self.width = max(math.isqrt(self.count), 1) if width is None else width
        self.height = -(-(self.count - self.first) // self.width)

    def map(self, array: Array) -> Array:
        on = array[:, :, self.first :]
        lacking = self.height * self.width - on.shape[2]
        full = np.concatenate([on, np.zeros((*on.shape[:2], lacking, on.shape[3]))], axis=2)
        return full.reshape(*on.shape[:2], self.height, self.width, on.shape[3])

    def tokens(self, laid: Array) -> Array:
        flat = laid.reshape(*laid.shape[:2], self.height * self.width, laid.shape[-1])
        out = np.zeros((*laid.shape[:2], self.count, laid.shape[-1]))
        out[:, :, self.first :] = flat[:, :, : self.count - self.first]
        return out


def _kernel(dwc_w: Array, V: Array) -> Array:
    return dwc_w.reshape(V.shape[1], V.shape[3], 3, 3)


def _shifted(laid: Array, y: int, x: int) -> Array:
    """The map as tap (y, x) of the kernel reads it, zeros outside."""
    padded = np.pad(laid, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    return padded[:, :, y : y + laid.shape[2], x : x + laid.shape[3]]


def _convolved(laid: Array, kernel: Array, bias: Array | None) -> Array:
    out = np.zeros(laid.shape)
    for y, x in np.ndindex(3, 3):
        out += _shifted(laid, y, x) * kernel[None, :, None, None, :, y, x]
    if bias is not None:
        out += bias.reshape(1, kernel.shape[0], 1, 1, kernel.shape[1])
    return out
