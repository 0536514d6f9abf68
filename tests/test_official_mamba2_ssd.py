"""A whole Mamba-2 layer, as official code computed it, comes out around both readings.

state-spaces/mamba e9594ce1c732d97440f0332fdc43170a2294dbfa, mamba_ssm/modules/mamba2.py Mamba2.forward in float64: six
heads in two groups, causal convolution over four tokens with bias and SiLU, the gate before an RMS norm of each group.
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

GROUPS, STATE = 2, 3
EPS = 1e-5
READINGS = {
    "equations": lambda inputs, options: load("mamba2_ssd").evaluate(inputs, options),
    "reference": lambda inputs, options: reference.find("mamba2_ssd")[0](**inputs, **options),
}


def layer(z: dict[str, Any], operator: Callable[..., dict[str, Any]], options: dict[str, Any]) -> Any:
    """The layer's output `[b,t,f]`."""
    X, inner, heads = z["X"], len(z["norm_weight"]), len(z["A_log"])
    gate, mixed, dt = np.split(X @ z["W_in"], [inner, 2 * inner + 2 * GROUPS * STATE], axis=-1)
    x, B, C = np.split(
        convolved(mixed, z["conv_weight"], z["conv_bias"]), [inner, inner + GROUPS * STATE], axis=-1
    )  # fmt: skip
    inputs = {
        "C": by_head(C, GROUPS), "B": by_head(B, GROUPS), "x": by_head(x, heads), "z": by_head(gate, heads),
        "dt": dt.transpose(0, 2, 1), "A": -np.exp(z["A_log"]), "dt_bias": z["dt_bias"], "Dskip": z["Dskip"][:, None],
    }  # fmt: skip
    y = operator(inputs, options)["y"].transpose(0, 2, 1, 3).reshape(*X.shape[:2], GROUPS, -1)
    y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + EPS)
    return (y.reshape(*X.shape[:2], inner) * z["norm_weight"]) @ z["W_out"]


def convolved(x: Any, taps: Any, bias: Any) -> Any:
    """Causal convolution of each channel, the last tap for the token itself, and SiLU. x: `[b,t,c]`, taps: `[c,4]`."""
    padded = np.concatenate([np.zeros((len(x), taps.shape[1] - 1, x.shape[2])), x], axis=1)
    out = bias + sum(padded[:, tap : tap + x.shape[1]] * taps[:, tap] for tap in range(taps.shape[1]))
    return out / (1.0 + np.exp(-out))


def by_head(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("reading", READINGS)
def test_the_official_layer_comes_out(reading: str, chunk: int) -> None:
    with np.load(ROOT / "mamba2_ssd" / "case1.npz") as stored:
        z = dict(stored)
    assert gap(layer(z, READINGS[reading], {"chunk": chunk}), z["Y"]) < 1e-11


def test_the_layer_notices_the_step() -> None:
    with np.load(ROOT / "mamba2_ssd" / "case1.npz") as stored:
        z = dict(stored)
    z["dt_bias"] = z["dt_bias"] + 0.01
    assert gap(layer(z, READINGS["reference"], {}), z["Y"]) > 1e-6
