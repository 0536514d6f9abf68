"""Positions of packed sequences: what the kernels need to know about each token, computed from the segment ids.

Tokens of one id form a sequence, wherever they stand; positions count within the sequence. Beside positions the
kernels get, for every query, the range of keys that it may see (and for every key the range of queries that may see
it), from which a tile finds the tiles that it has to visit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _ranks(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token its rank among the tokens of its id; the ids sorted; the tokens in that order. All [b, n]."""
    order = torch.argsort(ids, dim=1, stable=True)
    ordered = torch.gather(ids, 1, order).contiguous()
    start = torch.searchsorted(ordered, ordered)
    rank = torch.arange(ids.shape[1], device=ids.device) - start
    return torch.empty_like(order).scatter_(1, order, rank), ordered, order


def _span(order: Tensor, start: Tensor, lo: Tensor, hi: Tensor, alive: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The tokens at ranks lo..hi of a sequence as a range [first, last) of indices; (size, 0) where there is none."""
    if size == 0:
        return torch.full_like(lo, 0), torch.zeros_like(lo)
    alive = alive & (hi >= lo)
    first = torch.gather(order, 1, (start + lo).clamp(0, size - 1))
    last = torch.gather(order, 1, (start + hi).clamp(0, size - 1)) + 1
    return torch.where(alive, first, size), torch.where(alive, last, 0)


def segment_tables(
    q_segment: Tensor, kv_segment: Tensor, *, bottom_right: bool, left: int | None, right: int | None,
    chunk: int | None,
    sink_tokens: int,
) -> dict[str, Tensor]:  # fmt: skip
    """int32 tensors: per query [b, i] `q_seg q_pos q_first q_last`, per key [b, j] `k_seg k_loc k_first k_last`."""
    # Ids may be any integers: their places in the sorted list of all fit 32 bits, and the shift keeps the sign.
    known = torch.sort(torch.cat([q_segment.long().flatten(), kv_segment.long().flatten()])).values
    shift = torch.searchsorted(known, torch.zeros(1, dtype=torch.long, device=known.device))
    q_ids = (torch.searchsorted(known, q_segment.long().contiguous()) - shift).contiguous()
    k_ids = (torch.searchsorted(known, kv_segment.long().contiguous()) - shift).contiguous()
    N, M = q_ids.shape[1], k_ids.shape[1]
    local_q, sorted_q, order_q = _ranks(q_ids)
    local_k, sorted_k, order_k = _ranks(k_ids)

    def count(ordered: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        begin = torch.searchsorted(ordered, ids)
        return begin, torch.searchsorted(ordered, ids, right=True) - begin

    k_start, k_count = count(sorted_k, q_ids)
    pos = local_q
    if bottom_right:
        pos = pos + k_count - count(sorted_q, q_ids)[1]
    lo, hi = torch.zeros_like(pos), k_count - 1
    if right is not None:
        hi = torch.minimum(hi, pos + right)
    if left is not None and sink_tokens == 0:
        lo = torch.clamp(pos - left, min=0)
    if chunk is not None:
        begin = torch.div(pos, chunk, rounding_mode="floor") * chunk
        lo, hi = torch.maximum(lo, begin), torch.minimum(hi, begin + chunk - 1)
    q_first, q_last = _span(order_k, k_start, lo, hi, q_ids >= 0, M)

    q_start, q_count = count(sorted_q, k_ids)
    shift_k = count(sorted_k, k_ids)[1] - q_count if bottom_right else torch.zeros_like(local_k)
    lo, hi = torch.zeros_like(local_k), q_count - 1
    if right is not None:
        lo = torch.clamp(local_k - right - shift_k, min=0)
    if left is not None:
        hi = torch.where(local_k < sink_tokens, hi, torch.minimum(hi, local_k + left - shift_k))
    if chunk is not None:
        begin = torch.div(local_k, chunk, rounding_mode="floor") * chunk
        lo, hi = torch.maximum(lo, begin - shift_k), torch.minimum(hi, begin + chunk - 1 - shift_k)
    k_first, k_last = _span(order_q, q_start, lo, hi, k_ids >= 0, N)
    tables = {
        "q_seg": q_ids, "q_pos": pos, "q_first": q_first, "q_last": q_last,
        "k_seg": k_ids, "k_loc": local_k, "k_first": k_first, "k_last": k_last,
    }  # fmt: skip
    return {name: value.to(torch.int32).contiguous() for name, value in tables.items()}
