"""LASP-2 on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.lasp import lasp2  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "lasp2"


def inputs(*names: str, B: int = 1, H: int = 2, N: int = 6, D: int = 4, E: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"Q": (B, H, N, D), "K": (B, H, N, D), "V": (B, H, N, E), "s": (H,)}
    out = {name: torch.randn(shape, generator=g).double().numpy() for name, shape in shapes.items()}
    out["s"] = abs(out["s"])
    return {name: value for name, value in out.items() if name in ("Q", "K", "V", *names)}


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(value).float() for name, value in given.items()}


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed)
    agrees(NAME, lasp2, given, options, gradients=False)


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("feature_map", ["identity", "elu1", "relu", "silu"])
def test_every_number_of_devices_and_feature_map(devices: int, feature_map: str) -> None:
    options = {"devices": devices, "feature_map": feature_map}
    agrees(NAME, lasp2, inputs("s"), options, gradients=False)
    agrees(NAME, lasp2, inputs(), options | {"causal": False}, gradients=False)


@pytest.mark.parametrize("causal", [True, False])
def test_any_strides_more_tokens_than_a_chunk_and_features_than_a_block(causal: bool) -> None:
    given = inputs(H=1, N=74, D=17, E=34)
    options = {"devices": 2, "causal": causal}
    agrees(NAME, lasp2, given, options, layout=strided, gradients=False, tolerance=1e-4)


@pytest.mark.parametrize("layer", ["linear", "softmax"])
@pytest.mark.parametrize("sizes", [{"N": 0}, {"N": 1}, {"B": 0}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int], layer: str) -> None:
    agrees(NAME, lasp2, inputs(**sizes), {"layer": layer}, gradients=False)


def test_sixteen_bits_are_rounded_no_more_than_stated() -> None:
    found = gaps(NAME, lasp2, inputs("s"), {"devices": 2}, dtype=torch.bfloat16, gradients=False)
    assert found["O"] < 0.03, found
    assert found["Mst"] < 0.01, found


def test_what_is_wrong_is_refused() -> None:
    given = tensors(inputs("s"))
    with pytest.raises(ValueError, match="multiple of 4 tokens"):
        lasp2(**given, devices=4)
    with pytest.raises(ValueError, match="only causal linear layers decay"):
        lasp2(**given, causal=False)
    with pytest.raises(ValueError, match="no feature map"):
        lasp2(**tensors(inputs()), layer="softmax", feature_map="relu")
    with pytest.raises(ValueError, match="'linear' or 'softmax'"):
        lasp2(**given, layer="quadratic")
    with pytest.raises(Unsupported, match="gradients"):
        lasp2(**(given | {"Q": given["Q"].requires_grad_()}))
