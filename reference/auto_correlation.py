"""Auto-correlation as its paper computes it: correlations by FFT, the best delays, and rolled value series.

Wu et al. 2021 (arXiv 2106.13008), Section 3.2, Eq. 5-8 (Wiener-Khinchin, time delay aggregation). Delays come shared by
heads and features, for the whole batch (training) or each sample (inference), or for every series of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def auto_correlation(
    Q: Array, K: Array, V: Array, *, mode: str = "inference", factor: float = 1.0, top_k: int | None = None
) -> dict[str, Array]:
    """Outputs by name.

    Args:
        Q: `[b,h,t,d]`. K: `[b,h,s,d]`. V: `[b,h,s,e]`; of K and V the first t steps count, or zeros are appended.
        mode: "inference" (delays per sample), "training" (one set for the batch), "full" (per head and feature; d = e).
        factor: int(factor * log(t)) delays, at least 1 and at most t. top_k: instead of that.

    Returns:
        `O` `[b,h,t,e]` and `corr` `[b,h,d,u]`, u the delay.
    """
    batch, heads, length, features = Q.shape
    K, V = _matched(K, length), _matched(V, length)
    corr = np.zeros((batch, heads, features, length))
    if length:
        spectrum = np.fft.rfft(Q, axis=2) * np.conj(np.fft.rfft(K, axis=2))
        corr = np.fft.irfft(spectrum, n=length, axis=2).transpose(0, 1, 3, 2)
    out = np.zeros(V.shape)
    if length:
        chosen = int(factor * math.log(length)) if top_k is None else top_k
        _aggregate(corr, V, out, mode, min(max(chosen, 1), length))
    return {"O": out, "corr": corr}


def _matched(x: Array, length: int) -> Array:
    """The series cut, or continued with zeros, to `length` steps."""
    found = np.zeros((*x.shape[:2], length, x.shape[3]))
    found[:, :, : x.shape[2]] = x[:, :, :length]
    return found


def _aggregate(corr: Array, V: Array, out: Array, mode: str, count: int) -> None:
    """Adds the rolled values into `out`."""
    if mode == "full":
        for b, h, d in np.ndindex(corr.shape[:3]):
            delays = _best(corr[b, h, d], count)
            for delay, weight in zip(delays, _weights(corr[b, h, d, delays]), strict=True):
                out[b, h, :, d] += weight * np.roll(V[b, h, :, d], -delay)
        return
    scores = corr.mean((1, 2))
    for b in range(len(V)):
        delays = _best(scores.mean(0) if mode == "training" else scores[b], count)
        for delay, weight in zip(delays, _weights(scores[b, delays]), strict=True):
            out[b] += weight * np.roll(V[b], -delay, axis=1)


def _best(scores: Array, count: int) -> list[int]:
    """The delays of the largest scores; of equal ones the shorter."""
    return sorted(range(len(scores)), key=lambda u: (-scores[u], u))[:count]


def _weights(scores: Array) -> Array:
    raised: Array = np.exp(scores - scores.max())
    return np.asarray(raised / raised.sum())
