"""Landmark attention as a two-level softmax: blocks are summarised one by one, then compete with the query's own block.

Mohtashami and Jaggi 2023 (arXiv 2305.16300), Section 3.1 and Figure 2 (grouped softmax), Section 3.2 (retrieval of
blocks from a cache). The weight of an earlier block is the softmax weight of its landmark, and the block's value is a
softmax average of its ordinary tokens; a block without tokens has value zero. The sequence is cut at its landmarks, so
no key is ever masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def landmark_attention(
    Q: Array, K: Array, V: Array, landmark: Array, *, topk: int | None = None, select: str = "token_and_head",
    scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q: `[b,h,i,d]`, the last positions of the sequence. K: `[b,h,j,d]`. V: `[b,h,j,e]`. landmark: `[b,j]` bool.
        topk: cached blocks (closed before the first query) that are attended to; None: all.
        select: "token_and_head", "over_heads" or "over_tokens".

    Returns:
        `O` `[b,h,i,e]`.
    """
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for row in _rows(Q, K, V, landmark, topk, select, scale):
        out[row.batch, row.head, row.query] = row.out
    return {"O": out}


def landmark_attention_backward(
    dO: Array, *, Q: Array, K: Array, V: Array, landmark: Array, topk: int | None = None,
    select: str = "token_and_head", scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O)` by input name; the choice of blocks is constant."""
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    dQ, dK, dV = np.zeros(Q.shape), np.zeros(K.shape), np.zeros(V.shape)
    for row in _rows(Q, K, V, landmark, topk, select, scale):
        b, h, i = row.batch, row.head, row.query
        g = dO[b, h, i]
        through: dict[int, float] = {}  # gradient of the logit of a key
        for unit in row.units:
            through[unit.key] = unit.weight * float(g @ (unit.value - row.out))
            if unit.inside is None:
                dV[b, h, unit.key] += unit.weight * g
                continue
            for j, share in zip(unit.tokens, unit.inside, strict=True):
                through[j] = unit.weight * share * float(g @ (V[b, h, j] - unit.value))
                dV[b, h, j] += unit.weight * share * g
        for j, slope in through.items():
            dQ[b, h, i] += factor * slope * K[b, h, j]
            dK[b, h, j] += factor * slope * Q[b, h, i]
    return {"Q": dQ, "K": dK, "V": dV}


@dataclass(frozen=True)
class _Block:
    """Ordinary tokens and the landmark that closes them; None: the last block, still open."""

    tokens: list[int]
    landmark: int | None


@dataclass
class _Unit:
    """What competes in a query's softmax: a token of its own block, or an earlier block by its landmark."""

    key: int
    value: Array
    tokens: list[int]
    inside: Array | None
    weight: float = 0.0


@dataclass(frozen=True)
class _Row:
    batch: int
    head: int
    query: int
    units: list[_Unit]
    out: Array


def blocks_of(landmark: Array) -> list[_Block]:
    """The sequence cut behind every landmark."""
    found: list[_Block] = []
    tokens: list[int] = []
    for j, closes in enumerate(landmark.tolist()):
        if closes:
            found.append(_Block(tokens, j))
            tokens = []
        else:
            tokens.append(j)
    return [*found, _Block(tokens, None)]


def _rows(
    Q: Array, K: Array, V: Array, landmark: Array, topk: int | None, select: str, scale: float | None
) -> Iterator[_Row]:
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    first = K.shape[2] - Q.shape[2]
    for b in range(len(Q)):
        blocks = blocks_of(landmark[b])
        cached = [block.landmark for block in blocks if block.landmark is not None and block.landmark < first]
        kept = retrieved(Q[b], K[b], cached, topk, select, factor)
        for h, i in np.ndindex(*Q.shape[1:3]):
            units: list[_Unit] = []
            if first + i >= 0:
                own = int(np.sum(landmark[b, : first + i]))
                for c in range(own):  # the cached blocks are the first ones
                    if c >= len(cached) or c in kept[h][i]:
                        units.append(_summary(factor, Q[b, h, i], K[b, h], V[b, h], blocks[c]))
                units += [_Unit(j, V[b, h, j], [], None) for j in blocks[own].tokens if j <= first + i]
            yield _Row(b, h, i, units, _compete(factor, Q[b, h, i], K[b, h], units, V.shape[-1]))


def retrieved(
    q: Array, k: Array, landmarks: list[int], topk: int | None, select: str, scale: float
) -> list[list[set[int]]]:
    """By head and query the numbers of the cached blocks that are fetched: best first, of equal ones the earlier."""
    heads, queries, blocks = len(q), q.shape[1], len(landmarks)
    if topk is None or topk >= blocks:
        return [[set(range(blocks)) for _ in range(queries)] for _ in range(heads)]
    logits = scale * q @ k[:, landmarks].transpose(0, 2, 1)
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    score = raised / raised.sum(-1, keepdims=True)
    if select == "over_heads":
        score = np.broadcast_to(score.max(0, keepdims=True), score.shape)
    elif select == "over_tokens" and queries:
        score = np.broadcast_to(score.max(1, keepdims=True), score.shape)
    elif select not in ("token_and_head", "over_tokens"):
        raise ValueError(f"select is {select!r}, expected 'token_and_head', 'over_heads' or 'over_tokens'")
    order = np.argsort(-score, axis=-1, kind="stable")[..., :topk]
    return [[set(order[h, i].tolist()) for i in range(queries)] for h in range(heads)]


def _summary(scale: float, q: Array, k: Array, v: Array, block: _Block) -> _Unit:
    """An earlier block as one unit: the softmax average of its tokens, under its landmark."""
    assert block.landmark is not None
    if not block.tokens:
        return _Unit(block.landmark, np.zeros(v.shape[-1]), [], np.zeros(0))
    logits = scale * (k[block.tokens] @ q)
    inside = np.exp(logits - logits.max())
    inside /= inside.sum()
    return _Unit(block.landmark, inside @ v[block.tokens], block.tokens, inside)


def _compete(scale: float, q: Array, k: Array, units: list[_Unit], width: int) -> Array:
    """Top-level softmax: sets the weights of the units, returns the output."""
    out = np.zeros(width)
    if units:
        logits = np.array([scale * float(k[unit.key] @ q) for unit in units])
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for unit, weight in zip(units, weights, strict=True):
            unit.weight = float(weight)
            out += weight * unit.value
    return out
