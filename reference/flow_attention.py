"""Flow attention as its paper computes it: conserved flows of sources and sinks, never a matrix of queries and keys.

Wu et al. 2022 (arXiv 2202.06258), Section 3.2 (flow conservation, competition, allocation). The bidirectional form
adds up the keys and the queries once. The causal form runs over the tokens with a state of six running sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def flow_attention(
    Q: Array, K: Array, V: Array, mask: Array | None = None, *, causal: bool = False, phi: str = "sigmoid",
    eps: float = 1e-6, clip: float | None = 1.0,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`, before phi; as many queries as keys if causal.
        mask: `[b,j]`, False = the key is padding and takes no part. Bidirectional form only.
        phi: "sigmoid" or "relu" (relu(x) + 1e-6). clip: bound of the conserved outgoing flow, None for none.

    Returns:
        `O` `[b,h,i,e]`.
    """
    out = np.zeros((*Q.shape[:3], V.shape[-1]))
    for b, h in np.ndindex(*Q.shape[:2]):
        q, k, v = _phi(Q[b, h], phi), _phi(K[b, h], phi), V[b, h]
        if causal:
            out[b, h] = _stream(q, k, v, eps, clip)
            continue
        if mask is not None:
            k, v = k[mask[b]], v[mask[b]]
        out[b, h] = _network(q, k, v, eps, clip)
    return {"O": out}


def _phi(x: Array, name: str) -> Array:
    found: Array = 1.0 / (1.0 + np.exp(-x)) if name == "sigmoid" else np.maximum(x, 0.0) + 1e-6
    return found


def _bound(flow: Any, clip: float | None) -> Any:
    return flow if clip is None else np.clip(flow, -clip, clip)


def _network(q: Array, k: Array, v: Array, eps: float, clip: float | None) -> Array:
    """All sinks (queries) and all sources (keys) of one head."""
    sinks, sources = len(q), len(k)
    if not sinks or not sources:
        return np.zeros((sinks, v.shape[-1]))
    incoming = (q + eps) @ (k.sum(0) + eps)
    outgoing = (k + eps) @ (q.sum(0) + eps)
    conserved_sink = (q + eps) @ ((k / outgoing[:, None]).sum(0) + eps)
    conserved_source = _bound((k + eps) @ ((q / incoming[:, None]).sum(0) + eps), clip)
    raised = np.exp(conserved_source - conserved_source.max())
    competition = sources * raised / raised.sum()
    allocation = 1.0 / (1.0 + np.exp(-conserved_sink * sinks / sources))
    gathered = k.T @ (competition[:, None] * v)
    return np.asarray(allocation[:, None] * ((q / incoming[:, None]) @ gathered))


def _stream(q: Array, k: Array, v: Array, eps: float, clip: float | None) -> Array:
    """Token by token; every sum so far is carried, and the values' state."""
    features = q.shape[-1]
    keys, queries, released, received = (np.zeros(features) for _ in range(4))
    total, state = 0.0, np.zeros((features, v.shape[-1]))
    out = np.zeros(v.shape)
    for t in range(len(q)):
        seen = t + 1
        keys, queries = keys + k[t], queries + q[t]
        incoming = float((q[t] + eps) @ (keys + eps))
        outgoing = float((k[t] + eps) @ (queries + eps))
        released, received = released + k[t] * (seen / outgoing), received + q[t] * (seen / incoming)
        conserved_sink = float((q[t] + eps) @ (released + eps)) / seen
        conserved_source = float(_bound(float((k[t] + eps) @ (received + eps)) / seen, clip))
        total += float(np.exp(conserved_source))
        competition = seen * float(np.exp(conserved_source)) / total
        state = state + np.outer(k[t], competition * v[t])
        out[t] = (q[t] / incoming) @ state / (1.0 + np.exp(-conserved_sink))
    return out
