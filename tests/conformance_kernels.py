"""Softmax attention in plain NumPy for the tests of the suite: honest, or with one named fault.

Independent of the specification's equations: it loops over heads and tiles as a kernel would. `outputs` calls it on a
case's data in float64 and rounds the result to the case's dtype (and the weights, as fused kernels do).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.types import Case, CaseData
from attnspec.spec.language.formats import round_to

Array = np.ndarray[Any, Any]

TAKES = frozenset(
    {"Q", "K", "V", "bias", "mask", "causal", "causal_alignment", "window_left", "window_right", "softcap", "scale"}
)
FAULTS = (
    "causal_strict", "causal_leak", "top_left", "drops_last_key", "drops_tail", "scale_1_percent", "ln2_slip",
    "one_element_zero", "last_row_zero", "heads_strided", "no_maximum", "no_rescale", "softcap_after_mask",
    "scaled_bias", "lse_base_2", "window_one_more", "window_one_less", "ignores_scale", "nan_for_empty",
    "first_batch_only", "mask_inverted", "batch_mixed", "bias_of_head_0",
)  # fmt: skip


def attention(
    Q: Array, K: Array, V: Array, *, bias: Array | None = None, mask: Array | None = None, causal: bool = False,
    causal_alignment: str = "bottom_right", window_left: int | None = None, window_right: int | None = None,
    softcap: float | None = None, scale: float | None = None, dtype: str = "fp64", tile: int = 16, fault: str = "",
) -> dict[str, Array]:  # fmt: skip
    """O `[b,h,i,e]` and LSE `[b,h,i]`, tile by tile with a running maximum."""
    B, H, N, D = Q.shape
    Hk, M = K.shape[1], K.shape[2]
    factor = D**-0.5 if scale is None or fault == "ignores_scale" else scale
    factor *= {"scale_1_percent": 1.01, "ln2_slip": np.log(2.0)}.get(fault, 1.0)
    keep = np.ones((B, H, N, M), dtype=bool)
    i, j = np.arange(N)[:, None], np.arange(M)[None, :]
    top = causal_alignment == "top_left" or fault == "top_left"
    place = i if top else i + M - N
    if causal:
        keep &= j <= place + {"causal_strict": -1, "causal_leak": 1}.get(fault, 0)
    wide = {"window_one_more": 1, "window_one_less": -1}.get(fault, 0)
    if window_left is not None:
        keep &= j >= place - window_left - wide
    if window_right is not None:
        keep &= j <= place + window_right
    if mask is not None:
        keep &= ~mask if fault == "mask_inverted" else mask
    heads = np.arange(H) % Hk if fault == "heads_strided" else np.arange(H) // (H // Hk)
    batch = np.zeros(B, dtype=int) if fault == "first_batch_only" else np.arange(B)
    k, v = K[batch][:, heads], V[np.roll(batch, 1) if fault == "batch_mixed" else batch][:, heads]
    if bias is not None:
        bias = np.broadcast_to(bias[:, :1] if fault == "bias_of_head_0" else bias, keep.shape)
    end = M - 1 if fault == "drops_last_key" and M > 1 else M
    end = M // tile * tile if fault == "drops_tail" and tile < M else end
    out, lse = _tiled(Q, k[:, :, :end], v[:, :, :end], keep, bias, factor, softcap, dtype, tile, fault)
    if fault == "one_element_zero" and out.size:
        out.reshape(-1)[out.size // 2] = 0.0
    if fault == "last_row_zero" and out.size:
        out[-1, -1, -1] = 0.0
    if fault == "lse_base_2":
        lse = lse / np.log(2.0)
    if fault == "nan_for_empty":
        out[~keep.any(axis=-1)] = np.nan
    return {"O": round_to(out, dtype), "LSE": round_to(lse, "fp64" if dtype == "fp64" else "fp32")}


def _tiled(
    q: Array, k: Array, v: Array, keep: Array, bias: Array | None, factor: float, softcap: float | None, dtype: str,
    tile: int, fault: str,
) -> tuple[Array, Array]:  # fmt: skip
    top = np.full(q.shape[:3], -np.inf)
    total, acc = np.zeros(q.shape[:3]), np.zeros((*q.shape[:3], v.shape[-1]))
    single = "fp64" if dtype == "fp64" else "fp32"
    with np.errstate(all="ignore"):
        for start in range(0, k.shape[2], tile):
            cut = slice(start, min(start + tile, k.shape[2]))
            s = round_to(factor * (q @ np.swapaxes(k[:, :, cut], -1, -2)), single)
            if softcap is not None and fault != "softcap_after_mask":
                s = softcap * np.tanh(s / softcap)
            if bias is not None:
                s = s + (factor if fault == "scaled_bias" else 1.0) * bias[..., cut]
            s = np.where(keep[..., cut], s, -np.inf)
            if softcap is not None and fault == "softcap_after_mask":
                s = softcap * np.tanh(s / softcap)
            new = np.maximum(top, s.max(axis=-1, initial=-np.inf))
            safe = np.where(np.isfinite(new), new, 0.0)
            if fault == "no_maximum":
                safe = np.zeros_like(safe)
                s = np.where(s > 88.7, np.inf, s)
            p = np.exp(s - safe[..., None])
            shrink = np.ones_like(safe) if fault == "no_maximum" else np.exp(top - safe)
            total = total * shrink + p.sum(axis=-1)
            acc = (acc if fault == "no_rescale" else acc * shrink[..., None]) + _product(
                round_to(p, dtype), v[:, :, cut]
            )
            top = new
        out = np.where(total[..., None] > 0, acc / total[..., None], 0.0)
        base = np.zeros_like(top) if fault == "no_maximum" else np.where(np.isfinite(top), top, 0.0)
        return out, np.where(total > 0, base + np.log(total), -np.inf)


def _product(weights: Array, v: Array) -> Array:
    """weights @ v, where a weight of 0 removes whatever it meets."""
    if np.isfinite(v).all():
        return np.asarray(weights @ v)
    kept = np.where(weights[..., None] > 0, weights[..., None] * v[:, :, None], 0.0)
    return np.asarray(kept.sum(axis=-2))


def outputs(case: Case, data: CaseData, fault: str = "", tile: int = 16) -> dict[str, Any]:
    """The kernel on a case's data."""
    return dict(attention(**data.inputs, **data.options, dtype=case.dtype, tile=tile, fault=fault))
