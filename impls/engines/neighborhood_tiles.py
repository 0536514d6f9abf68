"""Device functions that the neighborhood kernels share: windows of a query, viewers of a key, boxes of tokens.

Along an axis of the grid a token has a coordinate z; with dilation p it belongs to the group of its residue z % p, in
which it has the number z // p. Groups never meet, so that a program works inside one group of each axis, on numbers;
there windows are contiguous. A tile of queries or keys is a box of numbers, row after row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["H", "N", "X", "rows", "cols", "wy", "wx", "py", "px", "sy", "sx", "tiles_y", "tiles_x", "share"]


@triton.jit
def window(u, n, w, s, CAUSAL: tl.constexpr):
    """The numbers [start, end) that the query of number u sees in a group of n, with window w and stride s."""
    if CAUSAL:
        leader = tl.minimum(u // s * s + s - 1, n - 1)
        start = tl.maximum(leader - w + 1, 0)
        end = u + 1
    else:
        leader = tl.minimum(u // s * s + s // 2, n - 1)
        start = tl.minimum(tl.maximum(leader - w // 2, 0), n - w)
        end = start + w
    return start, end


@triton.jit
def viewers(first, last, n, w, s, CAUSAL: tl.constexpr):
    """The queries [lo, hi) of which some may see a key of the numbers first..last: `window` solved for the query.

    Both bounds of a window grow with the query, so that the first key decides about lo and the last about hi.
    """
    if CAUSAL:
        lo = first
        hi = tl.where(last + w >= n, n, ((last + w - s) // s + 1) * s)
    else:
        lo = tl.where(first < w, 0, tl.cdiv(tl.maximum(first - w + 1 + w // 2 - s // 2, 0), s) * s)
        hi = tl.where((last + w >= n) | (last + w // 2 >= n - 1), n, ((last + w // 2 - s // 2) // s + 1) * s)
    return lo, tl.minimum(hi, n)


@triton.jit
def group_of(pid, rows, cols, py, px, tiles_y, tiles_x):
    """Of a program: the rest of its number, residue and size of its group along y and x, number of its box."""
    tx = pid % tiles_x
    pid = pid // tiles_x
    ty = pid % tiles_y
    pid = pid // tiles_y
    rx = pid % px
    pid = pid // px
    ry = pid % py
    pid = pid // py
    return pid, ry, rx, (rows - ry + py - 1) // py, (cols - rx + px - 1) // px, ty, tx


@triton.jit
def token(y, x, ry, rx, py, px, cols):
    """The tokens of these numbers, as int64."""
    return (y.to(tl.int64) * py + ry) * cols + (x.to(tl.int64) * px + rx)
