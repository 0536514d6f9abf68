"""Flow attention as its paper computes it: conserved flows of sources and sinks, never a matrix of queries and keys.

Wu et al. 2022 (arXiv 2202.06258), Section 3.2 (flow conservation, competition, allocation). The bidirectional form
adds up the keys and the queries once. The causal form runs over the tokens with a state of running sums. Padding is
cut off before, not masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """How flows are kept away from zero and bounded."""

    eps: float
    outer_eps: float
    clip_at: float

    def flow(self, feature: Array, total: Array, count: float = 1.0) -> Any:
        """What an end point, or each of several, exchanges with the sum of the other side, per `count`."""
        return (feature + self.eps) @ (total + self.eps) / count + self.outer_eps

    def bounded(self, flow: Any) -> Any:
        return np.minimum(np.maximum(flow, -self.clip_at), self.clip_at)


def flow_attention(
    Q: Array, K: Array, V: Array, q_length: Array | None = None, kv_length: Array | None = None, *,
    causal: bool = False, phi: str = "sigmoid", clip_at: float = 1.0, eps: float = 1e-6, outer_eps: float = 0.0,
) -> dict[str, Array]:  # fmt: skip
    """The output by name; rows of padding, and queries without a key, are zero.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`, before phi; as many queries as keys if causal.
        q_length, kv_length: `[b]`, the real queries and keys; bidirectional form only.
        phi: "sigmoid" or "relu" (relu(x) + 1e-6). clip_at: bound of the conserved outgoing flow.
        eps: added to both factors of a flow. outer_eps: added to a flow.

    Returns:
        `O` `[b,h,i,e]`.

    Raises:
        ValueError: an unknown phi, or a causal call with lengths or with unequal numbers of queries and keys.
    """
    if phi not in ("sigmoid", "relu"):
        raise ValueError(f"phi is {phi!r}, expected 'sigmoid' or 'relu'")
    if causal and (Q.shape[2] != K.shape[2] or q_length is not None or kv_length is not None):
        raise ValueError("the causal form takes as many queries as keys, and no lengths")
    settings = Settings(eps, outer_eps, clip_at)
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h in np.ndindex(*Q.shape[:2]):
        queries = Q.shape[2] if q_length is None else int(q_length[b])
        keys = K.shape[2] if kv_length is None else int(kv_length[b])
        q, k, v = _phi(Q[b, h, :queries], phi), _phi(K[b, h, :keys], phi), V[b, h, :keys]
        if queries and keys:
            out[b, h, :queries] = _stream(q, k, v, settings) if causal else _network(q, k, v, settings)
    return {"O": out}


def _phi(x: Array, name: str) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)) if name == "sigmoid" else np.maximum(x, 0.0) + 1e-6)


def _network(q: Array, k: Array, v: Array, settings: Settings) -> Array:
    """All sinks (queries) and all sources (keys) of one head."""
    sinks, sources = len(q), len(k)
    incoming = settings.flow(q, k.sum(0))
    outgoing = settings.flow(k, q.sum(0))
    conserved_sink = settings.flow(q, (k / outgoing[:, None]).sum(0))
    conserved_source = settings.bounded(settings.flow(k, (q / incoming[:, None]).sum(0)))
    raised = np.exp(conserved_source - conserved_source.max())
    competition = sources * raised / raised.sum()
    allocation = 1.0 / (1.0 + np.exp(-conserved_sink * sinks / sources))
    gathered = k.T @ (competition[:, None] * v)
    return np.asarray(allocation[:, None] * ((q / incoming[:, None]) @ gathered))


def _stream(q: Array, k: Array, v: Array, settings: Settings) -> Array:
    """Token by token; the sums so far are carried: keys, queries, what both exchanged, competition, values."""
    features = q.shape[-1]
    keys, queries, released, received = (np.zeros(features) for _ in range(4))
    log_total, state = -np.inf, np.zeros((features, v.shape[-1]))
    out = np.zeros(v.shape)
    for t in range(len(q)):
        seen = t + 1
        keys, queries = keys + k[t], queries + q[t]
        incoming, outgoing = settings.flow(q[t], keys), settings.flow(k[t], queries)
        released, received = released + k[t] * (seen / outgoing), received + q[t] * (seen / incoming)
        conserved_sink = settings.flow(q[t], released, seen)
        conserved_source = settings.bounded(settings.flow(k[t], received, seen))
        log_total = np.logaddexp(log_total, conserved_source)
        competition = seen * np.exp(conserved_source - log_total)
        state = state + np.outer(k[t], competition * v[t])
        out[t] = (q[t] / incoming) @ state / (1.0 + np.exp(-conserved_sink))
    return out
