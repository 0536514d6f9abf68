"""The memory of Titans, token by token: a small network that takes a step of gradient descent at each.

Behrouz, Zhong, Mirrokni 2025 (arXiv 2501.00663), equations 8-15: surprise is the gradient of the loss `|M(k) - v|^2`
by the weights, it gathers in a momentum, and the weights forget. The network is one matrix or two with an
activation in between; its gradient is backpropagation by hand. In chunks (section 3.2) every token's gradient is
taken at the weights before the chunk, momentum and weights still move token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def titans_memory(
    Q: Array, K: Array, V: Array, alpha: Array, eta: Array, theta: Array, W0: Array | None = None,
    S0: Array | None = None, W1: Array | None = None, W2: Array | None = None, *, read: str = "post", chunk: int = 1,
    loss: str = "sum", activation: str = "gelu",
) -> dict[str, Array]:  # fmt: skip
    """What the memory answers, and its weights after the last token.

    Args:
        Q, K: `[b,h,i,d]`; V: `[b,h,i,e]`. alpha, eta, theta: `[b,h,i]`, forgetting, momentum, step size.
        W0: `[b,h,e,d]`, a linear memory, S0: `[b,h,e,d]`, its momentum; or W1: `[b,h,r,d]` and W2: `[b,h,e,r]`. The
            axis b of W0, W1, W2 may have length 1.
        read: "post" or "pre", after or before a token's own update. chunk: tokens whose gradients are taken at the
            same weights. loss: "sum" or "mean" over e. activation: "gelu" or "silu".

    Returns:
        `Y` `[b,h,i,e]`; `W_last`, `S_last` `[b,h,e,d]`; `W1_last` `[b,h,r,d]`; `W2_last` `[b,h,e,r]`. Those of the
        other kind of memory are zeros, r being 0 for a linear one.
    """
    batch, heads, tokens, width = Q.shape
    features, hidden = V.shape[-1], 0 if W1 is None else W1.shape[-2]
    answers = np.zeros(V.shape)
    ends = {
        "W_last": np.zeros((batch, heads, features, width)),
        "S_last": np.zeros((batch, heads, features, width)),
        "W1_last": np.zeros((batch, heads, hidden, width)),
        "W2_last": np.zeros((batch, heads, features, hidden)),
    }
    per_feature = 1.0 / features if loss == "mean" else 1.0
    for b, h in np.ndindex(batch, heads):
        if W0 is not None:
            weights = [_entry(W0, b, h)]
            momentum = [np.zeros_like(weights[0]) if S0 is None else _entry(S0, b, h)]
        else:
            assert W1 is not None and W2 is not None
            weights = [_entry(W1, b, h), _entry(W2, b, h)]
            momentum = [np.zeros_like(weight) for weight in weights]
        for i in range(tokens):
            if i % chunk == 0:
                anchor = weights
            if read == "pre":
                answers[b, h, i] = _answer(weights, Q[b, h, i], activation)
            surprise = _surprise(anchor, K[b, h, i], V[b, h, i], activation)
            momentum = [
                eta[b, h, i] * old - theta[b, h, i] * per_feature * new
                for old, new in zip(momentum, surprise, strict=True)
            ]
            weights = [(1.0 - alpha[b, h, i]) * weight + step for weight, step in zip(weights, momentum, strict=True)]
            if read == "post":
                answers[b, h, i] = _answer(weights, Q[b, h, i], activation)
        names = ["W_last"] if W0 is not None else ["W1_last", "W2_last"]
        for name, weight in zip(names, weights, strict=True):
            ends[name][b, h] = weight
        if W0 is not None:
            ends["S_last"][b, h] = momentum[0]
    return {"Y": answers, **ends}


def _answer(weights: list[Array], x: Array, activation: str) -> Array:
    """The memory's forward pass."""
    for weight in weights[:-1]:
        x = _activation(activation)(weight @ x)[0]
    return np.asarray(weights[-1] @ x)


def _surprise(weights: list[Array], key: Array, value: Array, activation: str) -> list[Array]:
    """Gradient of the summed squares by each matrix: forward, keeping what each layer reads, then backward."""
    reads, slopes = [key], []
    for weight in weights[:-1]:
        x, slope = _activation(activation)(weight @ reads[-1])
        reads.append(x)
        slopes.append(slope)
    error = 2.0 * (weights[-1] @ reads[-1] - value)
    gradients = [np.outer(error, reads[-1])]
    for layer in range(len(weights) - 2, -1, -1):
        error = slopes[layer] * (weights[layer + 1].T @ error)
        gradients.append(np.outer(error, reads[layer]))
    return gradients[::-1]


def _activation(name: str) -> Callable[[Array], tuple[Array, Array]]:
    return {"gelu": _gelu, "silu": _silu}[name]


def _gelu(x: Array) -> tuple[Array, Array]:
    """x times the normal distribution function, and its slope."""
    below = np.array([0.5 * math.erfc(-float(value) / math.sqrt(2.0)) for value in x])
    density = np.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)
    return x * below, below + x * density


def _silu(x: Array) -> tuple[Array, Array]:
    gate = np.exp(-np.logaddexp(0.0, -x))
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def _entry(state: Array, b: int, h: int) -> Array:
    """A batch entry's own state, or the one that all share."""
    return np.array(state[b if len(state) > 1 else 0, h], dtype=np.float64)
