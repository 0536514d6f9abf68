"""Flash-Decoding as its kernels work: each split of the keys by itself, then a merge of the partial results.

Dao, Haziza, Massa, Sizov 2023 ("Flash-Decoding for long-context inference"), with the running softmax of Milakov and
Gimelshein 2018 (arXiv 1805.02867) inside a split and the merge by logarithms of sums between splits. The query heads
of a key/value head and their queries are stacked into one block of rows. Nothing is masked: a split lists the slots
that it owns, pages are walked, and slots that no row may see are not read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def flash_decoding_split_kv(
    Q: Array, K: Array | None = None, V: Array | None = None, kv_length: Array | None = None,
    cuts: Array | None = None, sink: Array | None = None, k_pages: Array | None = None, v_pages: Array | None = None,
    block_table: Array | None = None, *, splits: int = 1, causal: bool = False, window_left: int | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Merged outputs, and those of every split.

    Args:
        Q: `[b,h,i,d]`; K: `[b,g,j,d]`; V: `[b,g,j,e]`.
        k_pages: `[p,o,g,d]`; v_pages: `[p,o,g,e]`; block_table: `[b,k]`, page of each run of slots: instead of K, V.
        kv_length: `[b]`, slots in use. cuts: `[b,x]`, further first slots of splits. sink: `[h]`, a logit.
        splits: even splits of all slots. causal, window_left: visible keys, the queries being the last tokens.
        softcap, scale: of the logits.

    Returns:
        `O` `[b,h,i,e]`, `LSE` `[b,h,i]`, `Op` `[b,u,h,i,e]` and `Lp` `[b,u,h,i]` with u over the splits.
    """
    batch, heads, queries, width = Q.shape
    if block_table is not None:
        assert k_pages is not None and v_pages is not None
        page, key_heads, features = k_pages.shape[1], k_pages.shape[2], v_pages.shape[3]
        slots = block_table.shape[1] * page
    else:
        assert K is not None and V is not None
        key_heads, slots, features = K.shape[1], K.shape[2], V.shape[3]
    factor = 1.0 / math.sqrt(width) if scale is None else scale
    group, extra = heads // key_heads, 0 if cuts is None else cuts.shape[1]
    count = splits + extra
    Op, Lp = np.zeros((batch, count, heads, queries, features)), np.full((batch, count, heads, queries), -np.inf)
    out, total = np.zeros((batch, heads, queries, features)), np.full((batch, heads, queries), -np.inf)
    for b in range(batch):
        length = slots if kv_length is None else int(kv_length[b])
        owned = _owned(slots, length, splits, [] if cuts is None else sorted(int(cut) for cut in cuts[b]))
        for g in range(key_heads):
            rows = [(h, i) for h in range(g * group, (g + 1) * group) for i in range(queries)]
            for u, slots_here in enumerate(owned):
                for h, i in rows:
                    at = i + length - queries
                    running = _Running(features)
                    for j in slots_here:
                        if (causal and j > at) or (window_left is not None and j < at - window_left):
                            continue
                        if block_table is not None:
                            assert k_pages is not None and v_pages is not None
                            entry, offset = block_table[b, j // page], j % page
                            key, value = k_pages[entry, offset, g], v_pages[entry, offset, g]
                        else:
                            assert K is not None and V is not None
                            key, value = K[b, g, j], V[b, g, j]
                        logit = factor * float(Q[b, h, i] @ key)
                        running.add(logit if softcap is None else softcap * math.tanh(logit / softcap), value)
                    Op[b, u, h, i], Lp[b, u, h, i] = running.result()
            for h, i in rows:
                own = None if sink is None else float(sink[h])
                out[b, h, i], total[b, h, i] = _merged(Op[b, :, h, i], Lp[b, :, h, i], own)
    return {"O": out, "LSE": total, "Op": Op, "Lp": Lp}


class _Running:
    """Running maximum, sum of exponentials and unnormalised output of one row in one split."""

    def __init__(self, features: int) -> None:
        self.largest, self.sum, self.out = -math.inf, 0.0, np.zeros(features)

    def add(self, logit: float, value: Array) -> None:
        larger = max(self.largest, logit)
        if larger == -math.inf:
            return
        shrink, weight = math.exp(self.largest - larger), math.exp(logit - larger)
        self.largest, self.sum, self.out = larger, shrink * self.sum + weight, shrink * self.out + weight * value

    def result(self) -> tuple[Array, float]:
        """Normalised output and logarithm of the sum."""
        if self.sum == 0.0:
            return self.out, -math.inf
        return self.out / self.sum, self.largest + math.log(self.sum)


def _owned(slots: int, length: int, splits: int, cuts: list[int]) -> list[list[int]]:
    """The slots in use that each split owns: a slot's split is its even part's number plus the cuts up to it."""
    part = max(1, -(-slots // splits))
    owned: list[list[int]] = [[] for _ in range(splits + len(cuts))]
    passed = 0
    for j in range(length):
        while passed < len(cuts) and cuts[passed] <= j:
            passed += 1
        owned[j // part + passed].append(j)
    return owned


def _merged(outputs: Array, logs: Array, sink: float | None) -> tuple[Array, float]:
    """All splits of a row together; the sink joins the sum here, once."""
    largest = max([*logs.tolist(), -math.inf if sink is None else sink])
    if largest == -math.inf:
        return np.zeros(outputs.shape[1]), -math.inf
    weights = np.exp(logs - largest)
    denominator = float(np.sum(weights)) + (0.0 if sink is None else math.exp(sink - largest))
    return weights @ outputs / denominator, largest + math.log(denominator)
