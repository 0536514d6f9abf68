"""Multi-head latent attention as it decodes: keys and values are never formed, queries move into the latent space.

DeepSeek-AI 2024 (arXiv 2405.04434), equations 9-19, in the absorbed form of section 2.1.2: the up-projection of the
keys goes into the query, that of the values into the output, and what remains is attention with one key/value head
whose keys are `[latent; rotary key]` and whose values are the latents. The cache is read token by token, with a
running maximum and sum; tokens that a query may not see are not read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EPS = 1e-6
"""Added to the mean square under the root of the latents' norm."""


def mla(
    Qn: Array, Qr: Array, C: Array, Kr: Array, Wuk: Array, Wuv: Array, norm_weight: Array | None = None,
    freq: Array | None = None, mask: Array | None = None, kv_length: Array | None = None, *, causal: bool = False,
    scale: float | None = None, yarn_factor: float | None = None, yarn_mscale: float = 1.0,
) -> dict[str, Array]:  # fmt: skip
    """Outputs of the heads, before the output projection, and the logarithms of their rows' sums.

    Args:
        Qn: `[b,h,i,d]`, Qr: `[b,h,i,u]`: queries without and with rotation. C: `[b,j,r]`, latents.
        Kr: `[b,j,u]`, rotary keys of all heads. Wuk: `[h,d,r]`, Wuv: `[h,e,r]`.
        norm_weight: `[r]`, the latents pass a root-mean-square norm with this weight first.
        freq: `[u/2]`, the rotary parts are rotated here, pair by pair.
        mask: `[b,h,i,j]`, axes b, h, i perhaps of length 1.
        kv_length: `[b]`, cached tokens. causal: the queries are the last tokens and see no later ones.
        scale: of the scores, `(d + u) ** -0.5` by default. yarn_factor, yarn_mscale: factor of the scores under YaRN.

    Returns:
        `O` `[b,h,i,e]` and `LSE` `[b,h,i]`.
    """
    batch, heads, queries, width = Qn.shape
    factor = 1.0 / math.sqrt(width + Qr.shape[-1]) if scale is None else scale
    if yarn_factor is not None:
        factor *= (0.1 * yarn_mscale * math.log(yarn_factor) + 1.0) ** 2
    out, logs = np.zeros((batch, heads, queries, Wuv.shape[1])), np.zeros((batch, heads, queries))
    for b in range(batch):
        length = C.shape[1] if kv_length is None else int(kv_length[b])
        cache = [_cached(C[b, j], Kr[b, j], j, norm_weight, freq) for j in range(length)]
        for h, i in np.ndindex(heads, queries):
            at = i + length - queries
            query = np.concatenate([Qn[b, h, i] @ Wuk[h], _rotated(Qr[b, h, i], at, freq)])
            largest, total, latent = -math.inf, 0.0, np.zeros(C.shape[-1])
            for j, key in enumerate(cache):
                if (causal and j > at) or (mask is not None and not _element(mask, b, h, i, j)):
                    continue
                score = factor * float(query @ key)
                larger = max(largest, score)
                shrink, weight = math.exp(largest - larger), math.exp(score - larger)
                largest, total = larger, shrink * total + weight
                latent = shrink * latent + weight * key[: C.shape[-1]]
            if total:
                out[b, h, i] = Wuv[h] @ (latent / total)
            logs[b, h, i] = largest + math.log(total) if total else -math.inf
    return {"O": out, "LSE": logs}


def _cached(latent: Array, rotary: Array, at: int, weight: Array | None, freq: Array | None) -> Array:
    """What the cache holds of a token: the normalised latent and the rotated key. `[r+u]`"""
    if weight is not None:
        latent = latent / math.sqrt(float(np.mean(latent * latent)) + EPS) * weight
    return np.concatenate([latent, _rotated(rotary, at, freq)])


def _rotated(x: Array, at: int, freq: Array | None) -> Array:
    """Neighbouring features as real and imaginary part, turned by position times frequency."""
    if freq is None:
        return x
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * at * freq)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _element(mask: Array, b: int, h: int, i: int, j: int) -> bool:
    """An element of a mask some of whose axes may have length 1."""
    return bool(mask[tuple(0 if length == 1 else at for at, length in zip((b, h, i, j), mask.shape, strict=True))])
