"""Recursive gated convolution: a pointwise map, one depthwise convolution, and a chain of gates of growing width.

Rao et al. 2022 (arXiv 2207.14284), Section 3.1: gated convolution, and its recursion with groups of doubling width.
Pixel by pixel; the depthwise kernel visits only the pixels that are on the map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def hornet_gnconv(
    X: Array, Win: Array, DW: Array, P: Array, Wout: Array, in_bias: Array | None = None,
    dw_bias: Array | None = None, p_bias: Array | None = None, out_bias: Array | None = None, *, scale: float = 1.0,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        X: `[b,c,y,x]`, c a multiple of 2 ** k. Win: `[2c,c]`, in_bias: `[2c]`. DW: `[f,v,u]`, dw_bias: `[f]`, f the sum
        of the groups' widths. P: `[k,c,c/2]`, p_bias: `[k,c]`, of map k the upper left corner that leads from group k
        to group k + 1. Wout: `[c,c]`, out_bias: `[c]`. scale: factor of the depthwise output with its bias.

    Returns:
        `O` `[b,c,y,x]`.
    """
    maps, channels = len(P), X.shape[1]
    widths = [channels // 2 ** (maps - k) for k in range(maps + 1)]
    features = _pointwise(X, Win, in_bias)
    gates = scale * _depthwise(features[:, widths[0] :], DW, dw_bias)
    state, start = features[:, : widths[0]], 0
    for k, width in enumerate(widths):
        if k:
            bias = None if p_bias is None else p_bias[k - 1, :width]
            state = _pointwise(state, P[k - 1, :width, : widths[k - 1]], bias)
        state = state * gates[:, start : start + width]
        start += width
    return {"O": _pointwise(state, Wout, out_bias)}


def _pointwise(X: Array, weight: Array, bias: Array | None) -> Array:
    out = np.zeros((X.shape[0], len(weight), *X.shape[2:]))
    for b, y, x in np.ndindex(X.shape[0], *X.shape[2:]):
        out[b, :, y, x] = weight @ X[b, :, y, x]
        if bias is not None:
            out[b, :, y, x] += bias
    return out


def _depthwise(X: Array, weight: Array, bias: Array | None) -> Array:
    batch, channels, height, width = X.shape
    rows, columns = weight.shape[1:]
    out = np.zeros(X.shape)
    for b, y, x in np.ndindex(batch, height, width):
        total = np.zeros(channels) if bias is None else np.array(bias, dtype=float)
        for v, u in np.ndindex(rows, columns):
            row, column = y + v - rows // 2, x + u - columns // 2
            if 0 <= row < height and 0 <= column < width:
                total += weight[:, v, u] * X[b, :, row, column]
        out[b, :, y, x] = total
    return out
