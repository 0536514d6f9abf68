"""A whole gated delta rule layer, as official code computed it, comes out around both readings.

transformers 5.23.0, models/qwen3_next/modeling_qwen3_next.py Qwen3NextGatedDeltaNet.forward in float64: two key
heads, four value heads, causal convolutions over four tokens with SiLU, normalised queries and keys, gated RMS norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT
from attnspec.tests.test_reference import gap

KEY_HEADS = 2
EPS = 1e-6
READINGS = {
    "equations": lambda inputs, options: load("gated_delta_rule").evaluate(inputs, options),
    "reference": lambda inputs, options: reference.find("gated_delta_rule")[0](**inputs, **options),
}


def layer(z: dict[str, Any], operator: Callable[..., dict[str, Any]], options: dict[str, Any]) -> Any:
    """The layer's output `[b,t,f]`."""
    X = z["X"]
    inputs = {
        name: by_head(convolved(X @ z[f"W{name.lower()}"], z[f"conv_{name.lower()}"]), heads)
        for name, heads in (("Q", KEY_HEADS), ("K", KEY_HEADS), ("V", len(z["A_log"])))
    }
    inputs["beta"] = (1.0 / (1.0 + np.exp(-(X @ z["Wb"])))).transpose(0, 2, 1)
    inputs["g"] = (-np.exp(z["A_log"]) * np.logaddexp(0.0, X @ z["Wa"] + z["dt_bias"])).transpose(0, 2, 1)
    out = operator(inputs, {"normalize_qk": True, **options})["O"].transpose(0, 2, 1, 3)
    out = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + EPS) * z["norm_weight"]
    return (out.reshape(*X.shape[:2], -1) * silu(X @ z["Wz"])) @ z["Wo"]


def convolved(x: Any, taps: Any) -> Any:
    """Causal convolution of each channel, the last tap for the token itself, and SiLU. x: `[b,t,c]`, taps: `[c,4]`."""
    padded = np.concatenate([np.zeros((len(x), taps.shape[1] - 1, x.shape[2])), x], axis=1)
    return silu(sum(padded[:, tap : tap + x.shape[1]] * taps[:, tap] for tap in range(taps.shape[1])))


def silu(x: Any) -> Any:
    return x / (1.0 + np.exp(-x))


def by_head(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("reading", READINGS)
def test_the_official_layer_comes_out(reading: str, chunk: int) -> None:
    with np.load(ROOT / "gated_delta_rule" / "case1.npz") as stored:
        z = dict(stored)
    assert gap(layer(z, READINGS[reading], {"chunk": chunk}), z["Y"]) < 1e-11


def test_the_layer_notices_the_decay() -> None:
    with np.load(ROOT / "gated_delta_rule" / "case1.npz") as stored:
        z = dict(stored)
    z["dt_bias"] = z["dt_bias"] + 0.01
    assert gap(layer(z, READINGS["reference"], {}), z["Y"]) > 1e-6
