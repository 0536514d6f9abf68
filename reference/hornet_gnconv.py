"""Recursive gated convolution: a pointwise map, one depthwise convolution, and a chain of gates of growing width.

Rao et al. 2022 (arXiv 2207.14284), Section 3.1, Eq. 3-7. Pixel by pixel as the sums of the definition; what lies
outside the map counts as zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def gnconv(
    X: Array, Win: tuple[Array, Array], DW: tuple[Array, Array], P: list[tuple[Array, Array]],
    Wout: tuple[Array, Array], s: float,
) -> tuple[Array, Array]:  # fmt: skip
    """Output `[b,c,y,x]` and depthwise output `[b,f,y,x]`; order n = len(P) + 1."""
    channels, order = X.shape[1], len(P) + 1
    widths = [channels // 2 ** (order - 1 - k) for k in range(order)]
    features = _pointwise(X, *Win)
    mixed = _depthwise(features[:, widths[0] :], *DW)
    state, start = features[:, : widths[0]], 0
    for k, width in enumerate(widths):
        if k:
            state = _pointwise(state, *P[k - 1])
        state = state * (s * mixed[:, start : start + width])
        start += width
    return _pointwise(state, *Wout), mixed


def _pointwise(X: Array, weight: Array, bias: Array) -> Array:
    out = np.zeros((X.shape[0], len(weight), *X.shape[2:]))
    for b, y, x in np.ndindex(X.shape[0], *X.shape[2:]):
        out[b, :, y, x] = weight @ X[b, :, y, x] + bias
    return out


def _depthwise(q: Array, weight: Array, bias: Array) -> Array:
    batch, _, height, width = q.shape
    reach_y, reach_x = weight.shape[1] // 2, weight.shape[2] // 2
    out = np.zeros(q.shape)
    for b, y, x in np.ndindex(batch, height, width):
        total = np.array(bias)
        for dy, dx in np.ndindex(weight.shape[1:]):
            at, to = y + dy - reach_y, x + dx - reach_x
            if 0 <= at < height and 0 <= to < width:
                total = total + weight[:, dy, dx] * q[b, :, at, to]
        out[b, :, y, x] = total
    return out
