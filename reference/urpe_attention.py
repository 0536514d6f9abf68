"""URPE attention as a fused kernel computes it: a running softmax whose numerator alone gets the relative factors.

Luo et al. 2022 (arXiv 2205.13401), Section 4: the weights of softmax attention with a relative bias are multiplied by a
Toeplitz matrix. Tiles of keys are visited with a running maximum and sum; the factors enter the accumulated values but
not the sum. The backward pass recomputes each row's weights from the logarithm of its sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TILE = 3
"""Keys per step: small, so that short sequences take several steps."""


def urpe_attention(
    Q: Array, K: Array, V: Array, beta: Array | None = None, gam: Array | None = None,
    beta_table: Array | None = None, gam_table: Array | None = None, bucket: Array | None = None,
    mask: Array | None = None, *, causal: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. beta, gam: `[h,o]`, one entry for each offset, the furthest
            back first. beta_table, gam_table: `[h,t]`, read through bucket `[o]`.
        mask: `[b or 1,h or 1,i or 1,j]`, True = attend.

    Returns:
        `O` `[b,h,i,e]`.
    """
    rows = _Rows(Q, K, V, beta, gam, beta_table, gam_table, bucket, mask, causal, scale)
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h, i in np.ndindex(*Q.shape[:3]):
        out[b, h, i] = rows.forward(b, h, i)[0]
    return {"O": out}


def urpe_attention_backward(
    dO: Array, *, Q: Array, K: Array, V: Array, beta: Array | None = None, gam: Array | None = None,
    beta_table: Array | None = None, gam_table: Array | None = None, bucket: Array | None = None,
    mask: Array | None = None, causal: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O)` by input name."""
    rows = _Rows(Q, K, V, beta, gam, beta_table, gam_table, bucket, mask, causal, scale)
    given = {"Q": Q, "K": K, "V": V, "beta": beta, "gam": gam, "beta_table": beta_table, "gam_table": gam_table}
    found = {name: np.zeros(array.shape) for name, array in given.items() if array is not None}
    for b, h, i in np.ndindex(*Q.shape[:3]):
        out, log_sum = rows.forward(b, h, i)
        g = dO[b, h, i]
        for j in rows.seen(b, h, i):
            o = rows.offset(i, j)
            weight, factor = np.exp(rows.logit(b, h, i, j) - log_sum), rows.factor(h, o)
            dweighted = g @ V[b, h, j]
            dlogit = weight * (factor * dweighted - g @ out)
            found["V"][b, h, j] += weight * factor * g
            found["Q"][b, h, i] += rows.scale * dlogit * K[b, h, j]
            found["K"][b, h, j] += rows.scale * dlogit * Q[b, h, i]
            for name, at in (("", o), ("_table", None if bucket is None else int(bucket[o]))):
                if f"beta{name}" in found:
                    found[f"beta{name}"][h, at] += dlogit
                if f"gam{name}" in found:
                    found[f"gam{name}"][h, at] += weight * dweighted
    return found


class _Rows:
    """The arguments of a call, one query at a time."""

    def __init__(
        self, Q: Array, K: Array, V: Array, beta: Array | None, gam: Array | None, beta_table: Array | None,
        gam_table: Array | None, bucket: Array | None, mask: Array | None, causal: bool, scale: float | None,
    ) -> None:  # fmt: skip
        if (beta is not None and beta_table is not None) or (gam is not None and gam_table is not None):
            raise ValueError("give each table by offset or by bucket, not both")
        if (bucket is None) != (beta_table is None and gam_table is None):
            raise ValueError("bucket goes together with beta_table or gam_table")
        self.Q, self.K, self.V, self.causal = Q, K, V, causal
        self.beta, self.gam, self.beta_table, self.gam_table, self.bucket = beta, gam, beta_table, gam_table, bucket
        self.queries, self.keys = Q.shape[2], K.shape[2]
        self.mask = None if mask is None else np.broadcast_to(mask, (*Q.shape[:3], self.keys))
        self.scale = Q.shape[-1] ** -0.5 if scale is None else scale

    def offset(self, i: int, j: int) -> int:
        """Row of the tables: the key's lead over the query, counted from the largest lag."""
        position = i + self.keys - self.queries
        return int(j - position + self.keys - 1)

    def seen(self, b: int, h: int, i: int) -> list[int]:
        last = i + self.keys - self.queries if self.causal else self.keys - 1
        return [j for j in range(last + 1) if self.mask is None or self.mask[b, h, i, j]]

    def logit(self, b: int, h: int, i: int, j: int) -> float:
        extra = self._entry(self.beta, self.beta_table, h, self.offset(i, j))
        return float(self.scale * (self.Q[b, h, i] @ self.K[b, h, j])) + (0.0 if extra is None else extra)

    def factor(self, h: int, o: int) -> float:
        found = self._entry(self.gam, self.gam_table, h, o)
        return 1.0 if found is None else found

    def forward(self, b: int, h: int, i: int) -> tuple[Array, float]:
        """The output row and the logarithm of its sum of exponentials."""
        top, total, acc = -np.inf, 0.0, np.zeros(self.V.shape[-1])
        seen = self.seen(b, h, i)
        for first in range(0, len(seen), TILE):
            tile = seen[first : first + TILE]
            logits = np.array([self.logit(b, h, i, j) for j in tile])
            new = max(top, float(logits.max()))
            shrink, raised = float(np.exp(top - new)), np.exp(logits - new)
            factors = np.array([self.factor(h, self.offset(i, j)) for j in tile])
            total = shrink * total + float(raised.sum())
            acc = shrink * acc + (raised * factors) @ self.V[b, h, tile]
            top = new
        if not seen:
            return acc, -np.inf
        return acc / total, top + float(np.log(total))

    def _entry(self, by_offset: Array | None, table: Array | None, h: int, o: int) -> float | None:
        if table is not None and self.bucket is not None:
            return float(table[h, self.bucket[o]])
        return None if by_offset is None else float(by_offset[h, o])
