"""Whole layers of multi-head latent attention, as official code computed them, come out around both readings.

deepseek-ai/DeepSeek-V3 9b4e9788e4a3a731f7567338ed15d3ec549ce03b, inference/model.py MLA.forward, explicit ("naive")
and absorbed, in float64. Case 0 has no query rank and no YaRN and is one prefill; case 1 has both and decodes its
last five tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT
from attnspec.tests.test_reference import gap

EPS = 1e-6
YARN = {"case0": {}, "case1": {"yarn_factor": 8.0, "yarn_mscale": 0.707}}
READINGS = {
    "equations": lambda inputs, options: load("mla").evaluate(inputs, options),
    "reference": lambda inputs, options: reference.find("mla")[0](**inputs, **options),
}


def stored(case: str) -> dict[str, Any]:
    with np.load(ROOT / "mla" / f"{case}.npz") as arrays:
        return dict(arrays)


def normalised(x: Any, weight: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def rotated(x: Any, freq: Any) -> Any:
    """Neighbouring features turned by position times frequency; positions are the last but one axis."""
    angle = np.arange(x.shape[-2])[:, None] * freq
    out = np.empty(x.shape)
    out[..., 0::2] = x[..., 0::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    out[..., 1::2] = x[..., 0::2] * np.sin(angle) + x[..., 1::2] * np.cos(angle)
    return out


def queries(z: dict[str, Any]) -> tuple[Any, Any]:
    """Queries without and with rotation, the latter not rotated yet. `[b,h,i,d]`, `[b,h,i,u]`"""
    if "Wq" in z:
        q = np.einsum("bif,fhd->bhid", z["X"], z["Wq"])
    else:
        q = np.einsum("bir,hdr->bhid", normalised(z["X"] @ z["Wdq"], z["gq"]), z["Wuq"])
    width = z["Wuk"].shape[1]
    return q[..., :width], q[..., width:]


def agrees(z: dict[str, Any], out: Any) -> bool:
    """Whether heads and their projection are the recorded ones, in both of the code's forms."""
    whole = out.transpose(0, 2, 1, 3).reshape(*out.shape[:1], out.shape[2], -1) @ z["Wo"].T
    recorded = ((out, "o_explicit"), (out, "o_absorbed"), (whole, "out_explicit"), (whole, "out_absorbed"))
    return all(gap(got, z[name]) < 1e-11 for got, name in recorded)


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_layer_that_normalises_and_rotates_inside_comes_out(reading: str, case: str) -> None:
    z = stored(case)
    inputs = dict(zip(("Qn", "Qr"), queries(z), strict=True))
    inputs |= {"C": z["X"] @ z["Wdkv"], "Kr": z["X"] @ z["Wkr"], "Wuk": z["Wuk"], "Wuv": z["Wuv"]}
    inputs |= {"norm_weight": z["gkv"], "freq": z["f"]}
    assert agrees(z, READINGS[reading](inputs, {"causal": True, **YARN[case]})["O"])


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_layer_over_the_recorded_cache_comes_out(reading: str, case: str) -> None:
    z = stored(case)
    plain, rotary = queries(z)
    inputs = {"Qn": plain, "Qr": rotated(rotary, z["f"]), "C": z["c"], "Kr": z["kr"]}
    inputs |= {"Wuk": z["Wuk"], "Wuv": z["Wuv"]}
    assert agrees(z, READINGS[reading](inputs, {"causal": True, "scale": float(z["scale"])})["O"])
    inputs |= {"C": normalised(z["X"] @ z["Wdkv"], z["gkv"]), "Kr": rotated(z["X"] @ z["Wkr"], z["f"])}
    assert gap(inputs["C"], z["c"]) < 1e-11
    assert gap(inputs["Kr"], z["kr"]) < 1e-11


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_every_form_of_the_equations_gives_the_recorded_heads(case: str) -> None:
    z = stored(case)
    inputs = dict(zip(("Qn", "Qr"), queries(z), strict=True))
    inputs |= {"C": z["X"] @ z["Wdkv"], "Kr": z["X"] @ z["Wkr"], "Wuk": z["Wuk"], "Wuv": z["Wuv"]}
    inputs |= {"norm_weight": z["gkv"], "freq": z["f"]}
    mechanism = load("mla")
    assert mechanism.forms
    for form in mechanism.forms:
        assert agrees(z, mechanism.evaluate(inputs, {"causal": True, **YARN[case]}, form=form)["O"]), form


@pytest.mark.parametrize("reading", READINGS)
def test_the_last_tokens_decoded_one_by_one_come_out(reading: str) -> None:
    z = stored("case1")
    plain, rotary = queries(z)
    heads = []
    for length in range(7, 12):
        inputs = {"Qn": plain[:, :, length - 1 : length], "Qr": rotary[:, :, length - 1 : length]}
        inputs |= {"C": z["X"] @ z["Wdkv"], "Kr": z["X"] @ z["Wkr"], "Wuk": z["Wuk"], "Wuv": z["Wuv"]}
        inputs |= {"norm_weight": z["gkv"], "freq": z["f"], "kv_length": np.array([length])}
        heads.append(READINGS[reading](inputs, {"causal": True, **YARN["case1"]})["O"])
    assert gap(np.concatenate(heads, axis=2), z["o_absorbed"][:, :, 6:]) < 1e-11


def test_the_factor_of_the_context_extension_matters() -> None:
    z = stored("case1")
    inputs = dict(zip(("Qn", "Qr"), queries(z), strict=True))
    inputs |= {"C": z["X"] @ z["Wdkv"], "Kr": z["X"] @ z["Wkr"], "Wuk": z["Wuk"], "Wuv": z["Wuv"]}
    inputs |= {"norm_weight": z["gkv"], "freq": z["f"]}
    assert not agrees(z, READINGS["reference"](inputs, {"causal": True})["O"])
