"""LASP-2 as its devices compute it: a state of each device, one gathering of all states, and a sum of what precedes.

Sun et al. 2025 (arXiv 2502.07563), Algorithms 1-4: forward without and with mask, and their backward passes, with one
gathering of states in each direction; with a decay, the states are weighted as in any chunked linear attention.
Softmax layers (LASP-2H) gather keys and values instead. A device is an entry of a list here, and
gathering is reading the whole list.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def lasp2(
    Q: Array, K: Array, V: Array, s: Array | None = None, *, devices: int = 1, causal: bool = True,
    layer: str = "linear", feature_map: str = "identity", scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Outputs, and the state that each device sends.

    Args:
        Q, K: `[b,h,i,d]`; V: `[b,h,i,e]`. s: `[h]`, decay rate of causal linear layers.
        devices: equal parts of the tokens. causal: whether a token sees only itself and earlier ones.
        layer: "linear" or "softmax". feature_map: of queries and keys.
        scale: of a softmax layer, `d ** -0.5` by default.

    Returns:
        `O` `[b,h,i,e]` and `Mst` `[b,t,h,d,e]`.
    """
    Q, K = _map(feature_map, Q)[0], _map(feature_map, K)[0]
    parts = _parts(Q.shape[2], devices)
    out, states = np.zeros((*Q.shape[:3], V.shape[-1])), np.zeros((len(Q), devices, Q.shape[1], *_state(Q, V)))
    for b, h in np.ndindex(*Q.shape[:2]):
        q, k, v, lam = Q[b, h], K[b, h], V[b, h], 1.0 if s is None else math.exp(-s[h])
        sent = [(_onward(lam, rows)[:, None] * k[rows]).T @ v[rows] for rows in parts]
        for t, rows in enumerate(parts):
            states[b, t, h] = sent[t]
            if layer == "softmax":
                out[b, h, rows] = _weights(q[rows], k, rows.start if causal else None, scale) @ v
            elif causal:
                out[b, h, rows] = (_inside(lam, rows) * (q[rows] @ k[rows].T)) @ v[rows]
                out[b, h, rows] += _up_to(lam, rows)[:, None] * (q[rows] @ _before(sent, t, lam, parts))
            else:
                out[b, h, rows] = q[rows] @ sum(sent, np.zeros(_state(Q, V)))
    return {"O": out, "Mst": states}


def lasp2_backward(
    dO: Array, dMst: Array | None = None, *, Q: Array, K: Array, V: Array, s: Array | None = None, devices: int = 1,
    causal: bool = True, layer: str = "linear", feature_map: str = "identity", scale: float | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Gradients of `sum(dO * O) + sum(dMst * Mst)` by input name; the decay rates are constants."""
    (Qf, slope_q), (Kf, slope_k) = _map(feature_map, Q), _map(feature_map, K)
    parts = _parts(Q.shape[2], devices)
    dQ, dK, dV = np.zeros(Q.shape), np.zeros(K.shape), np.zeros(V.shape)
    for b, h in np.ndindex(*Q.shape[:2]):
        q, k, v, g, lam = Qf[b, h], Kf[b, h], V[b, h], dO[b, h], 1.0 if s is None else math.exp(-s[h])
        sent = [(_onward(lam, rows)[:, None] * k[rows]).T @ v[rows] for rows in parts]
        returned = gradient_states(q, g, lam, devices)
        for t, rows in enumerate(parts):
            into = np.zeros(_state(Q, V)) if dMst is None else np.array(dMst[b, t, h])
            if layer == "softmax":
                weights = _weights(q[rows], k, rows.start if causal else None, scale)
                pairs = g[rows] @ v.T
                logits = weights * (pairs - np.sum(weights * pairs, axis=1, keepdims=True)) * _scale(Q, scale)
                dQ[b, h, rows] = logits @ k
                dK[b, h] += logits.T @ q[rows]
                dV[b, h] += weights.T @ g[rows]
            elif causal:
                mask, up_to = _inside(lam, rows), _up_to(lam, rows)[:, None]
                pairs, scores = mask * (g[rows] @ v[rows].T), mask * (q[rows] @ k[rows].T)
                dQ[b, h, rows] = pairs @ k[rows] + up_to * (g[rows] @ _before(sent, t, lam, parts).T)
                dK[b, h, rows] += pairs.T @ q[rows]
                dV[b, h, rows] += scores.T @ g[rows]
                into += _before(returned[::-1], devices - 1 - t, lam, parts)
            else:
                dQ[b, h, rows] = g[rows] @ sum(sent, np.zeros(_state(Q, V))).T
                into += sum(returned, np.zeros(_state(Q, V)))
            onward = _onward(lam, rows)[:, None]
            dK[b, h, rows] += onward * (v[rows] @ into.T)
            dV[b, h, rows] += onward * (k[rows] @ into)
    return {"Q": dQ * slope_q, "K": dK * slope_k, "V": dV}


def gradient_states(q: Array, g: Array, lam: float, devices: int) -> list[Array]:
    """What the devices send in the backward pass of one head: `sum_i q[i] g[i]^T`, weighted up to each token.

    Args:
        q: `[i,d]`. g: `[i,e]`, gradient of the output.
    """
    return [(_up_to(lam, rows)[:, None] * q[rows]).T @ g[rows] for rows in _parts(len(q), devices)]


def _before(sent: list[Array], t: int, lam: float, parts: list[slice]) -> Array:
    """The states of the first t devices, each decayed over the devices in between."""
    length = parts[0].stop - parts[0].start
    state = np.zeros_like(sent[0])
    for part in sent[:t]:
        state = lam**length * state + part
    return np.asarray(state)


def _inside(lam: float, rows: slice) -> Array:
    """Decay between tokens of a device, 0 towards the future."""
    at = np.arange(rows.stop - rows.start)
    apart = at[:, None] - at[None, :]
    return np.asarray(np.where(apart >= 0, lam ** np.maximum(apart, 0), 0.0))


def _up_to(lam: float, rows: slice) -> Array:
    """Decay from the last token before a device to each of its tokens."""
    return np.asarray(lam ** (np.arange(rows.stop - rows.start) + 1.0))


def _onward(lam: float, rows: slice) -> Array:
    """Decay from each token of a device to its last one."""
    return np.asarray(lam ** (np.arange(rows.stop - rows.start)[::-1] * 1.0))


def _weights(q: Array, k: Array, first: int | None, scale: float | None) -> Array:
    """Softmax weights of a device's queries over the gathered keys; first is the position of its first query."""
    logits = _scale(q, scale) * (q @ k.T)
    if first is not None:
        at = first + np.arange(len(q))
        logits = np.where(np.arange(len(k))[None, :] <= at[:, None], logits, -np.inf)
    if not logits.size:
        return logits
    weights = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    return np.asarray(weights / np.sum(weights, axis=1, keepdims=True))


def _scale(q: Array, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _map(name: str, x: Array) -> tuple[Array, Array]:
    """A feature map and its slope."""
    if name == "identity":
        return x, np.ones(x.shape)
    if name == "relu":
        return np.maximum(x, 0.0), np.where(x > 0, 1.0, 0.0)
    if name == "elu1":
        grown = np.exp(np.minimum(x, 0.0))
        return np.where(x > 0, x + 1.0, grown), np.where(x > 0, 1.0, grown)
    if name != "silu":
        raise ValueError(f"feature_map is {name!r}, expected identity, elu1, relu or silu")
    gate = np.exp(-np.logaddexp(0.0, -x))
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def _parts(tokens: int, devices: int) -> list[slice]:
    length = tokens // devices
    return [slice(t * length, (t + 1) * length) for t in range(devices)]


def _state(Q: Array, V: Array) -> tuple[int, int]:
    return Q.shape[-1], V.shape[-1]
