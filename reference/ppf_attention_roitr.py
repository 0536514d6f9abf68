"""Rotation-invariant attention of points: pair features of each neighbour, embedded, join its key and its value.

Yu et al. 2023 (arXiv 2303.08231), Section 3: point pair features, the local attention with them (in keys and values),
and the global attention, which keeps the geometry apart as a summary of each point. One query and one neighbour at a
time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def ppf_attention_roitr(
    Q: Array, K: Array, V: Array, points: Array | None = None, normals: Array | None = None, nb: Array | None = None,
    node: Array | None = None, Wg: Array | None = None, bg: Array | None = None, pair: Array | None = None,
    Wp: Array | None = None, bp: Array | None = None, Wvp: Array | None = None, bvp: Array | None = None, *,
    geometry_in_values: bool = True, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Outputs by name.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. points, normals: `[b,j,3]`.
        nb: `[b,i,k]`, neighbours of a query, all points if None. node: `[b,i]`, the query's point, point i if None.
        Wg: `[c,4]`, bg: `[c]`, of the pair features. pair: `[b,i,k,c]`, another embedding, added to theirs.
        Wp: `[h,d,c]`, bp: `[h,d]`, Wvp: `[h,e,c]`, bvp: `[h,e]`, from the embedding to keys and values.
        geometry_in_values: whether O has the embedding's values. scale: D ** -0.5 if None.

    Returns:
        `O` `[b,h,i,e]` and `pos` `[b,h,i,e]`, the embedding's values averaged over the other points.
    """
    if Wp is None or Wvp is None:
        raise ValueError("Wp and Wvp are needed")
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    out, summary = (np.zeros((*Q.shape[:3], V.shape[-1])) for _ in range(2))
    for b, i in np.ndindex(Q.shape[0], Q.shape[2]):
        own = i if node is None else int(node[b, i])
        near = list(range(K.shape[2])) if nb is None else [int(j) for j in nb[b, i]]
        embedded = np.zeros((len(near), Wp.shape[2]))
        for k, j in enumerate(near):
            if pair is not None:
                embedded[k] += pair[b, i, k]
            if points is not None and normals is not None and Wg is not None:
                embedded[k] += Wg @ pair_feature(points[b, own], normals[b, own], points[b, j], normals[b, j])
                embedded[k] += 0.0 if bg is None else bg
        for h in range(Q.shape[1]):
            to_key = embedded @ Wp[h].T + (0.0 if bp is None else bp[h])
            to_value = embedded @ Wvp[h].T + (0.0 if bvp is None else bvp[h])
            logits = factor * np.array([Q[b, h, i] @ (K[b, h, j] + to_key[k]) for k, j in enumerate(near)])
            values = V[b, h, near] + to_value if geometry_in_values else V[b, h, near]
            out[b, h, i] = _weights(logits) @ values
            others = [k for k, j in enumerate(near) if j != own]
            if others:
                summary[b, h, i] = _weights(logits[others]) @ to_value[others]
    return {"O": out, "pos": summary}


def pair_feature(p_i: Array, n_i: Array, p_j: Array, n_j: Array) -> Array:
    """Distance, and the three angles over pi, of an anchor i and its neighbour j."""
    apart = p_j - p_i
    angles = (_angle(n_i, apart), _angle(n_j, apart), _angle(n_i, n_j))
    return np.array([math.sqrt(float(apart @ apart)), *(angle / math.pi for angle in angles)])


def _angle(a: Array, b: Array) -> float:
    """From 0 to pi; 0 where one of the vectors is zero."""
    normal = np.cross(a, b)
    return math.atan2(math.sqrt(float(normal @ normal)), float(a @ b))


def _weights(logits: Array) -> Array:
    raised = np.exp(logits - logits.max())
    return np.asarray(raised / raised.sum())
