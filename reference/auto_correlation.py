"""Auto-correlation as its paper computes it: correlations by FFT, the best delays, and rolled value series.

Wu et al. 2021 (arXiv 2106.13008), Section 3.2: period-based dependencies, time delay aggregation, and the correlation
by the Wiener-Khinchin theorem. Delays are common to heads and features, for the whole batch (training) or each sample
(inference), or every series has its own (full).
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
    """The output by name.

    Args:
        Q: `[b,h,t,d]`. K, V: `[b,h,s,d]`; their first t steps count, or zeros are appended.
        mode: "inference" (delays per sample), "training" (one set for the batch), "full" (per head and feature).
        factor: floor(factor * log(t)) delays, at least 1 and at most t. top_k: instead of that.

    Returns:
        `O` `[b,h,t,d]`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("inference", "training", "full"):
        raise ValueError(f"mode is {mode!r}, expected 'inference', 'training' or 'full'")
    length = Q.shape[2]
    K, V = _matched(K, length), _matched(V, length)
    spectrum = np.fft.rfft(Q, axis=2) * np.conj(np.fft.rfft(K, axis=2))
    corr = np.fft.irfft(spectrum, n=length, axis=2).transpose(0, 1, 3, 2)
    chosen = math.floor(factor * math.log(length)) if top_k is None else top_k
    count = min(max(chosen, 1), length)
    out = np.zeros(V.shape)
    if mode == "full":
        for b, h, d in np.ndindex(corr.shape[:3]):
            delays = _best(corr[b, h, d], count)
            for delay, weight in zip(delays, _weights(corr[b, h, d, delays]), strict=True):
                out[b, h, :, d] += weight * np.roll(V[b, h, :, d], -delay)
        return {"O": out}
    scores = corr.mean((1, 2))
    for b in range(len(V)):
        delays = _best(scores.mean(0) if mode == "training" else scores[b], count)
        for delay, weight in zip(delays, _weights(scores[b, delays]), strict=True):
            out[b] += weight * np.roll(V[b], -delay, axis=1)
    return {"O": out}


def _matched(x: Array, length: int) -> Array:
    """The series cut, or continued with zeros, to `length` steps."""
    found = np.zeros((*x.shape[:2], length, x.shape[3]))
    found[:, :, : x.shape[2]] = x[:, :, :length]
    return found


def _best(scores: Array, count: int) -> list[int]:
    """The delays of the largest scores; of equal ones the shorter."""
    return sorted(range(len(scores)), key=lambda delay: (-float(scores[delay]), delay))[:count]


def _weights(scores: Array) -> Array:
    raised = np.exp(scores - scores.max())
    return np.asarray(raised / raised.sum())
