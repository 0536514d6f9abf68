"""Which query sees which key, tile by tile, and which tiles are visited at all.

`keep` is the rule itself; `key_range` and `needs_mask` are the shortcuts that a tiled kernel takes with it. Used by the
forward and the backward of the planted kernels. Right unless a fault point is switched on.
"""

from __future__ import annotations

from typing import Any

import torch

from attnspec.conformance.planted.problem import Problem

Tensor = Any


def keep(p: Problem, rows: Tensor, cols: Tensor, *, backward: bool = False) -> Tensor:
    """The pairs that take part, bool `[B, H or 1, rows, cols]`; `rows` and `cols` are index tensors."""
    faults, options = p.faults, p.options
    at = p.position[:, None, rows, None]
    key = p.local[:, None, None, cols]
    if faults("tile_base_missing"):
        key = p.local[:, None, None, cols - cols[:1]]
    ok = p.real_q[:, None, rows, None] & p.real_k[:, None, None, cols]
    if faults("padding_mask_on_queries"):
        last = max(0, p.keys - 1)
        on_rows = p.real_k[:, rows.clamp(max=last)] if p.keys else p.real_q[:, rows]
        ok = (p.real_q[:, rows] & on_rows)[:, None, :, None].expand(p.batch, 1, len(rows), len(cols))
    if p.q_segment is not None and not faults("segments_leak"):
        ok = ok & (p.q_segment[:, None, rows, None] == p.kv_segment[:, None, None, cols])
    if _is_causal(p, backward):
        ok = ok & _causal(p, at, key, rows)
    ok = ok & _window(p, at, key, backward)
    chunk = options["chunk"]
    if chunk is not None and not faults("chunk_ignored"):
        if faults("chunk_counts_left_padding"):
            key, at = key + p.pad[:, None, None, None], at + p.pad[:, None, None, None]
        ok = ok & (torch.div(key, chunk, rounding_mode="floor") == torch.div(at, chunk, rounding_mode="floor"))
    if p.mask is not None and not (backward and faults("backward_ignores_mask")):
        ok = ok & _tile(_chosen(p), rows, cols)
    if p.bias is not None:
        ok = ok & (_tile(p.bias, rows, cols) > -torch.inf)
    if backward and p.keys % 16 and len(cols) and int(cols[-1]) == p.keys - 1 and faults("backward_ignores_tail"):
        ok = torch.ones_like(ok)
    return ok.expand(p.batch, -1, len(rows), len(cols))


def _is_causal(p: Problem, backward: bool) -> bool:
    faults = p.faults
    causal = bool(p.options["causal"])
    if faults("causal_flag_ignored"):
        causal = True
    if backward and faults("backward_always_causal"):
        causal = True
    if p.mask is None and p.bias is None and faults("causal_needs_a_mask"):
        causal = False
    if p.queries != p.keys and faults("cross_attention_is_causal"):
        causal = True
    return causal


def _causal(p: Problem, at: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    faults = p.faults
    if faults("causal_strict"):
        return key < at
    if faults("causal_one_future_key"):
        return key <= at + 1
    if faults("causal_per_four_rows"):
        return key <= at - (rows % 4)[None, None, :, None] + 3
    return key <= at


def _window(p: Problem, at: Tensor, key: Tensor, backward: bool) -> Tensor:
    faults, options = p.faults, p.options
    left, right, free = options["window_left"], options["window_right"], options["sink_tokens"]
    ok = torch.ones((), dtype=torch.bool)
    if faults("window_ignored") or (backward and faults("backward_ignores_window")):
        return ok
    if faults("window_arguments_swapped"):
        left, right = right, left
    if p.queries == 1 and faults("window_dropped_at_decode"):
        return ok
    if left == 0 and faults("window_zero_is_off"):
        left = None
    if left is not None and right is None and faults("window_two_sided"):
        right = left
    if left is not None:
        start = at - left
        if faults("window_counts_itself_twice"):
            start = start + 1
        if faults("window_one_key_more"):
            start = start - 1
        ok = ok & ((key >= start) if faults("sink_tokens_ignored") else (key >= start) | (key < free))
    if right is not None:
        ok = ok & ((key < at + right) if right > 0 and faults("window_right_exclusive") else (key <= at + right))
    return ok


def _chosen(p: Problem) -> Tensor:
    """The boolean mask."""
    mask = p.mask
    if p.faults("mask_polarity_flipped"):
        return ~mask
    if p.faults("mask_of_first_batch_entry"):
        return mask[:1]
    if p.faults("mask_of_first_head"):
        return mask[:, :1]
    return mask


def _tile(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The tile of a tensor `[b,h,i,j]` whose axes may have length 1."""
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 and len(cols) != 1 else x[:, :, :, cols]


def tile_of(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """As `_tile`, for bias and dropout."""
    return _tile(x, rows, cols)


def key_range(p: Problem, rows: Tensor, width: int) -> tuple[int, int]:
    """First and last (exclusive) key that these query rows may see, so that a loop over tiles can start and stop."""
    faults = p.faults
    low, high = 0, p.keys
    if p.q_segment is not None or not p.queries or not p.keys:
        return low, high
    reach = p.position[:, rows] + p.pad[:, None]
    if _is_causal(p, False) and not faults("causal_per_four_rows") and not faults("causal_one_future_key"):
        last = int(reach[:, -1].max()) + 1
        if faults("causal_loop_ends_at_first_row"):
            last = int(reach[:, 0].max()) + 1
        if faults("causal_loop_end_floored"):
            last = last // width * width
        if faults("causal_loop_end_lacks_offset"):
            last = int(rows[-1]) + 1
        high = max(0, min(high, last))
    left = p.options["window_left"]
    if left is not None and p.options["sink_tokens"] == 0 and not _window_faults(p):
        low = max(0, int(reach[:, 0].min()) - left) // width * width
        if faults("window_loop_starts_late"):
            low += width
    return low, high


def _window_faults(p: Problem) -> bool:
    """Faults of the window rule itself must not be hidden by the loop's start."""
    return bool(p.faults.names & {"window_ignored", "window_dropped_at_decode", "window_zero_is_off",
                                  "window_arguments_swapped", "window_one_key_more"})  # fmt: skip


def needs_mask(p: Problem, rows: Tensor, first: int, last: int) -> bool:
    """Whether a tile of the keys `first <= j < last` holds a pair that does not take part."""
    plain = all(x is None for x in (p.mask, p.bias, p.q_segment)) and bool(p.real_q.all() and p.real_k.all())
    o = p.options
    if not plain or o["window_left"] is not None or o["window_right"] is not None or o["chunk"] is not None:
        return True
    if not _is_causal(p, False):
        return False
    reach = int((p.position[:, rows[0]] + p.pad).min()) + 1
    if p.faults("straddling_tile_unmasked"):
        return first >= reach
    return last > reach or bool(p.faults.names)
