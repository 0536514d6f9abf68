"""Lightning attention as its paper computes it: block by block, a masked product inside and a state across.

Qin et al. 2024 (arXiv 2405.17381), Algorithm 1 (forward) and Algorithm 2 (backward). The state is carried from block
to block; in the backward pass dQ is computed in a forward sweep that rebuilds the state, dK and dV in a sweep from the
last block to the first. Decay factors are only ever powers of lambda with exponents of at least 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def lightning_attention(
    Q: Array, K: Array, V: Array, s: Array, kv0: Array | None = None, *, block: int = 64
) -> dict[str, Array]:
    """Outputs and the state after the last token.

    Args:
        Q, K: `[b,h,i,d]`. V: `[b,h,i,e]`. s: `[h]`, at least 0. kv0: `[b,h,d,e]`.
        block: tokens per block.

    Returns:
        `O` `[b,h,i,e]` and `kv` `[b,h,d,e]`.
    """
    batch, heads, tokens, _ = Q.shape
    out = np.zeros((batch, heads, tokens, V.shape[-1]))
    last = np.zeros((batch, heads, Q.shape[-1], V.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            lam = np.exp(-s[h])
            state = last[b, h] if kv0 is None else np.array(kv0[b, h])
            for first in range(0, tokens, block):
                rows = slice(first, min(first + block, tokens))
                q, k, v = Q[b, h, rows], K[b, h, rows], V[b, h, rows]
                decay, up_to, onward = _factors(lam, len(q))
                out[b, h, rows] = (decay * (q @ k.T)) @ v + up_to[:, None] * (q @ state)
                state = lam ** len(q) * state + (onward[:, None] * k).T @ v
            last[b, h] = state
    return {"O": out, "kv": last}


def lightning_attention_backward(
    dO: Array, dkv: Array | None = None, *, Q: Array, K: Array, V: Array, s: Array, kv0: Array | None = None,
    block: int = 64,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dkv * kv)` by input name; the decay rates are constants."""
    batch, heads, tokens, _ = Q.shape
    dQ, dK, dV = np.zeros_like(Q), np.zeros_like(K), np.zeros_like(V)
    dstart = np.zeros((batch, heads, Q.shape[-1], V.shape[-1]))
    blocks = [slice(first, min(first + block, tokens)) for first in range(0, tokens, block)]
    for b in range(batch):
        for h in range(heads):
            lam = np.exp(-s[h])
            state = dstart[b, h] if kv0 is None else np.array(kv0[b, h])
            for rows in blocks:
                k, v, g = K[b, h, rows], V[b, h, rows], dO[b, h, rows]
                decay, up_to, onward = _factors(lam, len(k))
                dQ[b, h, rows] = (decay * (g @ v.T)) @ k + up_to[:, None] * (g @ state.T)
                state = lam ** len(k) * state + (onward[:, None] * k).T @ v
            behind = np.zeros_like(dstart[b, h]) if dkv is None else np.array(dkv[b, h])
            for rows in reversed(blocks):
                q, k, v, g = Q[b, h, rows], K[b, h, rows], V[b, h, rows], dO[b, h, rows]
                decay, up_to, onward = _factors(lam, len(k))
                dK[b, h, rows] = (decay * (g @ v.T)).T @ q + onward[:, None] * (v @ behind.T)
                dV[b, h, rows] = (decay * (q @ k.T)).T @ g + onward[:, None] * (k @ behind)
                behind = lam ** len(k) * behind + (up_to[:, None] * q).T @ g
            dstart[b, h] = behind
    found = {"Q": dQ, "K": dK, "V": dV}
    return found if kv0 is None else found | {"kv0": dstart}


def _factors(lam: float, length: int) -> tuple[Array, Array, Array]:
    """Decay between two tokens of a block (0 towards the future), from the state to a token, from a token onward."""
    at = np.arange(length)
    apart = at[:, None] - at[None, :]
    inside = np.where(apart >= 0, lam ** np.maximum(apart, 0), 0.0)
    return inside, lam ** (at + 1), lam ** (length - 1 - at)
