"""Relative attention of the Music Transformer as its paper computes it: the relative logits are skewed, not gathered.

Huang et al. 2018 (arXiv 1809.04281), Section 3.4 (skewing: pad, reshape, slice) and Section 3.5 (the local form with
blocks). The matrix of relative logits comes from one product with the table; its rows are then shifted against each
other by a reshape. The backward pass skews back, with the same reshape read in the other direction.

Queries are laid on the rows of a square of positions: they are the last ones of it, and rows without a query are zero,
as is the padding of a last block that is not full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def music_relative_attention(
    Q: Array, K: Array, V: Array, rel: Array, mask: Array | None = None, *, causal: bool = True,
    block: int | None = None, far: str = "zero", scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. rel: `[h or 1,m,d]`, the last row is distance 0 (the middle
            one without `causal`). mask: `[b or 1,h or 1,i or 1,j]`, True = attend.
        block: length of the blocks of the local form; None: global.
        far: "zero" or "clamp", for distances beyond the table.

    Returns:
        `O` `[b,h,i,e]`.
    """
    problem = _Problem(Q, K, V, rel, mask, causal, block, far, scale)
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h in np.ndindex(*Q.shape[:2]):
        into = problem.queries(out[b, h])
        for piece in problem.pieces(b, h):
            into[piece.rows] = piece.gathered(piece.weights, piece.v)
        out[b, h, problem.skipped :] = into[problem.first_row : problem.length]
    return {"O": out}


def music_relative_attention_backward(
    dO: Array, *, Q: Array, K: Array, V: Array, rel: Array, mask: Array | None = None, causal: bool = True,
    block: int | None = None, far: str = "zero", scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O)` by input name."""
    problem = _Problem(Q, K, V, rel, mask, causal, block, far, scale)
    found = {"Q": np.zeros(Q.shape), "K": np.zeros(K.shape), "V": np.zeros(V.shape), "rel": np.zeros(rel.shape)}
    for b, h in np.ndindex(*Q.shape[:2]):
        g, dq = problem.queries(dO[b, h]), problem.queries(np.zeros_like(Q[b, h]))
        dk, dv = problem.keys(np.zeros_like(K[b, h])), problem.keys(np.zeros_like(V[b, h]))
        table_of = h if len(rel) > 1 else 0
        for piece in problem.pieces(b, h):
            up = g[piece.rows]
            dweights = np.where(piece.seen, up @ piece.v.T, 0.0)
            at_dot = (piece.weights * dweights).sum(1, keepdims=True)
            dlogits = problem.scale * piece.weights * (dweights - at_dot)
            dv[piece.columns] += piece.weights.T @ up
            dk[piece.columns] += dlogits.T @ piece.q
            dq[piece.rows] += piece.gathered(dlogits, piece.k)
            for part in piece.parts:
                back = part.skew_back(dlogits[:, part.columns])
                dq[piece.rows] += back @ part.table
                real = part.source >= 0
                np.add.at(found["rel"][table_of], part.source[real], (back.T @ piece.q)[real])
        found["Q"][b, h, problem.skipped :] = dq[problem.first_row : problem.length]
        found["K"][b, h] = dk[problem.first_column : problem.length]
        found["V"][b, h] = dv[problem.first_column : problem.length]
    return found


def skew_causal(logits: Array) -> Array:
    """`[n,n]` by distance (last column: 0) to `[n,n]` by key; only the triangle up to the diagonal means anything."""
    n = len(logits)
    return np.concatenate([np.zeros((n, 1)), logits], axis=1).reshape(n + 1, n)[1:]


def skew_causal_back(gradient: Array) -> Array:
    """Transpose of `skew_causal`, for a gradient that is zero above the diagonal."""
    n = len(gradient)
    return np.concatenate([np.zeros((1, n)), gradient]).reshape(n, n + 1)[:, 1:]


def skew_both(logits: Array) -> Array:
    """`[n,2n-1]` by distance (from -(n-1) or, for the block before, from -(2n-1)) to `[n,n]` by key."""
    n = len(logits)
    flat = np.concatenate([logits, np.zeros((n, 1))], axis=1).reshape(-1)
    return np.concatenate([flat, np.zeros(n - 1)]).reshape(n + 1, 2 * n - 1)[:n, n - 1 :]


def skew_both_back(gradient: Array) -> Array:
    """Transpose of `skew_both`."""
    n = len(gradient)
    wide = np.zeros((n + 1, 2 * n - 1))
    wide[:n, n - 1 :] = gradient
    return wide.reshape(-1)[: 2 * n * n].reshape(n, 2 * n)[:, : 2 * n - 1]


@dataclass(frozen=True)
class _Part:
    """Columns of a piece whose relative logits come out of one skewing; `source`: rows of `rel`, -1 for a zero row."""

    columns: slice
    table: Array
    source: Array
    both: bool

    def skew(self, logits: Array) -> Array:
        return skew_both(logits) if self.both else skew_causal(logits)

    def skew_back(self, gradient: Array) -> Array:
        return skew_both_back(gradient) if self.both else skew_causal_back(gradient)


@dataclass(frozen=True)
class _Piece:
    """A block of queries with the keys that it may see and the weights of one softmax over them."""

    rows: slice
    columns: slice
    q: Array
    k: Array
    v: Array
    seen: Array
    weights: Array
    parts: list[_Part]

    def gathered(self, factors: Array, vectors: Array) -> Array:
        """`factors @ vectors` over the pairs that see each other: what a masked key holds is not read."""
        found: Array = np.where(self.seen[..., None], factors[..., None] * vectors, 0.0).sum(1)
        return found


class _Problem:
    """The arguments of a call, laid out on a square of positions that is padded to full blocks."""

    def __init__(
        self, Q: Array, K: Array, V: Array, rel: Array, mask: Array | None, causal: bool, block: int | None, far: str,
        scale: float | None,
    ) -> None:  # fmt: skip
        if far not in ("zero", "clamp"):
            raise ValueError(f"far is {far!r}, expected 'zero' or 'clamp'")
        if not causal and (block is not None or rel.shape[1] % 2 == 0):
            raise ValueError("without causal there are no blocks, and the table has an odd number of rows")
        self.Q, self.K, self.V, self.rel, self.mask = Q, K, V, rel, mask
        self.causal, self.far = causal, far
        self.scale = Q.shape[-1] ** -0.5 if scale is None else scale
        queries, keys = Q.shape[2], K.shape[2]
        # Causal queries before the first key see nothing and take no part.
        self.skipped = max(queries - keys, 0) if causal else 0
        self.length = keys if causal else max(queries, keys)
        self.first_row, self.first_column = self.length - (queries - self.skipped), self.length - keys
        self.block = self.length if block is None else min(block, self.length)
        self.padded = -(-self.length // self.block) * self.block if self.length else 0

    def queries(self, array: Array) -> Array:
        """`[i,.]` on the rows of the square, zeros elsewhere."""
        return self._laid(array[self.skipped :], self.first_row)

    def keys(self, array: Array) -> Array:
        """`[j,.]` on the columns of the square, zeros elsewhere."""
        return self._laid(array, self.first_column)

    def pieces(self, b: int, h: int) -> Iterator[_Piece]:
        """The blocks of queries of one batch entry and head, in order."""
        q, k, v = self.queries(self.Q[b, h]), self.keys(self.K[b, h]), self.keys(self.V[b, h])
        rel = self.rel[h if len(self.rel) > 1 else 0]
        allowed, n = self._allowed(b, h), self.block
        for first in range(0, self.padded, n):
            before = n if first else 0
            rows, columns = slice(first, first + n), slice(first - before, first + n)
            parts = []
            if before:
                parts.append(self._part(rel, slice(0, n), -(2 * n - 1), 2 * n - 1, both=True))
            if self.causal:
                parts.append(self._part(rel, slice(before, before + n), -(n - 1), n, both=False))
            else:
                parts.append(self._part(rel, slice(0, n), -(n - 1), 2 * n - 1, both=True))
            relative = np.concatenate([part.skew(q[rows] @ part.table.T) for part in parts], axis=1)
            logits = self.scale * (q[rows] @ k[columns].T + relative)
            seen = allowed[rows, columns]
            top = np.where(seen, logits, -np.inf).max(1, keepdims=True)
            top = np.where(np.isfinite(top), top, 0.0)
            raised = np.where(seen, np.exp(np.where(seen, logits, top) - top), 0.0)
            total = raised.sum(1, keepdims=True)
            weights = raised / np.where(total > 0, total, 1.0)
            yield _Piece(rows, columns, q[rows], k[columns], v[columns], seen, weights, parts)

    def _laid(self, array: Array, first: int) -> Array:
        out = np.zeros((self.padded, *array.shape[1:]), dtype=array.dtype)
        out[first : self.length] = array
        return out

    def _part(self, rel: Array, columns: slice, nearest: int, count: int, *, both: bool) -> _Part:
        """The table rows of `count` distances from `nearest` upwards: slices of `rel`, with extra rows at its ends."""
        zero = len(rel) - 1 if self.causal else (len(rel) - 1) // 2
        source = np.arange(nearest, nearest + count) + zero
        if self.far == "clamp":
            source = np.clip(source, 0, len(rel) - 1)
        else:
            source = np.where((source >= 0) & (source < len(rel)), source, -1)
        rows = np.concatenate([rel, np.zeros((1, rel.shape[1]))])[source]
        return _Part(columns, rows, source, both)

    def _allowed(self, b: int, h: int) -> Array:
        queries, keys = self.Q.shape[2], self.K.shape[2]
        allowed = np.zeros((self.padded, self.padded), dtype=bool)
        given = np.ones((queries, keys), dtype=bool)
        if self.mask is not None:
            given = np.broadcast_to(self.mask, (*self.Q.shape[:2], queries, keys))[b, h]
        allowed[self.first_row : self.length, self.first_column : self.length] = given[self.skipped :]
        return np.tril(allowed) if self.causal else allowed
