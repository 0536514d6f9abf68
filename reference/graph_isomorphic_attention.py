"""Attention as a graph: edge weights first, then every node looks at its neighbours one by one, then a small MLP.

Buehler 2025 (arXiv 2501.02393): GIN-attention, PNA-attention (sum, mean, maximum, variance of the neighbours), and
Sparse-GIN on a graph of thresholded attention. The node itself enters with a weight of its own, as in the author's
code, not with one plus that weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Edges:
    """How weights of edges come from logits."""

    adjacency: str
    edges: str
    threshold: float
    sharp: float
    edge_threshold: float
    topk_fraction: float
    sharpness: float
    tau: float
    scale: float
    causal: bool

    def seen(self, i: int, tokens: int) -> int:
        """The number of tokens that token i sees; they are the first ones."""
        return i + 1 if self.causal else tokens

    def softmax(self, q: Array, keys: Array) -> Array:
        logits = self.sharpness * self.scale * (keys @ q) / self.tau
        raised = np.exp(logits - logits.max())
        return np.asarray(raised / raised.sum())

    def mapped(self, row: Array, tokens: int) -> Array:
        """The chosen element map of a token's edges to those that it sees."""
        above = row - self.threshold
        if self.edges == "relu":
            return np.maximum(above, 0.0)
        if self.edges == "silu":
            return np.asarray(above * _sigmoid(above))
        if self.edges == "softplus":
            return np.logaddexp(0.0, above)
        if self.edges == "binary":
            return np.where(row > self.threshold, 1.0, 0.0)
        if self.edges == "sigmoid":
            return _sigmoid(self.sharp * above)
        if self.edges == "topk":
            count = max(1, math.floor(self.topk_fraction * tokens))
            best = sorted(range(len(row)), key=lambda j: (-float(row[j]), j))[:count]
            return np.array([1.0 if j in best else 0.0 for j in range(len(row))])
        return row


def graph_isomorphic_attention(
    Q: Array, K: Array, U: Array, W1: Array, W2: Array, b1: Array | None = None, b2: Array | None = None,
    self_weight: Array | None = None, norm: Array | None = None, Wmean: Array | None = None,
    Wmax: Array | None = None, Wvar: Array | None = None, sharpness: Array | float | None = None,
    Q2: Array | None = None, K2: Array | None = None, lam: Array | float | None = None, *,
    adjacency: str = "softmax", edges: str = "none", threshold: float = 0.2, sharp: float = 10.0,
    edge_threshold: float = 0.5, topk_fraction: float = 0.1, tau: float = 1.0, causal: bool = True,
    activation: str = "silu", slope: float = 0.25, skip: bool = False, scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """The output by name.

    Args:
        Q, K: `[b,h,i,d]`, and those of the attention that is subtracted, lam times: Q2, K2. U: `[b,g,j,e]`, nodes.
        W1: `[g,f,e]`, b1: `[g,f]`, W2: `[g,p,f]`, b2: `[g,p]`, norm: `[g,f]`. Wmean, Wmax, Wvar: `[g,f,e]`.
        self_weight: `[g]`. sharpness, lam: scalars. scale: D ** -0.5 if None. (Other options as in the mechanism.)

    Returns:
        `O` `[b,g,i,p]`.
    """
    rule = Edges(
        adjacency, edges, threshold, sharp, edge_threshold, topk_fraction,
        1.0 if sharpness is None else float(sharpness), tau, Q.shape[-1] ** -0.5 if scale is None else scale, causal,
    )  # fmt: skip
    batch, heads, tokens, _ = U.shape
    out = np.zeros((batch, heads, tokens, W2.shape[1]))
    for b, g, i in np.ndindex(batch, heads, tokens):
        seen = rule.seen(i, tokens)
        if adjacency == "sparse":
            row = _sparse(rule, Q[b, :, i], K[b, :, :seen])
        else:
            row = _row(rule, Q[b, g, i], K[b, g, :seen])
            if Q2 is not None and K2 is not None and lam is not None:
                row = row - float(lam) * rule.softmax(Q2[b, g, i], K2[b, g, :seen])
            row = rule.mapped(row, tokens)
        gathered = _Gathered(row, U[b, g, :seen])
        mixed = gathered.sum if self_weight is None else gathered.sum + self_weight[g] * U[b, g, i]
        hidden = W1[g] @ mixed
        for weight, part in ((Wmean, gathered.mean), (Wmax, gathered.max), (Wvar, gathered.var)):
            if weight is not None:
                hidden = hidden + weight[g] @ part
        if b1 is not None:
            hidden = hidden + b1[g]
        if norm is not None:
            hidden = hidden / math.sqrt(float((hidden * hidden).sum()) / len(hidden) + 1e-6) * norm[g]
        result = W2[g] @ _activated(hidden, activation, slope)
        if b2 is not None:
            result = result + b2[g]
        out[b, g, i] = _activated(result + mixed, activation, slope) if skip else result
    return {"O": out}


def _row(rule: Edges, q: Array, keys: Array) -> Array:
    """Weights of one head's edges to the tokens seen, before the element map."""
    if rule.adjacency == "relu":
        return np.maximum(rule.scale * (keys @ q), 0.0)
    return rule.softmax(q, keys)


def _sparse(rule: Edges, q: Array, keys: Array) -> Array:
    """Weights of the one graph of all heads; q: `[h,d]`, keys: `[h,j,d]`."""
    total = sum((rule.softmax(q[h], keys[h]) for h in range(len(q))), np.zeros(keys.shape[1]))
    weight = _sigmoid(rule.sharp * (np.minimum(total, 1.0) - rule.threshold))
    return np.where(weight > rule.edge_threshold, weight, 0.0)


class _Gathered:
    """What a node hears from its neighbours, gathered one at a time."""

    def __init__(self, row: Array, nodes: Array) -> None:
        features = nodes.shape[-1]
        self.sum, squares, degree = np.zeros(features), np.zeros(features), 0.0
        highest: Array | None = None
        for weight, node in zip(row, nodes, strict=True):
            self.sum = self.sum + weight * node
            squares = squares + weight * node * node
            degree += float(weight)
            if weight > 0.0:
                highest = node if highest is None else np.maximum(highest, node)
        degree = degree if degree != 0.0 else 1.0
        self.mean = self.sum / degree
        self.max = np.zeros(features) if highest is None else highest
        self.var = np.maximum(squares / degree - self.mean * self.mean, 0.0)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _activated(x: Array, name: str, slope: float) -> Array:
    if name == "silu":
        return np.asarray(x * _sigmoid(x))
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "prelu":
        return np.where(x > 0.0, x, slope * x)
    if name == "identity":
        return x
    raise ValueError(f"activation is {name!r}, expected 'silu', 'relu', 'prelu' or 'identity'")
