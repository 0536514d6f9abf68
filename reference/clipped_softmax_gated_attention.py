"""Clipped softmax and gated attention in two passes over the keys: first each row's normaliser, then clip and values.

Bondarenko et al. 2023 (arXiv 2306.12929), Eq. 4 (clipped softmax), Eq. 5-6 (gated attention). The clip is not linear,
so no running rescaling is possible: the first pass finds maximum and sum over tiles of keys, the second clips. The
backward pass has the same two passes, the second one over the clipped weights' slopes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TILE = 3
"""Keys per step of both passes: small, so that short sequences take several steps."""


def clipped_softmax_gated_attention(
    Q: Array, K: Array, V: Array, mask: Array | None = None, X: Array | None = None, w: Array | None = None,
    bg: Array | None = None, *, zeta: float = 1.0, gamma: float = 0.0, gsf: float = 1.0, causal: bool = False,
    scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Outputs by name; a row without keys is zero.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. mask: `[b,i,j]`, True = may attend.
        X: `[b,i,f]`, f = h * D + d, the layer's input. w: `[h,d]`. bg: `[h]`.
        zeta, gamma: upper and lower end of the stretch. gsf: factor of the gate. scale: D ** -0.5 if None.

    Returns:
        `O` `[b,h,i,e]`, the clipped weights `C` `[b,h,i,j]`, and the gate `pi` `[b,h,i]`.
    """
    scale = Q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, queries, keys = *Q.shape[:3], K.shape[2]
    gate = _gate(Q.shape, X, w, bg)
    weights, out = np.zeros((batch, heads, queries, keys)), np.zeros((batch, heads, queries, V.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, queries):
        seen = _seen(mask, causal, b, i, queries, keys)
        largest, total = _normaliser(Q[b, h, i], K[b, h], seen, scale)
        for tile in _tiles(seen):
            p = np.exp(scale * (K[b, h, tile] @ Q[b, h, i]) - largest) / total
            c = np.minimum(np.maximum((zeta - gamma) * p + gamma, 0.0), 1.0)
            weights[b, h, i, tile] = c
            out[b, h, i] += gsf * gate[b, h, i] * (c @ V[b, h, tile])
    return {"O": out, "C": weights, "pi": gate}


def _seen(mask: Array | None, causal: bool, b: int, i: int, queries: int, keys: int) -> list[int]:
    """The keys that query i of batch entry b may attend to."""
    last = i + keys - queries if causal else keys - 1
    return [j for j in range(keys) if j <= last and (mask is None or mask[b, i, j])]


def _tiles(seen: list[int]) -> list[list[int]]:
    return [seen[start : start + TILE] for start in range(0, len(seen), TILE)]


def _normaliser(q: Array, k: Array, seen: list[int], scale: float) -> tuple[float, float]:
    """Maximum and sum of the row's exponentials, running."""
    largest, total = -np.inf, 0.0
    for tile in _tiles(seen):
        logits = scale * (k[tile] @ q)
        higher = max(largest, float(logits.max()))
        total = total * float(np.exp(largest - higher)) + float(np.exp(logits - higher).sum())
        largest = higher
    return largest, total


def _gate(shape: tuple[int, ...], X: Array | None, w: Array | None, bg: Array | None) -> Array:
    """The gate `[b,h,i]`: 1 without a bias, one number per head without a layer input, else linear in the slice."""
    batch, heads, queries, _ = shape
    gate = np.ones((batch, heads, queries))
    if bg is None:
        return gate
    for b, h, i in np.ndindex(gate.shape):
        inner = float(bg[h])
        if X is not None and w is not None:
            width = w.shape[1]
            inner += float(X[b, i, h * width : (h + 1) * width] @ w[h])
        gate[b, h, i] = 1.0 / (1.0 + np.exp(-inner))
    return gate


def clipped_softmax_gated_attention_backward(
    dO: Array, dC: Array | None = None, dpi: Array | None = None, *, Q: Array, K: Array, V: Array,
    mask: Array | None = None, X: Array | None = None, w: Array | None = None, bg: Array | None = None,
    zeta: float = 1.0, gamma: float = 0.0, gsf: float = 1.0, causal: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dC * C) + sum(dpi * pi)` by input name; a clipped weight passes none on."""
    scale = Q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, queries, keys = *Q.shape[:3], K.shape[2]
    gate = _gate(Q.shape, X, w, bg)
    dgate = np.zeros(gate.shape) if dpi is None else np.array(dpi)
    found = {"Q": np.zeros(Q.shape), "K": np.zeros(K.shape), "V": np.zeros(V.shape)}
    for b, h, i in np.ndindex(batch, heads, queries):
        seen, g = _seen(mask, causal, b, i, queries, keys), dO[b, h, i]
        if not seen:
            continue
        largest, total = _normaliser(Q[b, h, i], K[b, h], seen, scale)
        p = np.exp(scale * (K[b, h, seen] @ Q[b, h, i]) - largest) / total
        stretched = (zeta - gamma) * p + gamma
        c = np.minimum(np.maximum(stretched, 0.0), 1.0)
        dgate[b, h, i] += gsf * float(g @ (c @ V[b, h, seen]))
        slope = gsf * gate[b, h, i] * (V[b, h, seen] @ g)
        if dC is not None:
            slope = slope + dC[b, h, i, seen]
        pull = (zeta - gamma) * np.where((stretched > 0.0) & (stretched < 1.0), slope, 0.0)
        dlogits = scale * p * (pull - float(p @ pull))
        found["Q"][b, h, i] = dlogits @ K[b, h, seen]
        found["K"][b, h, seen] += np.outer(dlogits, Q[b, h, i])
        found["V"][b, h, seen] += gsf * gate[b, h, i] * np.outer(c, g)
    if bg is None:
        return found
    dinner = dgate * gate * (1.0 - gate)
    found["bg"] = dinner.sum((0, 2))
    if X is not None and w is not None:
        found |= {"X": np.zeros(X.shape), "w": np.zeros(w.shape)}
        width = w.shape[1]
        for b, h, i in np.ndindex(gate.shape):
            part = slice(h * width, (h + 1) * width)
            found["X"][b, i, part] += dinner[b, h, i] * w[h]
            found["w"][h] += dinner[b, h, i] * X[b, i, part]
    return found
