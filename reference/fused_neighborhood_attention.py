"""Neighborhood attention as its paper computes it: grids taken apart by dilation, a box of keys for every query.

Hassani, Hwu and Shi 2024 (arXiv 2403.04690); even windows, causal axes and merging by the logarithms of the sums as in
the authors' library NATTEN, the stride from generalized neighborhood attention (arXiv 2504.16922). A dilated grid
is split into grids of equal residues, on which the neighbourhood is a plain box. The box is cut out of the key grid;
nothing is masked. Extra keys give a second partial result, which is merged by the logarithms of the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def fused_neighborhood_attention(
    Q: Array, K: Array, V: Array, Kx: Array | None = None, Vx: Array | None = None, *, rows: int = 1,
    window_y: int | None = None, window_x: int | None = None, dilation_y: int = 1, dilation_x: int = 1,
    stride_y: int = 1, stride_x: int = 1, causal_y: bool = False, causal_x: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Outputs by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,g,j,d]`. V: `[b,g,j,e]`, tokens of the grid row after row. Kx: `[b,g,m,d]`.
            Vx: `[b,g,m,e]`, seen by every query.
        rows: of the grid. window, dilation, stride, causal: of the column (y) and of the row (x).

    Returns:
        `O` `[b,h,i,e]` and `LSE` `[b,h,i]`.
    """
    axes = _axes(Q.shape[2], rows, (window_y, window_x), (dilation_y, dilation_x), (stride_y, stride_x),
                 (causal_y, causal_x))  # fmt: skip
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    group = _group(Q, K, Kx, Vx)
    out, log_sums = np.zeros((*Q.shape[:3], V.shape[-1])), np.zeros(Q.shape[:3])
    for i, box in _boxes(axes):
        for b, h in np.ndindex(*Q.shape[:2]):
            g, q = h // group, Q[b, h, i]
            found = _partial(factor, q, K[b, g, box], V[b, g, box])
            if Kx is not None and Vx is not None and Kx.shape[2]:
                found = _merge(*found, *_partial(factor, q, Kx[b, g], Vx[b, g]))
            out[b, h, i], log_sums[b, h, i] = found
    return {"O": out, "LSE": log_sums}


def fused_neighborhood_attention_backward(
    dO: Array, dLSE: Array | None = None, *, Q: Array, K: Array, V: Array, Kx: Array | None = None,
    Vx: Array | None = None, rows: int = 1, window_y: int | None = None, window_x: int | None = None,
    dilation_y: int = 1, dilation_x: int = 1, stride_y: int = 1, stride_x: int = 1, causal_y: bool = False,
    causal_x: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dLSE * LSE)` by input name; weights are recomputed from LSE."""
    done = fused_neighborhood_attention(
        Q, K, V, Kx, Vx, rows=rows, window_y=window_y, window_x=window_x, dilation_y=dilation_y, dilation_x=dilation_x,
        stride_y=stride_y, stride_x=stride_x, causal_y=causal_y, causal_x=causal_x, scale=scale,
    )  # fmt: skip
    axes = _axes(Q.shape[2], rows, (window_y, window_x), (dilation_y, dilation_x), (stride_y, stride_x),
                 (causal_y, causal_x))  # fmt: skip
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    group = _group(Q, K, Kx, Vx)
    given = {"Q": Q, "K": K, "V": V, "Kx": Kx, "Vx": Vx}
    found = {name: np.zeros(array.shape) for name, array in given.items() if array is not None}
    for i, box in _boxes(axes):
        for b, h in np.ndindex(*Q.shape[:2]):
            g, q, up = h // group, Q[b, h, i], dO[b, h, i]
            common = up @ done["O"][b, h, i] - (0.0 if dLSE is None else dLSE[b, h, i])
            sides: list[tuple[Array, Array, str, Any]] = [(K[b, g, box], V[b, g, box], "", box)]
            if Kx is not None and Vx is not None:
                sides.append((Kx[b, g], Vx[b, g], "x", slice(None)))
            for k, v, name, where in sides:
                weights = np.exp(factor * (k @ q) - done["LSE"][b, h, i])
                dlogits = factor * weights * (v @ up - common)
                found["Q"][b, h, i] += dlogits @ k
                found[f"K{name}"][b, g, where] += np.outer(dlogits, q)  # a box holds no key twice
                found[f"V{name}"][b, g, where] += np.outer(weights, up)
    return found


class _Axis:
    """One axis of the grid: its length and which of its positions a position sees."""

    def __init__(self, name: str, length: int, window: int | None, dilation: int, stride: int, causal: bool) -> None:
        self.length, self.dilation, self.stride, self.causal = length, dilation, stride, causal
        self.window = length // dilation if window is None else window
        if length and not 1 <= self.stride <= self.window <= length // dilation:
            raise ValueError(
                f"axis {name} of length {length}: expected 1 <= stride <= window <= length // dilation, "
                f"got stride {stride}, window {self.window}, dilation {dilation}"
            )

    def neighbours(self, at: int) -> list[int]:
        """Positions that position `at` sees, in order: a run in the grid of its residue."""
        residue = list(range(at % self.dilation, self.length, self.dilation))
        u, last = residue.index(at), len(residue) - 1
        group = u // self.stride * self.stride
        if self.causal:
            leader = min(group + self.stride - 1, last)
            return residue[max(leader - self.window + 1, 0) : u + 1]
        leader = min(group + self.stride // 2, last)
        start = leader - self.window // 2
        start = min(max(start, 0), len(residue) - self.window)  # a window beyond the border slides inward
        return residue[start : start + self.window]


def _axes(
    tokens: int, rows: int, window: tuple[int | None, int | None], dilation: tuple[int, int], stride: tuple[int, int],
    causal: tuple[bool, bool],
) -> tuple[_Axis, _Axis]:  # fmt: skip
    if tokens % rows:
        raise ValueError(f"{tokens} tokens do not fill {rows} rows")
    lengths = (rows if tokens else 0, tokens // rows)
    down, across = (_Axis("yx"[a], lengths[a], window[a], dilation[a], stride[a], causal[a]) for a in (0, 1))
    return down, across


def _boxes(axes: tuple[_Axis, _Axis]) -> Iterator[tuple[int, list[int]]]:
    """Every token with the tokens of its box."""
    down, across = axes
    for y, x in np.ndindex(down.length, across.length):
        box = [v * across.length + u for v in down.neighbours(y) for u in across.neighbours(x)]
        yield y * across.length + x, box


def _group(Q: Array, K: Array, Kx: Array | None, Vx: Array | None) -> int:
    """Query heads that share a key/value head."""
    if Q.shape[1] % K.shape[1]:
        raise ValueError(f"{Q.shape[1]} query heads cannot share {K.shape[1]} key/value heads evenly")
    if (Kx is None) != (Vx is None):
        raise ValueError("Kx and Vx go together")
    return int(Q.shape[1] // K.shape[1])


def _partial(scale: float, q: Array, k: Array, v: Array) -> tuple[Array, float]:
    """Attention of one query over a set of keys, and the logarithm of its sum."""
    logits = scale * (k @ q)
    top = logits.max()
    raised = np.exp(logits - top)
    return raised @ v / raised.sum(), float(top + np.log(raised.sum()))


def _merge(one: Array, log_one: float, two: Array, log_two: float) -> tuple[Array, float]:
    """Two partial results over disjoint keys as one: O1 - sigmoid(L2 - L1) (O1 - O2), log of the sum of both sums."""
    share = np.exp(log_two - np.logaddexp(log_one, log_two))
    return one - share * (one - two), float(np.logaddexp(log_one, log_two))
