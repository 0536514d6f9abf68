"""The hand-written backward pass of the planted kernels, tile by tile, with the weights recomputed from LSE.

Gradients of Q, K, V, bias and sink for cotangents of O and LSE, as in FlashAttention (arXiv 2205.14135, Algorithm 4)
with the terms for softcap, dropout, sink and the cotangent of LSE. Right unless a fault point is switched on.
"""

from __future__ import annotations

from typing import Any

import torch

from attnspec.conformance.planted.problem import Problem
from attnspec.conformance.planted.scores import logits, weighted
from attnspec.conformance.planted.visibility import keep, tile_of

Tensor = Any


def backward(p: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor, block: tuple[int, int],
             undropped: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients by input name, in the compute dtype.

    Args:
        out, lse: what the forward returned, `[B,H,N,E]` and `[B,H,N]`.
        d_out, d_lse: their cotangents.
        undropped: the output without dropout, which only a fault point asks for.
    """
    faults = p.faults
    heads = p.head_map()
    if faults("upstream_gradient_ignored"):
        d_out = torch.ones_like(d_out)
    source = undropped if undropped is not None and faults("delta_without_dropout") else out
    delta = (d_out * source).sum(-1)
    if faults("delta_per_value_tile") and p.v.shape[-1] > 4:
        delta = 2 * delta  # each of two tiles of value columns subtracts it
    shift = delta if faults("lse_gradient_ignored") else delta - d_lse
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    k, v = p.k[:, heads], p.v[:, heads]
    dq = torch.zeros_like(p.q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    if faults("gradients_not_zeroed"):
        dk, dv = _unseen(p, dk), _unseen(p, dv)
    d_bias = None if p.bias is None else p.q.new_zeros((p.batch, p.heads, p.queries, p.keys))
    for top in range(0, p.queries, block[0]):
        rows = torch.arange(top, min(top + block[0], p.queries))
        for first in range(0, p.keys, block[1]):
            cols = torch.arange(first, min(first + block[1], p.keys))
            ok = keep(p, rows, cols, backward=True).expand(p.batch, p.heads, -1, -1)
            capped, s = logits(p, rows, cols, k[:, :, cols])
            at = rows
            if faults("lse_of_the_key_block"):
                at = (first + torch.arange(len(rows))).clamp(max=p.queries - 1)
            weights = torch.where(ok, torch.exp(s - lse[:, :, at, None]), 0.0)
            dropped, dp = _dropout(p, weights, rows, cols, d_out[:, :, rows] @ v[:, :, cols].transpose(-1, -2))
            ds = torch.where(ok, weights * (dp - shift[:, :, rows, None]), 0.0)
            if d_bias is not None:
                d_bias[:, :, top : top + len(rows), first : first + len(cols)] = ds
            ds = torch.where(ok, ds * _softcap(p, capped), 0.0)
            dq[:, :, rows] += weighted(ds, ok, k[:, :, cols])
            turned, ok_turned = ds.transpose(-1, -2), ok.transpose(-1, -2)
            dk[:, :, cols] += weighted(turned, ok_turned, p.q[:, :, rows])
            dv[:, :, cols] += weighted(dropped.transpose(-1, -2), ok_turned, d_out[:, :, rows])
    q_scale = 1.0 if faults("dq_lacks_scale") else p.scale
    k_scale = 1.0 if faults("dk_lacks_scale") else p.scale
    if faults("dq_scaled_twice"):
        q_scale = p.scale**2
    grads = {"Q": dq * q_scale, "K": _grouped(p, dk * k_scale, "dk"), "V": _grouped(p, dv, "dv")}
    if d_bias is not None:
        grads["bias"] = _bias(p, d_bias)
    if p.sink is not None:
        grads["sink"] = _sink(p, lse, shift)
    return grads


def _dropout(p: Problem, weights: Tensor, rows: Tensor, cols: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
    if p.dropout_mask is None:
        return weights, dp
    kept = tile_of(p.dropout_mask, rows, cols)
    rate = p.options["dropout_p"]
    if p.faults("backward_ignores_dropout"):
        return weights, dp
    return torch.where(kept, weights / (1 - rate), 0.0), torch.where(kept, dp / (1 - rate), 0.0)


def _softcap(p: Problem, capped: Tensor) -> Tensor:
    cap = p.options["softcap"]
    if cap is None or p.faults("softcap_derivative_missing"):
        return torch.ones_like(capped)
    if p.faults("softcap_derivative_not_squared"):
        return 1 - capped / cap
    return 1 - (capped / cap) ** 2


def _grouped(p: Problem, full: Tensor, what: str) -> Tensor:
    """Sum over the query heads of each key/value head."""
    kv_heads = int(p.k.shape[1])
    grouped = full.reshape(p.batch, kv_heads, p.heads // kv_heads, *full.shape[2:])
    if what == "dk" and p.faults("dk_keeps_last_of_group"):
        return grouped[:, :, -1]
    if what == "dv" and p.faults("dv_averaged_over_group"):
        return grouped.mean(2)
    return grouped.sum(2)


def _bias(p: Problem, full: Tensor) -> Tensor:
    """Sum over the axes along which the bias was broadcast."""
    if p.faults("bias_gradient_detached"):
        return torch.zeros_like(p.bias)
    for axis in range(4):
        if p.bias.shape[axis] == 1 and full.shape[axis] != 1:
            first = axis == 0 and p.faults("bias_gradient_of_first_batch")
            full = full[:1] if first else full.sum(axis, keepdim=True)
    return full


def _sink(p: Problem, lse: Tensor, shift: Tensor) -> Tensor:
    s = p.sink[None, :, None]
    share = torch.where(s > -torch.inf, torch.exp(s - lse), 0.0)
    if p.faults("sink_gradient_without_normalizer"):
        without = torch.log((torch.exp(lse) - torch.exp(s)).clamp(min=1e-30))
        share = torch.where(s > -torch.inf, torch.exp(s - without), 0.0)
    terms = -(share * shift)
    if p.faults("sink_gradient_of_first_batch"):
        terms = terms[:1]
    return terms.sum((0, 2))


def _unseen(p: Problem, grad: Tensor) -> Tensor:
    """What is left in the gradient of a tile of keys that no query sees, where nobody clears it: NaN."""
    rows, cols = torch.arange(p.queries), torch.arange(p.keys)
    seen = keep(p, rows, cols, backward=True).any(1).any(1) if p.queries and p.keys else torch.zeros(0, p.keys)
    if not seen.numel():
        return grad
    return torch.where(seen.bool()[:, None, :, None], grad, torch.nan)
