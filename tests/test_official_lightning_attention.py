"""A whole layer of TransNormerLLM, as official code computed it, comes out around both readings.

OpenNLPLab/lightning-attention d15c38529bbd5c2c82b44ddda3cac885825aa873, examples/module/tnl_attn.py
TnlAttention.forward in float64, its kernel replaced by lightning_attn/ops/torch/linear_attention.py linear_attn: three
heads, second of five layers, silu of queries, keys and values, LayerNorm over all heads, sigmoid of a low-rank gate.
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

EPS = 1e-5
LAYER, LAYERS = 1, 5
READINGS = {
    "equations": lambda inputs, options: load("lightning_attention").evaluate(inputs, options),
    "reference": lambda inputs, options: reference.find("lightning_attention")[0](**inputs, **options),
}


def layer(z: dict[str, Any], operator: Callable[..., dict[str, Any]], options: dict[str, Any]) -> Any:
    """The layer's output `[b,t,f]`."""
    X, heads = z["X"], len(z["s"])
    inputs = {name: by_head(silu(X @ z[f"W{name.lower()}"]), heads) for name in "QKV"} | {"s": z["s"]}
    out = operator(inputs, options)["O"].transpose(0, 2, 1, 3).reshape(*X.shape[:2], -1)
    out = out - np.mean(out, axis=-1, keepdims=True)
    out = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + EPS) * z["norm_weight"] + z["norm_bias"]
    return (out / (1.0 + np.exp(-(X @ z["Wg1"] @ z["Wg2"])))) @ z["Wo"]


def silu(x: Any) -> Any:
    return x / (1.0 + np.exp(-x))


def by_head(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def slopes(heads: int) -> list[float]:
    """Those of ALiBi; between two powers of two, those of the lower one, then every other one of the higher."""
    lower = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (h + 1) / lower) for h in range(lower)]
    return first if lower == heads else first + slopes(2 * lower)[::2][: heads - lower]


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("reading", READINGS)
def test_the_official_layer_comes_out(reading: str, block: int) -> None:
    with np.load(ROOT / "lightning_attention" / "case1.npz") as stored:
        z = dict(stored)
    assert gap(layer(z, READINGS[reading], {"block": block}), z["Y"]) < 1e-11


def test_the_layer_notices_the_decay() -> None:
    with np.load(ROOT / "lightning_attention" / "case1.npz") as stored:
        z = dict(stored)
    z["s"] = z["s"] + 0.01
    assert gap(layer(z, READINGS["reference"], {}), z["Y"]) > 1e-6


def test_the_decay_rates_are_slopes_that_shrink_from_layer_to_layer() -> None:
    with np.load(ROOT / "lightning_attention" / "case0.npz") as stored:
        assert gap(stored["s"], np.array(slopes(3))) < 1e-15
    with np.load(ROOT / "lightning_attention" / "case1.npz") as stored:
        rates = np.array(slopes(len(stored["s"]))) * (1.0 - LAYER / (LAYERS - 1) + 1e-5)
        assert gap(stored["s"], rates) < 1e-7  # a buffer in float32
