"""Multi-scale deformable attention, sample by sample: find the pixel, its neighbours, and only those on the map.

Zhu et al. 2020 (arXiv 2010.04159), Eq. 2-3 and Appendix A.2, with the pixel convention of the authors' operator: 0 and
1 are the outer edges of the map, a pixel's value lies at its centre.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def deformable_attention(
    V: Array, height: Array, width: Array, ref: Array, off: Array, logits: Array, box: Array | None = None,
    mask: Array | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        V: `[b,h,l,y,x,e]`; of level l the first height[l] rows and width[l] columns are the map.
        height, width: `[l]`. ref: `[b,i,l,2]` and box: `[b,i,l,2]`, as (x, y), l may be 1.
        off: `[b,h,i,l,k,2]` as (x, y). logits: `[b,h,i,l,k]`. mask: `[b,l,y,x]`, False = the cell's value is zero.

    Returns:
        `O` `[b,h,i,e]`.
    """
    batch, heads, queries, levels, points, _ = off.shape
    out = np.zeros((batch, heads, queries, V.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, queries):
        raised = np.exp(logits[b, h, i] - logits[b, h, i].max())
        weights = raised / raised.sum()
        for level, k in np.ndindex(levels, points):
            rows, columns = int(height[level]), int(width[level])
            cells = V[b, h, level, :rows, :columns]
            if mask is not None:
                cells = np.where(mask[b, level, :rows, :columns, None], cells, 0.0)
            move = off[b, h, i, level, k]
            centre = ref[b, i, level if ref.shape[2] > 1 else 0]
            if box is None:
                x, y = centre[0] + move[0] / columns, centre[1] + move[1] / rows
            else:
                sides = box[b, i, level if box.shape[2] > 1 else 0]
                x, y = centre + move / points * sides / 2
            out[b, h, i] += weights[level, k] * _bilinear(cells, x * columns - 0.5, y * rows - 0.5)
    return {"O": out}


def _bilinear(cells: Array, px: float, py: float) -> Array:
    """The map `[y,x,e]` at column px and row py, in pixels; what is outside counts as zero."""
    left, top = math.floor(px), math.floor(py)
    found = np.zeros(cells.shape[2])
    for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= y < cells.shape[0] and 0 <= x < cells.shape[1]:
            found += (1.0 - abs(px - x)) * (1.0 - abs(py - y)) * cells[y, x]
    return found
