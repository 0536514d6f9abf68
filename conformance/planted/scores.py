"""Logits of a tile and products that are safe against NaN in what is masked out. Used by forward and backward.

Right unless a fault point is switched on.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnspec.conformance.planted.problem import Problem
from attnspec.conformance.planted.visibility import tile_of

Tensor = Any


def logits(p: Problem, rows: Tensor, cols: Tensor, keys: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
    """`(S1, S2)`: capped logits without and with bias, `[B,H,rows,cols]`; `keys` is `[B,H,cols,D]`.

    `step` counts the tiles of this row block that came before.
    """
    faults = p.faults
    cap = p.options["softcap"]
    q = p.q[:, :, rows]
    if faults("head_size_64_hard_coded"):
        q, keys = q[..., :64], keys[..., :64]
    if faults("head_size_rounded_up"):
        q, keys = _rounded_up(q), _rounded_up(keys)
    scale = p.scale
    if faults("scale_compounds_over_tiles"):
        scale = scale * math.log2(math.e) ** step
    dots = q @ keys.transpose(-1, -2)
    if p.io == torch.float16 and faults("logits_overflow_in_fp16"):
        dots = torch.where(dots.abs() > torch.finfo(torch.float16).max, torch.inf * dots.sign(), dots)
    s = dots * scale
    if p.bias is not None and faults("bias_scaled"):
        s = (dots + _bias(p, rows, cols)) * scale
    elif p.bias is not None and faults("softcap_after_bias"):
        s = s + _bias(p, rows, cols)
    capped = s
    if cap is not None and not faults("softcap_ignored"):
        if faults("softcap_before_scale"):
            capped = cap * torch.tanh(dots / cap) * scale
        elif faults("softcap_multiplies_score"):
            capped = s * torch.tanh(s / cap)
        else:
            capped = cap * torch.tanh(s / cap)
    if p.bias is None or faults.names & {"bias_scaled", "softcap_after_bias"}:
        return capped, capped
    bias = _bias(p, rows, cols)
    if faults("bias_lacks_log2e"):
        bias = bias * math.log(2)
    if faults("bias_of_first_head"):
        bias = bias[:, :1]
    return capped, capped + bias


def _bias(p: Problem, rows: Tensor, cols: Tensor) -> Tensor:
    return tile_of(p.bias, rows, cols)


def _rounded_up(x: Tensor) -> Tensor:
    """Columns up to the next power of two, read from where the row after this one lies."""
    size = x.shape[-1]
    more = (1 << (size - 1).bit_length()) - size
    if not more or not x.shape[-2]:
        return torch.cat([x, x.new_zeros((*x.shape[:-1], more))], -1)
    return torch.cat([x, torch.roll(x, -1, -2)[..., :more]], -1)


def weighted(weights: Tensor, taking_part: Tensor, values: Tensor) -> Tensor:
    """`sum_j weights[..., i, j] values[..., j, e]` over the pairs that take part.

    A plain product where the values are finite; a NaN or an infinity in a value that does not take part must not
    leak through 0 * NaN, so there the pairs are summed one by one.
    """
    if bool(torch.isfinite(values).all()):
        return weights @ values
    pairs = weights[..., None] * values[..., None, :, :]
    return torch.where(taking_part[..., None], pairs, 0).sum(-2)
