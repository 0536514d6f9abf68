"""Gated linear attention as its paper computes it: chunk by chunk, a gated product inside and a state across.

Yang et al. 2023 (arXiv 2312.06635), section 4: the chunkwise form. Inside a chunk a decay is the exponential of the sum
of the gates in between, never a quotient of exponentials, so that a token may wipe the state. In the backward pass dQ
is computed in a forward sweep that rebuilds the state, dK and dV in a sweep from the last chunk to the first, and the
gates' gradients from those alone, without the states in between.

Packed sequences are taken apart and run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def gla(
    Q: Array, K: Array, V: Array, a: Array, av: Array | None = None, S0: Array | None = None,
    segment: Array | None = None, *, scale: float | None = None, a_min: float | None = None, chunk: int = 64,
) -> dict[str, Array]:  # fmt: skip
    """Outputs and the state after the last token.

    Args:
        Q: `[b,h,i,d]`; K: `[b,g,i,d]`; V: `[b,g,i,e]`: query heads h share the state of a head g in blocks.
        a: `[b,g,i,d]` or `[b,g,i,1]`, logarithm of the decay of the key channels. av: `[b,g,i,e]`, of the values'.
        S0: `[b,g,d,e]`, state at the start. segment: `[b,i]`, the state starts from zero where the number changes.
        scale: factor of the queries, `d ** -0.5` by default. a_min: lower clamp of a. chunk: tokens per chunk.

    Returns:
        `O` `[b,h,i,e]` and `S` `[b,g,d,e]`.
    """
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    last = np.zeros((V.shape[0], V.shape[1], Q.shape[-1], V.shape[-1]))
    for run in _runs(Q, K, V, a, av, S0, segment, scale, a_min, chunk):
        out[run.at, run.heads, run.rows], last[run.at, run.head] = run.forward()
    return {"O": out, "S": last}


def gla_backward(
    dO: Array, dS: Array | None = None, *, Q: Array, K: Array, V: Array, a: Array, av: Array | None = None,
    S0: Array | None = None, segment: Array | None = None, scale: float | None = None, a_min: float | None = None,
    chunk: int = 64,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dS * S)` by input name; a clamped gate has none."""
    dQ, dK, dV, da = np.zeros(Q.shape), np.zeros(K.shape), np.zeros(V.shape), np.zeros(K.shape)
    dav, start = np.zeros(V.shape), np.zeros((V.shape[0], V.shape[1], Q.shape[-1], V.shape[-1]))
    for run in _runs(Q, K, V, a, av, S0, segment, scale, a_min, chunk):
        final = np.zeros_like(start[0, 0]) if dS is None or not run.final else np.asarray(dS[run.at, run.head])
        own, shared = (run.at, run.heads, run.rows), (run.at, run.head, run.rows)
        dQ[own], dK[shared], dV[shared], da[shared], dav[shared], start[run.at, run.head] = run.backward(
            np.asarray(dO[own]), final
        )
    if a.shape[-1] != K.shape[-1]:
        da = np.sum(da, axis=-1, keepdims=True)
    if a_min is not None:
        da = np.where(a < a_min, 0.0, da)
    found = {"Q": dQ, "K": dK, "V": dV, "a": da}
    if av is not None:
        found["av"] = dav
    return found if S0 is None else found | {"S0": start}


class _Run:
    """One sequence of one head: scaled queries `[s,n,d]`, keys, values, both gates, and the state at its start."""

    def __init__(
        self, at: int, head: int, heads: slice, rows: slice, final: bool, q: Array, k: Array, v: Array, a: Array,
        av: Array, start: Array, scale: float, chunk: int,
    ) -> None:  # fmt: skip
        self.at, self.head, self.heads, self.rows, self.final = at, head, heads, rows, final
        self.q, self.k, self.v, self.a, self.av, self.start, self.scale = scale * q, k, v, a, av, start, scale
        self.chunks = [slice(first, min(first + chunk, len(k))) for first in range(0, len(k), chunk)]

    def forward(self) -> tuple[Array, Array]:
        """Outputs `[s,n,e]` and the last state."""
        out, state = np.zeros((*self.q.shape[:2], self.v.shape[-1])), np.array(self.start)
        for rows in self.chunks:
            keys, values = _Decay(self.a[rows]), _Decay(self.av[rows])
            scores = np.einsum("sid,jd,ijd->sij", self.q[:, rows], self.k[rows], keys.inside)
            out[:, rows] = np.einsum("sij,je,ije->sie", scores, self.v[rows], values.inside)
            out[:, rows] += values.onto * ((keys.onto * self.q[:, rows]) @ state)
            state = self.onward(state, rows, keys, values)
        return out, state

    def onward(self, state: Array, rows: slice, keys: _Decay, values: _Decay) -> Array:
        """The state after a chunk."""
        written = (keys.onward * self.k[rows]).T @ (values.onward * self.v[rows])
        return np.asarray(np.outer(keys.whole, values.whole) * state + written)

    def backward(self, dout: Array, dlast: Array) -> tuple[Array, ...]:
        """Gradients of queries, keys, values, both gates and the first state."""
        dq, dk, dv = np.zeros(self.q.shape), np.zeros(self.k.shape), np.zeros(self.v.shape)
        state = np.array(self.start)
        for rows in self.chunks:
            keys, values = _Decay(self.a[rows]), _Decay(self.av[rows])
            pairs = np.einsum("sie,je,ije->sij", dout[:, rows], self.v[rows], values.inside)
            dq[:, rows] = np.einsum("sij,jd,ijd->sid", pairs, self.k[rows], keys.inside)
            dq[:, rows] += keys.onto * ((values.onto * dout[:, rows]) @ state.T)
            state = self.onward(state, rows, keys, values)
        behind = np.array(dlast)
        for rows in reversed(self.chunks):
            keys, values = _Decay(self.a[rows]), _Decay(self.av[rows])
            pairs = np.einsum("sie,je,ije->sij", dout[:, rows], self.v[rows], values.inside)
            scores = np.einsum("sid,jd,ijd->sij", self.q[:, rows], self.k[rows], keys.inside)
            dk[rows] = np.einsum("sij,sid,ijd->jd", pairs, self.q[:, rows], keys.inside)
            dk[rows] += keys.onward * ((values.onward * self.v[rows]) @ behind.T)
            dv[rows] = np.einsum("sij,sie,ije->je", scores, dout[:, rows], values.inside)
            dv[rows] += values.onward * ((keys.onward * self.k[rows]) @ behind)
            read = np.einsum("sid,sie->de", keys.onto * self.q[:, rows], values.onto * dout[:, rows])
            behind = np.outer(keys.whole, values.whole) * behind + read
        # A cumulative gate multiplies what its token reads and divides what its token writes; the last one also
        # multiplies the final state.
        through = state * dlast
        da = _summed_from_the_end(np.sum(self.q * dq, axis=0) - self.k * dk) + np.sum(through, axis=1)
        dav = _summed_from_the_end(np.sum(self.forward()[0] * dout, axis=0) - self.v * dv) + np.sum(through, axis=0)
        return self.scale * dq, dk, dv, da, dav, behind


class _Decay:
    """Decays of the channels in a chunk: start to token, token to token (0 towards the past), token to end, all."""

    def __init__(self, gate: Array) -> None:
        after = np.tri(len(gate), k=-1, dtype=bool)[..., None]
        between = np.cumsum(np.where(after, gate[:, None, :], 0.0), axis=0)
        self.onto = np.exp(np.cumsum(gate, axis=0))
        self.inside = np.where(np.tri(len(gate), dtype=bool)[..., None], np.exp(between), 0.0)
        self.onward = self.inside[-1]
        self.whole = self.onto[-1]


def _runs(
    Q: Array, K: Array, V: Array, a: Array, av: Array | None, S0: Array | None, segment: Array | None,
    scale: float | None, a_min: float | None, chunk: int,
) -> Iterator[_Run]:  # fmt: skip
    batch, heads, tokens, width = K.shape
    group = Q.shape[1] // heads
    factor = 1.0 / math.sqrt(width) if scale is None else scale
    clamped = a if a_min is None else np.maximum(a, a_min)
    for b in range(batch):
        cuts = [0]
        if segment is not None:
            cuts += [t for t in range(1, tokens) if segment[b, t] != segment[b, t - 1]]
        for g in range(heads):
            own = slice(g * group, (g + 1) * group)
            for first, end in zip(cuts, [*cuts[1:], tokens], strict=True):
                rows = slice(first, end)
                start = np.zeros((width, V.shape[-1])) if S0 is None else np.asarray(S0[b, g])
                gate = np.broadcast_to(clamped[b, g, rows], (end - first, width))
                value_gate = np.zeros((end - first, V.shape[-1])) if av is None else np.asarray(av[b, g, rows])
                yield _Run(
                    b, g, own, rows, end == tokens, Q[b, own, rows], K[b, g, rows], V[b, g, rows], gate, value_gate,
                    start, factor, chunk,
                )  # fmt: skip


def _summed_from_the_end(x: Array) -> Array:
    return np.asarray(np.cumsum(x[::-1], axis=0)[::-1])
