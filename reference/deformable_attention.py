"""Multi-scale deformable attention, sample by sample: floor, four corners, and only those on the map.

Zhu et al. 2020 (arXiv 2010.04159), Eq. 2-3 and Appendix A.2. Levels lie one after the other on one axis, row after row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def bilinear(values: Array, px: float, py: float) -> Array:
    """The map `[y,x,e]` at column px and row py, in pixels; what is outside counts as zero."""
    height, width, features = values.shape
    left, top = math.floor(px), math.floor(py)
    found = np.zeros(features)
    for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= y < height and 0 <= x < width:
            found += (1.0 - abs(px - x)) * (1.0 - abs(py - y)) * values[y, x]
    return found


def deformable_attention(
    V: Array, shapes: Array, ref: Array, off: Array, logits: Array, mask: Array | None = None
) -> dict[str, Array]:
    """Outputs by name.

    Args:
        V: `[b,h,j,e]` projected values, levels one after the other. shapes: `[l,2]`, rows and columns of each level.
        ref: `[b,i,l,2]` as (x, y) in 0..1, or `[b,i,l,4]` boxes (centre x, centre y, width, height).
        off: `[b,h,i,l,k,2]` as (x, y). logits: `[b,h,i,l,k]`. mask: `[b,j]`, False = padding, its value is zero.

    Returns:
        `O` `[b,h,i,e]`.
    """
    batch, heads, queries, levels, points, _ = off.shape
    out = np.zeros((batch, heads, queries, V.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        values = V[b, h] if mask is None else np.where(mask[b][:, None], V[b, h], 0.0)
        maps = levels_of(values, shapes)
        for i in range(queries):
            raised = np.exp(logits[b, h, i] - logits[b, h, i].max())
            weights = raised / raised.sum()
            for level, k in np.ndindex(levels, points):
                x, y = place(ref[b, i, level], off[b, h, i, level, k], shapes[level], points)
                height, width = shapes[level]
                out[b, h, i] += weights[level, k] * bilinear(maps[level], x * width - 0.5, y * height - 0.5)
    return {"O": out}


def levels_of(values: Array, shapes: Array) -> list[Array]:
    """The maps `[y,x,e]` of all levels."""
    found, start = [], 0
    for height, width in shapes.tolist():
        found.append(values[start : start + height * width].reshape(height, width, -1))
        start += height * width
    return found


def place(ref: Array, off: Array, shape: Array, points: int) -> tuple[float, float]:
    """A sampling location (x, y), 0..1 on the map: the reference point moved by pixels, or a box by shares of it."""
    if len(ref) == 2:
        return float(ref[0] + off[0] / shape[1]), float(ref[1] + off[1] / shape[0])
    return float(ref[0] + off[0] / points * ref[2] * 0.5), float(ref[1] + off[1] / points * ref[3] * 0.5)
