"""Softmax attention as an algorithm: row by row, over the keys that the row may see, with a running maximum.

Vaswani et al. 2017 (arXiv 1706.03762), Eq. 1, in the order of operations that fused kernels use: scale, softcap, bias,
mask, softmax, dropout, values. The forward pass keeps a running maximum and sum over tiles of keys (Milakov and
Gimelshein 2018, arXiv 1805.02867, Algorithm 3); the backward pass recomputes each row's weights from its logarithm of
the sum (Dao et al. 2022, arXiv 2205.14135, Algorithm 4).

Nothing is masked here. Lengths and padding are sliced off, packed sequences are taken apart and run one by one, pages
are walked, and keys that a row may not see are not read at all. So it shares no formula with a masked implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TILE = 3
"""Keys per step of the running softmax: small, so that short sequences take several steps."""


@dataclass(frozen=True)
class Rules:
    """Which keys a query may see, in positions that are local to its sequence."""

    causal: bool
    bottom_right: bool
    window_left: int | None
    window_right: int | None
    chunk: int | None
    sink_tokens: int

    def sees(self, query: int, key: int, queries: int, keys: int) -> bool:
        """Whether query number `query` of `queries` may see key number `key` of `keys`."""
        at = query + keys - queries if self.bottom_right else query
        if self.causal and key > at:
            return False
        if self.window_left is not None and at - key > self.window_left and key >= self.sink_tokens:
            return False
        if self.window_right is not None and key - at > self.window_right:
            return False
        return self.chunk is None or math.floor(key / self.chunk) == math.floor(at / self.chunk)


@dataclass(frozen=True)
class Sequence:
    """Tokens of one batch entry that belong together: rows of the query array and of the key array, in order."""

    batch: int
    query_rows: list[int]
    key_rows: list[int]
    queries: int
    keys: int


@dataclass(frozen=True)
class Row:
    """One query with what it attends to: key rows, their vectors, and what happens to each weight afterwards."""

    batch: int
    head: int
    group: int
    query: int
    seen: list[int]
    key: Array
    value: Array
    bias: Array
    kept: Array


class Problem:
    """The arguments of a call, and an iterator over its rows."""

    def __init__(
        self,
        Q: Array,
        K: Array | None = None,
        V: Array | None = None,
        *,
        bias: Array | None = None,
        mask: Array | None = None,
        sink: Array | None = None,
        dropout_mask: Array | None = None,
        q_segment: Array | None = None,
        kv_segment: Array | None = None,
        q_length: Array | None = None,
        kv_length: Array | None = None,
        left_pad: Array | None = None,
        k_pages: Array | None = None,
        v_pages: Array | None = None,
        block_table: Array | None = None,
        causal: bool = False,
        causal_alignment: str = "bottom_right",
        window_left: int | None = None,
        window_right: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        chunk: int | None = None,
        sink_tokens: int = 0,
    ) -> None:
        if (K is None) != (V is None) or (K is None) == (block_table is None):
            raise ValueError("give either K and V, or k_pages, v_pages and block_table")
        if causal_alignment not in ("bottom_right", "top_left"):
            raise ValueError(f"causal_alignment is {causal_alignment!r}, expected 'bottom_right' or 'top_left'")
        self.Q, self.K, self.V = Q, K, V
        self.bias, self.mask, self.sink, self.dropout_mask = bias, mask, sink, dropout_mask
        self.q_segment, self.kv_segment = q_segment, kv_segment
        self.q_length, self.kv_length, self.left_pad = q_length, kv_length, left_pad
        self.k_pages, self.v_pages, self.block_table = k_pages, v_pages, block_table
        self.softcap, self.dropout_p = softcap, dropout_p
        self.B, self.H, self.N, self.D = Q.shape
        self.scale = 1.0 / math.sqrt(self.D) if scale is None else scale
        if K is not None and V is not None:
            self.Hk, self.M, self.E = K.shape[1], K.shape[2], V.shape[3]
        else:
            assert k_pages is not None and v_pages is not None and block_table is not None
            self.Hk, self.M = k_pages.shape[2], block_table.shape[1] * k_pages.shape[1]
            self.E = v_pages.shape[3]
        if self.H % self.Hk:
            raise ValueError(f"{self.H} query heads cannot share {self.Hk} key/value heads evenly")
        self.rules = Rules(causal, causal_alignment == "bottom_right", window_left, window_right, chunk, sink_tokens)

    def sequences(self) -> Iterator[Sequence]:
        """The sequences of every batch entry: one, or one for each segment id that a query has."""
        for b in range(self.B):
            if self.q_segment is not None and self.kv_segment is not None:
                for name in sorted(set(self.q_segment[b].tolist())):
                    if name >= 0:
                        queries = [i for i in range(self.N) if self.q_segment[b, i] == name]
                        keys = [j for j in range(self.M) if self.kv_segment[b, j] == name]
                        yield Sequence(b, queries, keys, len(queries), len(keys))
                continue
            pad = int(self.left_pad[b]) if self.left_pad is not None else 0
            queries_here = int(self.q_length[b]) if self.q_length is not None else self.N
            keys_here = int(self.kv_length[b]) if self.kv_length is not None else self.M - pad
            key_rows = list(range(pad, min(pad + keys_here, self.M)))
            yield Sequence(b, list(range(queries_here)), key_rows, queries_here, keys_here)

    def rows(self) -> Iterator[Row]:
        """Every query of every sequence and head, with the keys that it sees."""
        for sequence in self.sequences():
            b = sequence.batch
            for h in range(self.H):
                g = h // (self.H // self.Hk)
                for number, i in enumerate(sequence.query_rows):
                    seen = [
                        j
                        for place, j in enumerate(sequence.key_rows)
                        if self.rules.sees(number, place, sequence.queries, sequence.keys) and self.allowed(b, h, i, j)
                    ]
                    yield Row(
                        b,
                        h,
                        g,
                        i,
                        seen,
                        np.array([self.key(b, g, j) for j in seen]).reshape(len(seen), self.D),
                        np.array([self.value(b, g, j) for j in seen]).reshape(len(seen), self.E),
                        np.array([_at(self.bias, b, h, i, j) if self.bias is not None else 0.0 for j in seen]),
                        np.array([self.kept(b, h, i, j) for j in seen]),
                    )

    def allowed(self, b: int, h: int, i: int, j: int) -> bool:
        """Whether neither the mask nor a bias of minus infinity removes the pair."""
        if self.mask is not None and not _at(self.mask, b, h, i, j):
            return False
        return self.bias is None or float(_at(self.bias, b, h, i, j)) != -math.inf

    def kept(self, b: int, h: int, i: int, j: int) -> float:
        """What dropout multiplies the weight with."""
        if self.dropout_mask is None:
            return 1.0
        return 1.0 / (1.0 - self.dropout_p) if self.dropout_mask[b, h, i, j] else 0.0

    def key(self, b: int, g: int, j: int) -> Array:
        if self.K is not None:
            return np.asarray(self.K[b, g, j])
        assert self.k_pages is not None
        page, slot = self.page(b, j)
        return np.asarray(self.k_pages[page, slot, g])

    def value(self, b: int, g: int, j: int) -> Array:
        if self.V is not None:
            return np.asarray(self.V[b, g, j])
        assert self.v_pages is not None
        page, slot = self.page(b, j)
        return np.asarray(self.v_pages[page, slot, g])

    def page(self, b: int, j: int) -> tuple[int, int]:
        """The page and the slot in it that hold key j of batch entry b."""
        assert self.block_table is not None and self.k_pages is not None
        entry, slot = divmod(j, self.k_pages.shape[1])
        return int(self.block_table[b, entry]), slot

    def logits(self, row: Row) -> tuple[Array, Array]:
        """Capped logits without bias, and the logits that enter the softmax, of the seen keys."""
        scores = self.scale * (row.key @ self.Q[row.batch, row.head, row.query])
        capped = scores if self.softcap is None else self.softcap * np.tanh(scores / self.softcap)
        return capped, capped + row.bias


def softmax_attention(
    Q: Array,
    K: Array | None = None,
    V: Array | None = None,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    sink: Array | None = None,
    dropout_mask: Array | None = None,
    q_segment: Array | None = None,
    kv_segment: Array | None = None,
    q_length: Array | None = None,
    kv_length: Array | None = None,
    left_pad: Array | None = None,
    k_pages: Array | None = None,
    v_pages: Array | None = None,
    block_table: Array | None = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    chunk: int | None = None,
    sink_tokens: int = 0,
) -> dict[str, Array]:
    """Softmax attention, forward.

    Args:
        Q: [B, H, N, D]. K: [B, Hk, M, D]. V: [B, Hk, M, E]; H is a multiple of Hk.
        bias, mask: [B or 1, H or 1, N or 1, M]; mask True = may attend. sink: [H]. dropout_mask: [B, H, N, M].
        q_segment: [B, N], kv_segment: [B, M]: sequence ids, negative = padding.
        q_length, kv_length, left_pad: [B]. k_pages: [pages, slots, Hk, D], v_pages: [pages, slots, Hk, E],
        block_table: [B, entries]: instead of K and V.
        (options as in the mechanism's file)

    Returns:
        O: [B, H, N, E], zero where a query sees nothing.
        LSE: [B, H, N], natural logarithm, -inf where a query sees nothing (with a sink: s).

    Raises:
        ValueError: neither or both of dense and paged keys, heads that do not divide, an unknown alignment.
    """
    problem = Problem(
        Q, K, V, bias=bias, mask=mask, sink=sink, dropout_mask=dropout_mask, q_segment=q_segment, kv_segment=kv_segment,
        q_length=q_length, kv_length=kv_length, left_pad=left_pad, k_pages=k_pages, v_pages=v_pages,
        block_table=block_table, causal=causal, causal_alignment=causal_alignment, window_left=window_left,
        window_right=window_right, softcap=softcap, scale=scale, dropout_p=dropout_p, chunk=chunk,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    return _forward(problem)


def _forward(problem: Problem) -> dict[str, Array]:
    out = np.zeros((problem.B, problem.H, problem.N, problem.E))
    lse = np.full((problem.B, problem.H, problem.N), -np.inf)
    if problem.sink is not None:
        lse[:] = np.asarray(problem.sink)[None, :, None]
    for row in problem.rows():
        _, logits = problem.logits(row)
        largest, total = -math.inf, 0.0
        if problem.sink is not None and problem.sink[row.head] != -math.inf:
            largest, total = float(problem.sink[row.head]), 1.0
        gathered = np.zeros(problem.E)
        for start in range(0, len(row.seen), TILE):
            part = slice(start, start + TILE)
            higher = max(largest, float(logits[part].max()))
            weights = np.exp(logits[part] - higher)
            shrink = math.exp(largest - higher) if largest != -math.inf else 0.0
            total = total * shrink + float(weights.sum())
            gathered = gathered * shrink + (weights * row.kept[part]) @ row.value[part]
            largest = higher
        if total > 0.0:
            out[row.batch, row.head, row.query] = gathered / total
            lse[row.batch, row.head, row.query] = largest + math.log(total)
    return {"O": out, "LSE": lse}


def softmax_attention_backward(dO: Array, dLSE: Array | None = None, **arguments: Any) -> dict[str, Array]:
    """Gradients of `<dO, O> + <dLSE, LSE>`.

    Args:
        dO: [B, H, N, E], dLSE: [B, H, N] or None. The rest as for `softmax_attention`, by name; dense keys only.

    Returns:
        By input name, each of the input's shape: Q, K, V, and bias and sink where they are given.

    Raises:
        ValueError: a paged cache, which has no gradient, or whatever the forward function refuses.
    """
    if arguments.get("block_table") is not None:
        raise ValueError("a paged cache has no gradient: give K and V")
    problem = Problem(**arguments)
    forward = _forward(problem)
    assert problem.K is not None and problem.V is not None
    dQ, dK, dV = np.zeros_like(problem.Q), np.zeros_like(problem.K), np.zeros_like(problem.V)
    dbias = None if problem.bias is None else np.zeros_like(problem.bias)
    dsink = None if problem.sink is None else np.zeros_like(problem.sink)
    reached = np.zeros(forward["LSE"].shape, dtype=bool)
    for row in problem.rows():
        b, h, g, i = row.batch, row.head, row.group, row.query
        reached[b, h, i] = True
        pull = 0.0 if dLSE is None else float(dLSE[b, h, i])
        lse = float(forward["LSE"][b, h, i])
        if dsink is not None and problem.sink is not None and lse != -math.inf:
            inner = float(dO[b, h, i] @ forward["O"][b, h, i])
            dsink[h] += math.exp(float(problem.sink[h]) - lse) * (pull - inner)
        if not row.seen:
            continue
        capped, logits = problem.logits(row)
        weights = np.exp(logits - lse)
        slope = row.kept * (row.value @ dO[b, h, i])
        dlogits = weights * (slope - float(weights @ slope) + pull)
        if dbias is not None:
            for j, change in zip(row.seen, dlogits, strict=True):
                _add(dbias, b, h, i, j, float(change))
        dscores = dlogits if problem.softcap is None else dlogits * (1.0 - (capped / problem.softcap) ** 2)
        dQ[b, h, i] = problem.scale * (dscores @ row.key)
        dK[b, g, row.seen] += problem.scale * np.outer(dscores, problem.Q[b, h, i])
        dV[b, g, row.seen] += np.outer(weights * row.kept, dO[b, h, i])
    if dsink is not None and dLSE is not None:
        # Padded queries have the LSE of the sink alone.
        alone = np.where(reached, 0.0, dLSE)
        finite = np.asarray(problem.sink) != -np.inf
        dsink += np.where(finite, alone.sum(axis=(0, 2)), 0.0)
    found = {"Q": dQ, "K": dK, "V": dV, "bias": dbias, "sink": dsink}
    return {name: value for name, value in found.items() if value is not None}


def _at(array: Array, b: int, h: int, i: int, j: int) -> Any:
    """The element of an array [B or 1, H or 1, N or 1, M]."""
    B, H, N, _ = array.shape
    return array[b if B > 1 else 0, h if H > 1 else 0, i if N > 1 else 0, j]


def _add(array: Array, b: int, h: int, i: int, j: int, change: float) -> None:
    B, H, N, _ = array.shape
    array[b if B > 1 else 0, h if H > 1 else 0, i if N > 1 else 0, j] += change
