"""Bi-level routing attention as its paper computes it: regions, their best partners, gathered tokens, dense attention.

Zhu et al. 2023 (arXiv 2303.08810), Section 3.2 and Algorithm 1: mean queries and keys of the regions give a score of
region pairs, the keys and values of the best regions are gathered, and each region attends to what was gathered for it.
A depthwise convolution of the values is added (local context enhancement).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def biformer_bra(
    Q: Array, K: Array, V: Array, lepe_w: Array | None = None, lepe_b: Array | None = None, *, n_win: int = 7,
    topk: int = 4, soft_routing: bool = False, padding: str = "masked", scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q, K: `[b,h,y,x,d]`. V: `[b,h,y,x,e]`. lepe_w: `[c,p,q]`, channel c = h * E + e. lepe_b: `[c]`.
        n_win: regions along a side. topk: regions that a region attends to.
        padding: "masked" or "zeros", for the cells that a region at the border lacks.

    Returns:
        `O` `[b,h,y,x,e]`.
    """
    if padding not in ("masked", "zeros"):
        raise ValueError(f"padding is {padding!r}, expected 'masked' or 'zeros'")
    if lepe_b is not None and lepe_w is None:
        raise ValueError("lepe_b goes with lepe_w")
    _, heads, down, across, width = Q.shape
    factor = (heads * width) ** -0.5 if scale is None else scale
    high, wide = max(1, down // n_win), max(1, across // n_win)
    regions = [
        (slice(y, min(y + high, down)), slice(x, min(x + wide, across)))
        for y in range(0, down, high)
        for x in range(0, across, wide)
    ]
    out = np.zeros(V.shape)
    for b in range(len(Q)):
        kept, shares = route(Q[b], K[b], regions, topk, factor)
        for region, partners, share in zip(regions, kept, shares, strict=True):
            out[b][:, *region] = _attend(
                Q[b], K[b], V[b], region, [regions[a] for a in partners], share if soft_routing else None,
                high * wide if padding == "zeros" else None, factor,
            )  # fmt: skip
    if lepe_w is not None:
        out += local_enhancement(V, lepe_w, lepe_b)
    return {"O": out}


def route(
    q: Array, k: Array, regions: list[tuple[slice, slice]], topk: int, scale: float
) -> tuple[list[list[int]], list[Array]]:
    """For every region the regions that it keeps, best first, and the softmax of their scaled scores."""
    mean_q = [q[:, *region].mean((1, 2)).reshape(-1) for region in regions]
    mean_k = [k[:, *region].mean((1, 2)).reshape(-1) for region in regions]
    kept, shares = [], []
    for query in mean_q:
        score = [float(query @ key) for key in mean_k]
        best = sorted(range(len(regions)), key=lambda a: (-score[a], a))[:topk]
        raised = np.exp(scale * np.array([score[a] for a in best]) - max(scale * score[a] for a in best))
        kept.append(best)
        shares.append(raised / raised.sum())
    return kept, shares


def _attend(
    q: Array, k: Array, v: Array, region: tuple[slice, slice], partners: list[tuple[slice, slice]],
    share: Array | None, cells: int | None, scale: float,
) -> Array:  # fmt: skip
    """Attention of a region's tokens over the gathered tokens of its partners, `[h,y,x,e]`."""
    heads, e = len(q), v.shape[-1]
    queries = q[:, *region]
    keys: list[Array] = []
    values: list[Array] = []
    for place, partner in enumerate(partners):
        weight = 1.0 if share is None else share[place]
        found = weight * k[:, *partner].reshape(heads, -1, k.shape[-1]), weight * v[:, *partner].reshape(heads, -1, e)
        lacking = 0 if cells is None else cells - found[0].shape[1]
        for part, into in zip(found, (keys, values), strict=True):
            into.append(np.concatenate([part, np.zeros((heads, lacking, part.shape[-1]))], axis=1))
    gathered_k, gathered_v = np.concatenate(keys, axis=1), np.concatenate(values, axis=1)
    out = np.zeros((*queries.shape[:3], e))
    for h in range(heads):
        logits = scale * queries[h] @ gathered_k[h].T
        raised = np.exp(logits - logits.max(-1, keepdims=True))
        out[h] = raised / raised.sum(-1, keepdims=True) @ gathered_v[h]
    return out


def local_enhancement(V: Array, weight: Array, bias: Array | None) -> Array:
    """Depthwise convolution over the whole map, zero padded; channel c = h * E + e."""
    batch, heads, down, across, e = V.shape
    side = weight.shape[-1]
    if side % 2 == 0:
        raise ValueError(f"the side of the depthwise kernel is {side}, expected an odd number")
    margin = side // 2
    kernel = weight.reshape(heads, e, side, side)
    padded = np.zeros((batch, heads, down + 2 * margin, across + 2 * margin, e))
    padded[:, :, margin : margin + down, margin : margin + across] = V
    out = np.zeros(V.shape)
    for p, q in np.ndindex(side, side):
        out += padded[:, :, p : p + down, q : q + across] * kernel[None, :, None, None, :, p, q]
    return out if bias is None else out + bias.reshape(1, heads, 1, 1, e)
