"""Softplus attention row by row: a running sum of softplus weights, then, if wanted, the re-weighting pass.

Gao and Spratling 2025 (arXiv 2501.13428), Section 3 (length-scaled softplus attention, LSSA) and Section 4 (re-weighting,
LSSAR). The first pass over a row's keys finds the sum of the softplus weights; the second one sharpens them. Powers
are taken relative to the row's largest, which a ratio does not notice and which keeps x**15 from underflowing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """The options of a call."""

    causal: bool
    reweight: bool
    p: float
    offset_rows: int
    eps: float
    normalize_qk: bool


def lssa_softplus_attention(
    Q: Array, K: Array, V: Array, mask: Array | None = None, *, causal: bool = True, reweight: bool = True,
    p: float = 15.0, offset_rows: int = 3, eps: float = 0.0, normalize_qk: bool = True,
) -> dict[str, Array]:  # fmt: skip
    """Outputs by name; a row without keys, or whose re-weighted weights all vanish, is zero.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. mask: `[b,j]`, True = a token, False = padding.
        reweight: LSSAR instead of LSSA. p: power. offset_rows: so many first rows subtract 0 instead of 1.
        eps: added to the sum of the re-weighted weights. normalize_qk: cosines instead of dot products / sqrt(D).

    Returns:
        `O` `[b,h,i,e]`, and the weights `A` `[b,h,i,j]` that made it.
    """
    settings = Settings(causal, reweight, p, offset_rows, eps, normalize_qk)
    weights = np.zeros((*Q.shape[:3], K.shape[2]))
    for b, h, i in np.ndindex(*Q.shape[:3]):
        seen = _seen(mask, settings, b, i, K.shape[2])
        if seen:
            weights[b, h, i, seen] = _Row(Q[b, h, i], K[b, h, seen], i, settings).weights
    return {"O": weights @ V, "A": weights}


def lssa_softplus_attention_backward(
    dO: Array, dA: Array | None = None, *, Q: Array, K: Array, V: Array, mask: Array | None = None,
    causal: bool = True, reweight: bool = True, p: float = 15.0, offset_rows: int = 3, eps: float = 0.0,
    normalize_qk: bool = True,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dA * A)` by input name."""
    settings = Settings(causal, reweight, p, offset_rows, eps, normalize_qk)
    dQ, dK, dV = np.zeros(Q.shape), np.zeros(K.shape), np.zeros(V.shape)
    for b, h, i in np.ndindex(*Q.shape[:3]):
        seen = _seen(mask, settings, b, i, K.shape[2])
        if not seen:
            continue
        row = _Row(Q[b, h, i], K[b, h, seen], i, settings)
        slope = V[b, h, seen] @ dO[b, h, i]
        if dA is not None:
            slope = slope + dA[b, h, i, seen]
        dq, dk = row.back(slope)
        dQ[b, h, i] = dq
        dK[b, h, seen] += dk
        dV[b, h, seen] += np.outer(row.weights, dO[b, h, i])
    return {"Q": dQ, "K": dK, "V": dV}


def _seen(mask: Array | None, settings: Settings, b: int, i: int, keys: int) -> list[int]:
    return [j for j in range(keys) if (not settings.causal or j <= i) and (mask is None or mask[b, j])]


class _Row:
    """One query with the keys that it sees, `k` `[n,d]`: weights, and the way back."""

    def __init__(self, q: Array, k: Array, i: int, settings: Settings) -> None:
        self.settings, self.q, self.k, self.count = settings, q, k, len(k)
        features = q.shape[-1]
        self.q_norm, self.k_norm = 1.0, np.ones(len(k))
        if settings.normalize_qk:
            self.q_norm, self.k_norm = float(_length(q)), _length(k)
        self.factor = np.log(features) * np.log(self.count) / (1.0 if settings.normalize_qk else features**0.5)
        self.q_unit, self.k_unit = q / self.q_norm, k / self.k_norm[:, None]
        self.logits = self.factor * (self.k_unit @ self.q_unit)
        plus = np.logaddexp(0.0, self.logits)
        self.total = float(plus.sum())
        self.first = plus / self.total
        self.weights = self.first
        if settings.reweight:
            above = np.maximum(self.count * self.first - (0.0 if i < settings.offset_rows else 1.0), 0.0)
            self.largest = float(above.max())
            self.above = above / self.largest if self.largest > 0.0 else above
            self.powers = np.where(self.above > 0.0, self.above**settings.p, 0.0)
            eps = settings.eps / self.largest**settings.p if self.largest > 0.0 and settings.eps else 0.0
            self.sum = float(self.powers.sum()) + eps
            self.weights = self.powers / self.sum if self.largest > 0.0 else np.zeros(self.count)

    def back(self, slope: Array) -> tuple[Array, Array]:
        """Gradients of query and keys, from those of the weights."""
        if self.settings.reweight:
            if self.largest == 0.0:
                return np.zeros(self.q.shape), np.zeros(self.k.shape)
            p = self.settings.p
            dpowers = (slope - float(slope @ self.weights)) / self.sum
            inner = np.where(self.above > 0.0, np.where(self.above > 0.0, self.above, 1.0) ** (p - 1.0), 0.0)
            slope = self.count * p * inner * dpowers / self.largest
        dplus = (slope - float(slope @ self.first)) / self.total
        dcos = self.factor * dplus / (1.0 + np.exp(-self.logits))
        dq_unit, dk_unit = dcos @ self.k_unit, np.outer(dcos, self.q_unit)
        if not self.settings.normalize_qk:
            return dq_unit, dk_unit
        dq = (dq_unit - self.q_unit * float(self.q_unit @ dq_unit)) / self.q_norm
        dk = (dk_unit - self.k_unit * (self.k_unit * dk_unit).sum(1, keepdims=True)) / self.k_norm[:, None]
        return dq, dk


def _length(x: Array) -> Array:
    return np.asarray(np.maximum(np.sqrt((x * x).sum(-1)), 1e-12))
