"""The gated delta rule as its paper trains it: chunk by chunk, in the extended WY form.

Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464), equation 10 (recurrence) and section 3.3 (chunks): inside a chunk the
values that are written solve a lower triangular system, so that no state is formed for a single token. The backward
pass is that of the chunks: it carries the state's gradient from the last chunk to the first, solves the transposed
system in each, and collects the gates' gradients on their cumulative sums.

Packed sequences are taken apart and run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def gated_delta_rule(
    Q: Array, K: Array, V: Array, beta: Array, g: Array, S0: Array | None = None, segment: Array | None = None, *,
    scale: float | None = None, normalize_qk: bool = False, chunk: int = 64,
) -> dict[str, Array]:  # fmt: skip
    """Outputs and the state after the last token.

    Args:
        Q, K: `[b,k,i,d]`; V: `[b,h,i,e]`: value heads h share queries and keys of a head k in blocks.
        beta: `[b,h,i]`, write strength. g: `[b,h,i]`, logarithm of the decay.
        S0: `[b,h,d,e]`, state at the start. segment: `[b,i]`, the state starts from zero where the number changes.
        scale: factor of the queries, `d ** -0.5` by default. normalize_qk: queries and keys are brought to length 1.
        chunk: tokens per chunk.

    Returns:
        `O` `[b,h,i,e]` and `S` `[b,h,d,e]`.
    """
    if normalize_qk:
        Q, K = Q / _length(Q), K / _length(K)
    out, last = np.zeros(V.shape), np.zeros((*V.shape[:2], K.shape[-1], V.shape[-1]))
    for run in _runs(Q, K, V, beta, g, S0, segment, scale, chunk):
        out[run.own], last[run.own[:2]] = run.forward()
    return {"O": out, "S": last}


def gated_delta_rule_backward(
    dO: Array, dS: Array | None = None, *, Q: Array, K: Array, V: Array, beta: Array, g: Array,
    S0: Array | None = None, segment: Array | None = None, scale: float | None = None, normalize_qk: bool = False,
    chunk: int = 64,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dS * S)` by input name."""
    q, k = (Q / _length(Q), K / _length(K)) if normalize_qk else (Q, K)
    dQ, dK, dV, dbeta, dg = (np.zeros(x.shape) for x in (Q, K, V, beta, g))
    start = np.zeros((*V.shape[:2], K.shape[-1], V.shape[-1]))
    for run in _runs(q, k, V, beta, g, S0, segment, scale, chunk):
        final = np.zeros(start.shape[2:]) if dS is None or not run.final else np.asarray(dS[run.own[:2]])
        found = run.backward(np.asarray(dO[run.own]), final)
        dQ[run.shared] += found[0]
        dK[run.shared] += found[1]
        dV[run.own], dbeta[run.own], dg[run.own], start[run.own[:2]] = found[2:]
    if normalize_qk:
        dQ, dK = _through_length(dQ, Q), _through_length(dK, K)
    gradients = {"Q": dQ, "K": dK, "V": dV, "beta": dbeta, "g": dg}
    return gradients if S0 is None else gradients | {"S0": start}


class _Run:
    """One sequence of one value head: scaled queries and keys `[n,d]`, values `[n,e]`, gates `[n]`, the first state."""

    def __init__(
        self, own: tuple[int, int, slice], shared: tuple[int, int, slice], final: bool, q: Array, k: Array, v: Array,
        beta: Array, g: Array, start: Array, scale: float, chunk: int,
    ) -> None:  # fmt: skip
        self.own, self.shared, self.final = own, shared, final
        self.q, self.k, self.v, self.beta, self.g, self.start, self.scale = scale * q, k, v, beta, g, start, scale
        self.chunks = [slice(first, min(first + chunk, len(k))) for first in range(0, len(k), chunk)]

    def forward(self) -> tuple[Array, Array]:
        """Outputs and the last state; U and W of the paper: what is written, less what the state predicts."""
        out, state = np.zeros(self.v.shape), np.array(self.start)
        for rows in self.chunks:
            q, k, beta = self.q[rows], self.k[rows], self.beta[rows][:, None]
            inside, onto, onward = _decays(self.g[rows])
            system = np.eye(len(k)) + np.tril(beta * (k @ k.T) * inside, -1)
            U = np.linalg.solve(system, beta * self.v[rows])
            W = np.linalg.solve(system, beta * onto * k)
            written = U - W @ state
            out[rows] = (onto * q) @ state + (np.tril(q @ k.T) * inside) @ written
            state = onto[-1] * state + (onward * k).T @ written
        return out, state

    def backward(self, dout: Array, dlast: Array) -> tuple[Array, ...]:
        """Gradients of queries, keys, values, both gates and the first state."""
        states, state = [], np.array(self.start)
        for rows in self.chunks:
            states.append(state)
            inside, onto, onward = _decays(self.g[rows])
            written = self.written(rows, state)[2]
            state = onto[-1] * state + (onward * self.k[rows]).T @ written
        dq, dk, dv, dbeta, dg = (np.zeros(x.shape) for x in (self.q, self.k, self.v, self.beta, self.g))
        behind = np.array(dlast)
        for rows, state in zip(reversed(self.chunks), reversed(states), strict=True):
            q, k, beta, do = self.q[rows], self.k[rows], self.beta[rows][:, None], dout[rows]
            inside, onto, onward = _decays(self.g[rows])
            coupling, missing, written = self.written(rows, state)
            scores, pairs = (q @ k.T) * inside, (do @ written.T) * inside
            # written = (1 + coupling)^-1 (beta missing), missing = v - decayed prediction of the state.
            dwritten = scores.T @ do + onward * (k @ behind)
            dright = np.linalg.solve((np.eye(len(k)) + coupling).T, dwritten)
            dcoupling = np.tril(-dright @ written.T, -1)
            dproducts = beta * dcoupling * inside
            predicted = beta * onto * (dright @ state.T)
            carried = onward * (written @ behind.T)
            read = onto * (do @ state.T)
            dq[rows] = pairs @ k + read
            dk[rows] = pairs.T @ q + (dproducts + dproducts.T) @ k - predicted + carried
            dv[rows] = beta * dright
            dbeta[rows] = np.sum(dright * missing, axis=1) + np.sum(dcoupling * (k @ k.T) * inside, axis=1)
            # On the cumulative gate: what a token reads grows with its own, shrinks with that of the token read.
            between = (q @ k.T) * pairs + dcoupling * coupling
            dtotal = between.sum(axis=1) - between.sum(axis=0)
            dtotal += np.sum(q * read - k * predicted - k * carried, axis=1)
            dtotal[-1] += np.sum(k * carried) + np.sum(onto[-1] * state * behind)
            dg[rows] = np.cumsum(dtotal[::-1])[::-1]
            behind = onto[-1] * behind + (onto * q).T @ do - (beta * onto * k).T @ dright
        return self.scale * dq, dk, dv, dbeta, dg, behind

    def written(self, rows: slice, state: Array) -> tuple[Array, Array, Array]:
        """Strictly lower triangular coupling of a chunk's writes, values less prediction, and what is written."""
        k, beta = self.k[rows], self.beta[rows][:, None]
        inside, onto, _ = _decays(self.g[rows])
        coupling = np.tril(beta * (k @ k.T) * inside, -1)
        missing = self.v[rows] - onto * (k @ state)
        return coupling, missing, np.linalg.solve(np.eye(len(k)) + coupling, beta * missing)


def _decays(g: Array) -> tuple[Array, Array, Array]:
    """Decay between tokens of a chunk (0 towards the past) `[n,n]`, from its start `[n,1]`, to its end `[n,1]`."""
    between = np.cumsum(np.where(np.tri(len(g), k=-1, dtype=bool), g[:, None], 0.0), axis=0)
    inside = np.where(np.tri(len(g), dtype=bool), np.exp(between), 0.0)
    return inside, np.exp(np.cumsum(g))[:, None], inside[-1][:, None]


def _runs(
    Q: Array, K: Array, V: Array, beta: Array, g: Array, S0: Array | None, segment: Array | None,
    scale: float | None, chunk: int,
) -> Iterator[_Run]:  # fmt: skip
    batch, heads, tokens, _ = V.shape
    group, width = heads // K.shape[1], K.shape[-1]
    factor = 1.0 / math.sqrt(width) if scale is None else scale
    for b in range(batch):
        cuts = [0]
        if segment is not None:
            cuts += [t for t in range(1, tokens) if segment[b, t] != segment[b, t - 1]]
        for h in range(heads):
            for first, end in zip(cuts, [*cuts[1:], tokens], strict=True):
                own, shared = (b, h, slice(first, end)), (b, h // group, slice(first, end))
                start = np.zeros((width, V.shape[-1])) if S0 is None else np.asarray(S0[b, h])
                yield _Run(
                    own, shared, end == tokens, Q[shared], K[shared], V[own], beta[own], g[own], start, factor, chunk
                )  # fmt: skip


def _length(x: Array) -> Array:
    return np.asarray(np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6))


def _through_length(gradient: Array, x: Array) -> Array:
    """Gradient of x from the gradient of x / length(x)."""
    length = _length(x)
    along = np.sum(gradient * x, axis=-1, keepdims=True)
    return np.asarray(gradient / length - x * along / length**3)
