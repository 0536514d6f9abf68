"""A whole layer of gated linear attention, as official code computed it, comes out around both readings.

fla-org/flash-linear-attention bc3b101dcb713ddc5bd8924b66754eb68b5ccf89, fla/layers/gla.py GatedLinearAttention.forward
in float64: three heads, low-rank gate with temperature 16, no convolution, RMS norm per head, then times silu of a
gate.
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

TEMPERATURE = 16.0
EPS = 1e-5
READINGS = {
    "equations": lambda inputs, options: load("gla").evaluate(inputs, options),
    "reference": lambda inputs, options: reference.find("gla")[0](**inputs, **options),
}


def layer(z: dict[str, Any], operator: Callable[..., dict[str, Any]], options: dict[str, Any]) -> Any:
    """The layer's output `[b,t,f]`."""
    X, width = z["X"], len(z["norm_weight"])
    heads = z["Wv"].shape[1] // width
    gate = -np.logaddexp(0.0, -(X @ z["W1"] @ z["W2"] + z["bias"])) / TEMPERATURE
    inputs = {name: by_head(X @ z[f"W{name.lower()}"], heads) for name in "QKV"} | {"a": by_head(gate, heads)}
    out = operator(inputs, options)["O"].transpose(0, 2, 1, 3)
    out = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + EPS) * z["norm_weight"]
    outer = X @ z["Wg"]
    return (out.reshape(*X.shape[:2], -1) * outer / (1.0 + np.exp(-outer))) @ z["Wo"]


def by_head(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("reading", READINGS)
def test_the_official_layer_comes_out(reading: str, chunk: int) -> None:
    with np.load(ROOT / "gla" / "case1.npz") as stored:
        z = dict(stored)
    assert gap(layer(z, READINGS[reading], {"chunk": chunk}), z["Y"]) < 1e-11


def test_the_layer_notices_the_decay() -> None:
    with np.load(ROOT / "gla" / "case1.npz") as stored:
        z = dict(stored)
    z["bias"] = z["bias"] + 0.01
    assert gap(layer(z, READINGS["reference"], {}), z["Y"]) > 1e-6
