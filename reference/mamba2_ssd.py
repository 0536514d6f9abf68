"""Mamba-2's state space duality as its paper computes it: block by block, a masked product inside, a state across.

Dao and Gu 2024 (arXiv 2405.21060), section 6 (block decomposition) and listing 1: diagonal blocks, the states at the
ends of chunks, the recurrence over chunks, and what the states add to the outputs. Steps come from
`clip(softplus(dt + dt_bias))`; the skip and the gate follow the scan. In the backward pass the gradient of a state is
carried from the last chunk to the first; the steps' decays get theirs on the cumulative sums.

Packed sequences are taken apart and run one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def mamba2_ssd(
    C: Array, B: Array, x: Array, dt: Array, A: Array, dt_bias: Array | None = None, Dskip: Array | None = None,
    z: Array | None = None, H0: Array | None = None, segment: Array | None = None, *, dt_softplus: bool = True,
    dt_min: float = 0.0, dt_max: float | None = None, chunk: int = 256,
) -> dict[str, Array]:  # fmt: skip
    """Outputs and the state after the last token.

    Args:
        C, B: `[b,g,i,n]`, heads h share those of a group g in blocks. x: `[b,h,i,p]`. dt: `[b,h,i]`. A: `[h]`.
        dt_bias: `[h]`. Dskip: `[h,p]` or `[h,1]`. z: `[b,h,i,p]`. H0: `[b,h,p,n]`, state at the start.
        segment: `[b,i]`, the state starts from zero where the number changes.
        dt_softplus: whether steps pass a softplus. dt_min, dt_max: limits of the steps. chunk: tokens per chunk.

    Returns:
        `y` `[b,h,i,p]` and `H_last` `[b,h,p,n]`.
    """
    step, _ = _steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    y, last = np.zeros(x.shape), np.zeros((*x.shape[:2], x.shape[-1], B.shape[-1]))
    for run in _runs(C, B, x, step, A, H0, segment, chunk):
        y[run.own], last[run.own[:2]] = run.forward()
    if Dskip is not None:
        y = y + Dskip[:, None, :] * x
    return {"y": y if z is None else y * z * _sigmoid(z), "H_last": last}


def mamba2_ssd_backward(
    dy: Array, dH_last: Array | None = None, *, C: Array, B: Array, x: Array, dt: Array, A: Array,
    dt_bias: Array | None = None, Dskip: Array | None = None, z: Array | None = None, H0: Array | None = None,
    segment: Array | None = None, dt_softplus: bool = True, dt_min: float = 0.0, dt_max: float | None = None,
    chunk: int = 256,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dy * y) + sum(dH_last * H_last)` by input name; a step at a limit has none."""
    step, slope = _steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    found: dict[str, Array] = {}
    if z is not None:
        gate = _sigmoid(z)
        plain = mamba2_ssd(
            C, B, x, dt, A, dt_bias, Dskip, None, H0, segment, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
            chunk=chunk,
        )["y"]  # fmt: skip
        found["z"] = dy * plain * gate * (1.0 + z * (1.0 - gate))
        dy = dy * z * gate
    dC, dB, dx, dstep, dA = (np.zeros(value.shape) for value in (C, B, x, dt, A))
    start = np.zeros((*x.shape[:2], x.shape[-1], B.shape[-1]))
    for run in _runs(C, B, x, step, A, H0, segment, chunk):
        final = np.zeros(start.shape[2:]) if dH_last is None or not run.final else np.asarray(dH_last[run.own[:2]])
        of_c, of_b, of_input, of_decay, start[run.own[:2]] = run.backward(np.asarray(dy[run.own]), final)
        dC[run.shared] += of_c
        dB[run.shared] += of_b
        dx[run.own] = step[run.own][:, None] * of_input
        dstep[run.own] = np.sum(of_input * x[run.own], axis=-1) + A[run.own[1]] * of_decay
        dA[run.own[1]] += np.sum(step[run.own] * of_decay)
    if Dskip is not None:
        dx += Dskip[:, None, :] * dy
        of_skip = np.sum(dy * x, axis=(0, 2))
        found["Dskip"] = of_skip if Dskip.shape == of_skip.shape else np.sum(of_skip, axis=-1, keepdims=True)
    found |= {"C": dC, "B": dB, "x": dx, "dt": dstep * slope, "A": dA}
    if dt_bias is not None:
        found["dt_bias"] = np.sum(dstep * slope, axis=(0, 2))
    return found if H0 is None else found | {"H0": start}


class _Run:
    """One sequence of one head: C, B `[n,ns]`, input times step `[n,p]`, logarithms of decays `[n]`, first state."""

    def __init__(
        self, own: tuple[int, int, slice], shared: tuple[int, int, slice], final: bool, c: Array, b: Array,
        written: Array, a: Array, start: Array, chunk: int,
    ) -> None:  # fmt: skip
        self.own, self.shared, self.final = own, shared, final
        self.c, self.b, self.written, self.a, self.start = c, b, written, a, start
        self.chunks = [slice(first, min(first + chunk, len(a))) for first in range(0, len(a), chunk)]

    def states(self) -> list[Array]:
        """The state before each chunk, and the last one: chunk states first, then the recurrence over chunks."""
        states = [np.array(self.start)]
        for rows in self.chunks:
            mask = _semiseparable(self.a[rows])
            own = (mask[-1][:, None] * self.written[rows]).T @ self.b[rows]
            states.append(np.exp(np.sum(self.a[rows])) * states[-1] + own)
        return states

    def forward(self) -> tuple[Array, Array]:
        y, states = np.zeros(self.written.shape), self.states()
        for rows, state in zip(self.chunks, states[:-1], strict=True):
            c, b = self.c[rows], self.b[rows]
            y[rows] = (_semiseparable(self.a[rows]) * (c @ b.T)) @ self.written[rows]
            y[rows] += np.exp(np.cumsum(self.a[rows]))[:, None] * (c @ state.T)
        return y, states[-1]

    def backward(self, dy: Array, dlast: Array) -> tuple[Array, ...]:
        """Gradients of C, B, input times step, logarithms of the decays, and the first state."""
        dc, db, dwritten, da = (np.zeros(value.shape) for value in (self.c, self.b, self.written, self.a))
        states, behind = self.states(), np.array(dlast)
        for rows, state in zip(reversed(self.chunks), reversed(states[:-1]), strict=True):
            c, b, written, out = self.c[rows], self.b[rows], self.written[rows], dy[rows]
            mask = _semiseparable(self.a[rows])
            onto, onward = np.exp(np.cumsum(self.a[rows]))[:, None], mask[-1][:, None]
            pairs, scores = mask * (out @ written.T), mask * (c @ b.T)
            read, carried = onto * (out @ state), onward * (written @ behind)
            dc[rows] = pairs @ b + read
            db[rows] = pairs.T @ c + carried
            dwritten[rows] = scores.T @ out + onward * (b @ behind.T)
            # The mask's entry (i, j) falls with every decay of j+1 .. i.
            between = scores * (out @ written.T)
            dtotal = between.sum(axis=1) - between.sum(axis=0) + np.sum(c * read - b * carried, axis=1)
            dtotal[-1] += np.sum(b * carried) + onto[-1, 0] * np.sum(state * behind)
            da[rows] = np.cumsum(dtotal[::-1])[::-1]
            behind = onto[-1] * behind + (onto * out).T @ c
        return dc, db, dwritten, da, behind


def _semiseparable(a: Array) -> Array:
    """`exp(a[j+1] + ... + a[i])` on and below the diagonal, 0 above: summed after masking, as in listing 1."""
    length = len(a)
    repeated = np.where(np.tri(length, k=-1, dtype=bool), a[:, None], 0.0)
    return np.asarray(np.where(np.tri(length, dtype=bool), np.exp(np.cumsum(repeated, axis=0)), 0.0))


def _steps(
    dt: Array, bias: Array | None, softplus: bool, low: float, high: float | None
) -> tuple[Array, Array]:  # fmt: skip
    """Steps, and their slopes by dt."""
    raw = dt if bias is None else dt + bias[:, None]
    step, slope = (np.logaddexp(0.0, raw), _sigmoid(raw)) if softplus else (raw, np.ones(raw.shape))
    slope = np.where(step < low, 0.0, slope)
    step = np.maximum(step, low)
    if high is None:
        return step, slope
    return np.minimum(step, high), np.where(step > high, 0.0, slope)


def _sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))


def _runs(
    C: Array, B: Array, x: Array, step: Array, A: Array, H0: Array | None, segment: Array | None, chunk: int
) -> Iterator[_Run]:
    batch, heads, tokens, width = x.shape
    group = heads // B.shape[1]
    for b in range(batch):
        cuts = [0]
        if segment is not None:
            cuts += [t for t in range(1, tokens) if segment[b, t] != segment[b, t - 1]]
        for h in range(heads):
            for first, end in zip(cuts, [*cuts[1:], tokens], strict=True):
                own, shared = (b, h, slice(first, end)), (b, h // group, slice(first, end))
                start = np.zeros((width, B.shape[-1])) if H0 is None else np.asarray(H0[b, h])
                written, a = step[own][:, None] * x[own], step[own] * A[h]
                yield _Run(own, shared, end == tokens, C[shared], B[shared], written, a, start, chunk)
