"""Clipped softmax and gated attention in two passes over the keys: first each row's normaliser, then clip and values.

Bondarenko et al. 2023 (arXiv 2306.12929), Section 4.1, Eq. 4 (clipped softmax), Section 4.2, Eq. 5-6 (gated attention),
with the gates of the authors' code. The clip is not linear, so a running rescaling of the output is not possible: the
first pass finds maximum and sum over tiles of keys, the second one clips. Keys that a row may not see are not read.
The backward pass goes row by row from the clipped weights that pass something on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TILE = 3
"""Keys per step of both passes: small, so that short sequences take several steps."""


def clipped_softmax_gated_attention(
    Q: Array, K: Array, V: Array, mask: Array | None = None, X: Array | None = None, bg: Array | None = None,
    w: Array | None = None, w1: Array | None = None, b1: Array | None = None, w2: Array | None = None,
    wa: Array | None = None, *, zeta: float = 1.0, gamma: float = 0.0, alpha: float | None = None,
    max_length: int | None = None, causal: bool = False, gate_mean: bool = False, gsf: float = 1.0,
    scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name; a query without keys yields zeros.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. mask: `[b,h,i,j]`, the first three may be 1, True = may attend.
        X: `[b,i,f]`, f = h * D + d, the layer's input. bg: `[h]`. w: `[h,d]`, or w1: `[h,z,d]`, b1: `[h,z]` and
        w2: `[h,z]`, or wa: `[h,f]`: the gate.
        zeta, gamma: ends of the stretch; gamma = -alpha / max_length where these are given.
        gate_mean: one gate for all tokens. gsf: factor of a gate that reads X. scale: D ** -0.5 if None.

    Returns:
        `O` `[b,h,i,e]`.
    """
    low = gamma if alpha is None or max_length is None else -alpha / max_length
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    gate = _Gate(Q.shape, X, bg, w, w1, b1, w2, wa, gate_mean, gsf).values
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h, i in np.ndindex(*Q.shape[:3]):
        seen = _seen(mask, causal, b, h, i, Q.shape[2], K.shape[2])
        largest, total = _normaliser(Q[b, h, i], K[b, h], seen, factor)
        for tile in _tiles(seen):
            p = np.exp(factor * (K[b, h, tile] @ Q[b, h, i]) - largest) / total
            clipped = np.minimum(np.maximum((zeta - low) * p + low, 0.0), 1.0)
            out[b, h, i] += gate[b, h, i] * (clipped @ V[b, h, tile])
    return {"O": out}


def clipped_softmax_gated_attention_backward(
    dO: Array, *, Q: Array, K: Array, V: Array, mask: Array | None = None, X: Array | None = None,
    bg: Array | None = None, w: Array | None = None, w1: Array | None = None, b1: Array | None = None,
    w2: Array | None = None, wa: Array | None = None, zeta: float = 1.0, gamma: float = 0.0,
    alpha: float | None = None, max_length: int | None = None, causal: bool = False, gate_mean: bool = False,
    gsf: float = 1.0, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O)` by input name; a clipped weight passes nothing on to its logit."""
    low = gamma if alpha is None or max_length is None else -alpha / max_length
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    gate = _Gate(Q.shape, X, bg, w, w1, b1, w2, wa, gate_mean, gsf)
    dgate = np.zeros(Q.shape[:3])
    found = {"Q": np.zeros(Q.shape), "K": np.zeros(K.shape), "V": np.zeros(V.shape)}
    for b, h, i in np.ndindex(*Q.shape[:3]):
        seen, g = _seen(mask, causal, b, h, i, Q.shape[2], K.shape[2]), dO[b, h, i]
        if not seen:
            continue
        largest, total = _normaliser(Q[b, h, i], K[b, h], seen, factor)
        p = np.exp(factor * (K[b, h, seen] @ Q[b, h, i]) - largest) / total
        stretched = (zeta - low) * p + low
        clipped = np.minimum(np.maximum(stretched, 0.0), 1.0)
        dgate[b, h, i] = g @ (clipped @ V[b, h, seen])
        slope = gate.values[b, h, i] * (V[b, h, seen] @ g)
        pull = (zeta - low) * np.where((stretched > 0.0) & (stretched < 1.0), slope, 0.0)
        dlogits = factor * p * (pull - float(p @ pull))
        found["Q"][b, h, i] = dlogits @ K[b, h, seen]
        found["K"][b, h, seen] += np.outer(dlogits, Q[b, h, i])
        found["V"][b, h, seen] += gate.values[b, h, i] * np.outer(clipped, g)
    return found | gate.back(dgate)


def _seen(mask: Array | None, causal: bool, b: int, h: int, i: int, queries: int, keys: int) -> list[int]:
    """The keys that query i may attend to."""
    last = i + keys - queries if causal else keys - 1
    if mask is not None:
        b, h, i = (at if size > 1 else 0 for at, size in zip((b, h, i), mask.shape[:3], strict=True))
    return [j for j in range(keys) if j <= last and (mask is None or mask[b, h, i, j])]


def _tiles(seen: list[int]) -> list[list[int]]:
    return [seen[start : start + TILE] for start in range(0, len(seen), TILE)]


def _normaliser(q: Array, k: Array, seen: list[int], scale: float) -> tuple[float, float]:
    """Maximum of the row's logits and sum of its exponentials, running."""
    largest, total = -np.inf, 0.0
    for tile in _tiles(seen):
        logits = scale * (k[tile] @ q)
        higher = max(largest, float(logits.max()))
        total = total * float(np.exp(largest - higher)) + float(np.exp(logits - higher).sum())
        largest = higher
    return largest, total


class _Gate:
    """The factor of every head's output `values` `[b,h,i]`, and the way back to what it was computed from."""

    def __init__(
        self, shape: tuple[int, ...], X: Array | None, bg: Array | None, w: Array | None, w1: Array | None,
        b1: Array | None, w2: Array | None, wa: Array | None, mean: bool, gsf: float,
    ) -> None:  # fmt: skip
        self.X, self.bg, self.w, self.w1, self.b1, self.w2, self.wa = X, bg, w, w1, b1, w2, wa
        self.width, self.mean, self.factor = shape[3], mean, 1.0 if X is None else gsf
        self.values = np.ones(shape[:3])
        if bg is None:
            return
        logits = np.zeros(shape[:3])
        for b, h, i in np.ndindex(*shape[:3]):
            logits[b, h, i] = bg[h] + self._read(b, h, i)
        if mean:
            logits = np.broadcast_to(logits.sum(2, keepdims=True) / max(shape[2], 1), shape[:3])
        self.open = 1.0 / (1.0 + np.exp(-logits))
        self.values = self.factor * self.open

    def _slice(self, h: int) -> slice:
        return slice(h * self.width, (h + 1) * self.width)

    def _read(self, b: int, h: int, i: int) -> float:
        """The part of a gate's logit that comes from the layer's input."""
        if self.X is None:
            return 0.0
        own = self.X[b, i, self._slice(h)]
        if self.w is not None:
            return float(self.w[h] @ own)
        if self.wa is not None:
            return float(self.wa[h] @ self.X[b, i])
        assert self.w1 is not None and self.b1 is not None and self.w2 is not None
        return float(self.w2[h] @ np.maximum(self.w1[h] @ own + self.b1[h], 0.0))

    def back(self, dvalues: Array) -> dict[str, Array]:
        """Gradients by input name."""
        if self.bg is None:
            return {}
        dlogits = self.factor * dvalues * self.open * (1.0 - self.open)
        if self.mean:
            dlogits = np.broadcast_to(dlogits.sum(2, keepdims=True) / max(dlogits.shape[2], 1), dlogits.shape)
        given = {"X": self.X, "w": self.w, "w1": self.w1, "b1": self.b1, "w2": self.w2, "wa": self.wa}
        found = {name: np.zeros(array.shape) for name, array in given.items() if array is not None}
        found["bg"] = dlogits.sum((0, 2))
        if self.X is None:
            return found
        for b, h, i in np.ndindex(*dlogits.shape):
            part, g = self._slice(h), dlogits[b, h, i]
            own = self.X[b, i, part]
            if self.w is not None:
                found["w"][h] += g * own
                found["X"][b, i, part] += g * self.w[h]
            elif self.wa is not None:
                found["wa"][h] += g * self.X[b, i]
                found["X"][b, i] += g * self.wa[h]
            else:
                assert self.w1 is not None and self.b1 is not None and self.w2 is not None
                inner = self.w1[h] @ own + self.b1[h]
                dinner = np.where(inner > 0.0, g * self.w2[h], 0.0)
                found["w2"][h] += g * np.maximum(inner, 0.0)
                found["b1"][h] += dinner
                found["w1"][h] += np.outer(dinner, own)
                found["X"][b, i, part] += dinner @ self.w1[h]
        return found
