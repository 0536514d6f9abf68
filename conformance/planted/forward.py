"""The forward pass of the planted kernels: the whole matrix (`plain`) and the online softmax over tiles (`tiled`).

Both return O `[B,H,N,E]` and the natural-logarithm LSE `[B,H,N]` in the compute dtype. Right unless a fault point is
switched on.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnspec.conformance.planted.problem import Problem
from attnspec.conformance.planted.scores import logits, weighted
from attnspec.conformance.planted.visibility import keep, key_range, needs_mask, tile_of

Tensor = Any


def plain(p: Problem) -> tuple[Tensor, Tensor]:
    """Two passes over the whole score matrix, with the max subtracted."""
    faults = p.faults
    rows, cols = torch.arange(p.queries), torch.arange(p.keys)
    shape = (p.batch, p.heads, p.queries)
    if not p.keys:
        return _finish(p, p.q.new_full(shape, -torch.inf), p.q.new_zeros(shape),
                       p.q.new_zeros((*shape, p.v.shape[-1])))
    heads = p.head_map()
    k, v = p.k[:, heads], p.v[:, heads]
    ok = keep(p, rows, cols).expand(p.batch, p.heads, -1, -1)
    s = _masked(p, logits(p, rows, cols, k), ok, rows, cols)
    axis = -2 if p.queries and faults("softmax_over_queries") else -1
    m = s.amax(axis, keepdim=True)
    if faults("no_max_subtraction"):
        m = torch.zeros_like(m)
    safe = m if faults("empty_row_is_nan") else torch.where(m == -torch.inf, 0.0, m)
    weights = torch.exp(s - safe)
    total = weights.sum(axis, keepdim=True)
    if axis == -2:
        return weighted(_dropped(p, weights / total, rows, cols), ok, v), s.logsumexp(-1)
    if faults("dropout_before_normalizer") and p.dropout_mask is not None:
        weights = weights * tile_of(p.dropout_mask, rows, cols)
        total = weights.sum(axis, keepdim=True)
    elif p.dropout_mask is not None:
        weights = _dropped(p, weights, rows, cols)
    return _finish(p, safe[..., 0] if faults("no_max_subtraction") else m[..., 0], total[..., 0],
                   weighted(weights, ok | faults("mask_added_as_number"), v))


def tiled(p: Problem, block: tuple[int, int], splits: int) -> tuple[Tensor, Tensor]:
    """Tiles of `block` = (queries, keys); the keys in `splits` parts that are merged by their LSE."""
    out, lse = [], []
    for start in range(0, p.queries, block[0]):
        rows = torch.arange(start, min(start + block[0], p.queries))
        low, high = key_range(p, rows, block[1])
        tiles = list(range(low, high, block[1]))
        if p.faults("tail_tile_dropped"):
            tiles = [t for t in tiles if t + block[1] <= p.keys]
        size = math.ceil(len(tiles) / splits) if tiles else 1
        parts = [_sweep(p, rows, tiles[n * size : (n + 1) * size], block[1]) for n in range(splits)]
        o, norm = _finish(p, *parts[0]) if splits == 1 else _merge(p, parts)
        out.append(o)
        lse.append(norm)
    if not out:
        return p.q.new_zeros((p.batch, p.heads, 0, p.v.shape[-1])), p.q.new_zeros((p.batch, p.heads, 0))
    if splits > 1 and p.faults("lse_not_stored_when_split"):
        lse = [torch.zeros_like(part) for part in lse]
    return torch.cat(out, 2), torch.cat(lse, 2)


def _sweep(p: Problem, rows: Tensor, tiles: list[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Running max, sum and accumulator over these tiles, `[B,H,rows]` and `[B,H,rows,E]`."""
    faults = p.faults
    heads = p.head_map()
    shape = (p.batch, p.heads, len(rows))
    m, norm = p.q.new_full(shape, -torch.inf), p.q.new_zeros(shape)
    acc = p.q.new_zeros((*shape, p.v.shape[-1]))
    if faults("finite_mask_in_tiles"):
        m = torch.full_like(m, -1e6)
    for step, first in enumerate(tiles):
        last = min(first + width, p.keys)
        cols = torch.arange(first, last)
        if faults("tail_index_clamped"):
            cols = torch.arange(first, first + width).clamp(max=p.keys - 1)
        k, v = p.k[:, :, cols][:, heads], p.v[:, :, cols][:, heads]
        if step > 1 and faults("stale_tile"):
            half = torch.arange(width // 2, len(cols)) if len(cols) > width // 2 else torch.arange(0)
            k[:, :, half] = p.k[:, :, cols[half] - width][:, heads]
        if needs_mask(p, rows, first, last):
            ok = keep(p, rows, cols).expand(p.batch, p.heads, -1, -1)
        else:
            ok = torch.ones((p.batch, p.heads, len(rows), len(cols)), dtype=torch.bool)
        s = _masked(p, logits(p, rows, cols, k, step), ok, rows, cols)
        new = torch.maximum(m, s.amax(-1))
        safe = new if faults("empty_tile_is_nan") else torch.where(new == -torch.inf, 0.0, new)
        alpha = torch.exp(m - safe)
        weights = torch.exp(s - safe[..., None])
        total = weights.sum(-1)
        if faults("neighbour_row_in_sum"):
            total = (total + torch.roll(total, 1, -1)) / 2
        weights = _dropped(p, weights, rows, cols)
        norm = total if faults("sum_reset_each_tile") else norm * (1 if faults("sum_not_rescaled") else alpha) + total
        acc = acc * (1 if faults("accumulator_not_rescaled") else alpha[..., None]) + weighted(weights, ok, v)
        if faults("accumulates_in_half") and p.io != torch.float32:
            acc, norm = acc.to(p.io).to(acc.dtype), norm.to(p.io).to(norm.dtype)
        m = new
    return m, norm, acc


def _masked(p: Problem, scores: tuple[Tensor, Tensor], ok: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Logits with -inf where a pair takes no part."""
    faults = p.faults
    s = scores[1]
    if faults("mask_is_minus_1e4"):
        return torch.where(ok, s, -1e4)
    if faults("finite_mask_in_tiles"):
        return torch.where(ok, s, -1e6)
    if faults("masks_add_up_to_minus_infinity"):
        # One plane of finfo.min for the mask and one for the causal rule, summed in the input's dtype.
        low = float(torch.finfo(p.io).min)
        return torch.where(ok, s, -torch.inf if p.mask is not None and p.options["causal"] else low)
    if faults("mask_added_as_number") and p.mask is not None:
        return s + tile_of(p.mask, rows, cols).to(s.dtype)
    if faults("softcap_after_mask") and p.options["softcap"] is not None:
        return torch.where(ok, s, -float(p.options["softcap"]))
    return torch.where(ok, s, -torch.inf)


def _dropped(p: Problem, weights: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    if p.dropout_mask is None or p.faults("dropout_ignored"):
        return weights
    if p.faults("dropout_before_normalizer"):
        return weights * tile_of(p.dropout_mask, rows, cols)
    return weights * tile_of(p.dropout_mask, rows, cols) / (1 - p.options["dropout_p"])


def _finish(p: Problem, m: Tensor, norm: Tensor, acc: Tensor, sink: bool = True) -> tuple[Tensor, Tensor]:
    """Divide by the sum, the sink joining it; an empty row gives zeros and -inf."""
    faults = p.faults
    if sink and p.sink is not None and not faults("sink_ignored"):
        s = p.sink[None, :, None].expand(m.shape)
        if faults("sink_not_exponentiated"):
            norm = norm + s
        elif faults("sink_outside_max"):
            norm = norm + torch.exp(s - torch.where(m == -torch.inf, 0.0, m))
        else:
            new = torch.maximum(m, s)
            safe = torch.where(new == -torch.inf, 0.0, new)
            alpha = torch.exp(m - safe)
            m, norm, acc = new, norm * alpha + torch.exp(s - safe), acc * alpha[..., None]
    safe = torch.where(m == -torch.inf, 0.0, m)
    divisor = norm if faults("empty_row_is_nan") else torch.where(norm == 0, 1.0, norm)
    out = acc / divisor[..., None]
    lse = safe + torch.log(norm)
    if faults("lse_is_base_2"):
        lse = lse / math.log(2)
    return out, lse


def _merge(p: Problem, parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge the parts of the keys by their LSE; the sink joins once, as one more part without a value."""
    faults = p.faults
    per_part = faults("sink_in_every_split")
    done = [_finish(p, *part, sink=per_part) for part in parts]
    out, lse = torch.stack([o for o, _ in done]), torch.stack([norm for _, norm in done])
    if faults("split_outputs_averaged"):
        return out.mean(0), torch.logsumexp(lse, 0)
    if faults("split_keeps_the_last"):
        return out[-1], torch.logsumexp(lse, 0)
    if faults("empty_split_counts"):
        lse = torch.where(lse == -torch.inf, 0.0, lse)
    m = lse.amax(0)
    if p.sink is not None and not per_part:
        m = torch.maximum(m, p.sink[None, :, None])
    safe = torch.where(m == -torch.inf, 0.0, m)
    if faults("merge_lacks_max"):
        safe = torch.zeros_like(m)
    weights = torch.exp(lse - safe)
    total = weights.sum(0)
    if p.sink is not None and not per_part:
        total = total + torch.exp(p.sink[None, :, None] - safe)
    divisor = torch.where(total == 0, 1.0, total)
    return (out * (weights / divisor)[..., None]).sum(0), safe + torch.log(total)
