"""Softplus attention row by row: the sum of a row's softplus weights first, then, if wanted, the re-weighting.

Gao and Spratling 2025 (arXiv 2501.13428): length-scaled softplus attention (LSSA) and its re-weighted form (LSSAR).
Two passes over the keys that a row sees; the others are not read. Powers are taken relative to the row's largest,
which the ratio does not notice and which keeps x ** 15 from underflowing.
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
    power: int
    offset_rows: int
    eps: float
    activation: str
    normalize_qk: bool
    scale: float | None


def lssa_softplus_attention(
    Q: Array, K: Array, V: Array, mask: Array | None = None, *, causal: bool = True, reweight: bool = False,
    power: int = 15, offset_rows: int = 3, eps: float = 1e-8, activation: str = "softplus",
    normalize_qk: bool = True, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name; a row without keys, or without a key above average in the second stage, is zero.

    Args:
        Q: `[b,h,i,d]`, the last of the positions. K: `[b,h,j,d]`. V: `[b,h,j,e]`.
        mask: `[b,h,i,j]`, the first three may be 1, True = may attend.
        reweight: the second stage. power: of it. offset_rows: so many first positions subtract 0 instead of 1.
        eps: added to the second stage's row sum. activation: "softplus", "exp" or "sigmoid".
        normalize_qk: cosines instead of dot products. scale: their factor, ln(D) ln(number of visible keys) if None.

    Returns:
        `O` `[b,h,i,e]`.
    """
    settings = Settings(causal, reweight, power, offset_rows, eps, activation, normalize_qk, scale)
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h, i in np.ndindex(*Q.shape[:3]):
        seen, place = _seen(mask, settings, b, h, i, Q.shape[2], K.shape[2])
        if seen:
            out[b, h, i] = _Row(Q[b, h, i], K[b, h, seen], place, settings).weights @ V[b, h, seen]
    return {"O": out}


def lssa_softplus_attention_backward(
    dO: Array, *, Q: Array, K: Array, V: Array, mask: Array | None = None, causal: bool = True,
    reweight: bool = False, power: int = 15, offset_rows: int = 3, eps: float = 1e-8, activation: str = "softplus",
    normalize_qk: bool = True, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O)` by input name."""
    settings = Settings(causal, reweight, power, offset_rows, eps, activation, normalize_qk, scale)
    dQ, dK, dV = np.zeros(Q.shape), np.zeros(K.shape), np.zeros(V.shape)
    for b, h, i in np.ndindex(*Q.shape[:3]):
        seen, place = _seen(mask, settings, b, h, i, Q.shape[2], K.shape[2])
        if seen:
            row = _Row(Q[b, h, i], K[b, h, seen], place, settings)
            dQ[b, h, i], dk = row.back(V[b, h, seen] @ dO[b, h, i])
            dK[b, h, seen] += dk
            dV[b, h, seen] += np.outer(row.weights, dO[b, h, i])
    return {"Q": dQ, "K": dK, "V": dV}


def _seen(
    mask: Array | None, settings: Settings, b: int, h: int, i: int, queries: int, keys: int
) -> tuple[list[int], int]:
    """The keys that a query may attend to, and the query's position."""
    place = i + keys - queries
    if mask is not None:
        b, h, i = (at if size > 1 else 0 for at, size in zip((b, h, i), mask.shape[:3], strict=True))
    allowed = (j for j in range(keys) if mask is None or mask[b, h, i, j])
    return [j for j in allowed if not settings.causal or j <= place], place


class _Row:
    """One query with the keys that it sees, `k` `[n,d]`, n > 0: its weights, and the way back."""

    def __init__(self, q: Array, k: Array, place: int, settings: Settings) -> None:
        self.settings, self.count = settings, len(k)
        self.q_norm, self.k_norm = np.ones(1), np.ones((len(k), 1))
        if settings.normalize_qk:
            self.q_norm, self.k_norm = _norm(q), _norm(k)
        self.q, self.k = q / self.q_norm, k / self.k_norm
        chosen = settings.scale
        self.factor = float(np.log(len(q)) * np.log(self.count)) if chosen is None else chosen
        positive, self.slope = _positive(self.factor * (self.k @ self.q), settings.activation)
        self.total = float(positive.sum())
        self.first = self.weights = positive / self.total
        if settings.reweight:
            self._reweight(0.0 if settings.causal and place < settings.offset_rows else 1.0)

    def _reweight(self, offset: float) -> None:
        above = np.maximum(self.count * self.first - offset, 0.0)
        self.largest = float(above.max())
        self.above = above / self.largest if self.largest > 0.0 else above
        self.sum = np.inf
        if self.largest > 0.0:
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                eps = np.float64(self.settings.eps) / np.float64(self.largest) ** self.settings.power
            self.sum = float((self.above**self.settings.power).sum() + (eps if self.settings.eps else 0.0))
        self.weights = self.above**self.settings.power / self.sum

    def back(self, dweights: Array) -> tuple[Array, Array]:
        """Gradients of query and keys, from those of the weights."""
        slope = dweights
        if self.settings.reweight:
            if not self.largest:
                return np.zeros(self.q.shape), np.zeros(self.k.shape)
            power = self.settings.power
            dpowers = (slope - float(slope @ self.weights)) / self.sum
            steep = np.where(self.above > 0.0, power * self.above ** (power - 1), 0.0)
            slope = self.count * steep * dpowers / self.largest
        dcos = self.factor * self.slope * (slope - float(slope @ self.first)) / self.total
        dq, dk = dcos @ self.k, np.outer(dcos, self.q)
        if not self.settings.normalize_qk:
            return dq, dk
        return (
            (dq - self.q * (self.q * dq).sum()) / self.q_norm,
            (dk - self.k * (self.k * dk).sum(1, keepdims=True)) / self.k_norm,
        )


def _positive(logits: Array, activation: str) -> tuple[Array, Array]:
    """The activation and its derivative, both up to a factor of the row."""
    if activation == "softplus":
        return np.logaddexp(0.0, logits), 1.0 / (1.0 + np.exp(-logits))
    if activation == "sigmoid":
        value = 1.0 / (1.0 + np.exp(-logits))
        return value, value * (1.0 - value)
    if activation != "exp":
        raise ValueError(f"activation is {activation!r}, expected 'softplus', 'exp' or 'sigmoid'")
    value = np.exp(logits - logits.max())
    return value, value


def _norm(x: Array) -> Array:
    return np.asarray(np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12))
