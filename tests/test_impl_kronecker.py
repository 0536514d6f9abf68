"""Third-order attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.kronecker import INTERPRETED, kronecker_tensor_attention  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided, tensors  # noqa: E402

NAME = "kronecker_tensor_attention"
FUNCTION = kronecker_tensor_attention


def inputs(B: int = 1, H: int = 2, G: int = 1, N: int = 5, M: int = 6, L: int = 7, D: int = 5, E: int = 4) -> Any:
    g = torch.Generator().manual_seed(0)
    shapes = {"Q": (B, H, N, D), "K1": (B, G, M, D), "K2": (B, G, L, D), "V1": (B, G, M, E), "V2": (B, G, L, E)}
    return {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}


def same(given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(NAME, FUNCTION, given, options, gradients=False, **({"tolerance": 5e-6} | more))


@pytest.mark.parametrize("seed", range(5))
def test_random_calls_equal_the_equations(seed: int) -> None:
    same(*random_call(load(NAME), seed))


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_configuration_with_any_strides(causal: bool, config: Any) -> None:
    given = inputs(H=2, G=2, N=37, M=35, L=9, D=17, E=18)
    same(given, {"causal": causal, "scale": 0.7}, layout=strided, config=config)


@pytest.mark.parametrize("sizes", [
    {"N": 0}, {"M": 0}, {"L": 0}, {"B": 0}, {"N": 1, "M": 1, "L": 1, "D": 1, "E": 1}, {"H": 6, "G": 3},
    {"N": 20, "L": 3},
], ids=str)  # fmt: skip
def test_any_size(sizes: dict[str, int]) -> None:
    same(inputs(**sizes), {"causal": True})
    same(inputs(**sizes), {})


def test_keys_of_the_future_do_not_leak() -> None:
    x = tensors(inputs(N=6, M=6, L=6))
    want = FUNCTION(**x, causal=True)
    for name in ("K1", "K2", "V1", "V2"):
        spoilt = x | {name: x[name].clone()}
        spoilt[name][:, :, 4] = torch.nan
        got = FUNCTION(**spoilt, causal=True)
        assert torch.equal(got[0][:, :, :4], want[0][:, :, :4]) and torch.isnan(got[0][:, :, 4:]).all(), name


def test_half_precision_is_near_the_equations_and_a_wrong_scale_is_noticed() -> None:
    same(inputs(), {}, dtype=torch.bfloat16, tolerance=0.03)
    found = gaps(NAME, lambda **x: FUNCTION(**x, scale=0.3), inputs(), {}, gradients=False)
    assert min(found.values()) > 1e-2


@pytest.mark.parametrize(("change", "message"), [
    ({"Q": torch.zeros(1, 3, 5, 5), "K1": torch.zeros(1, 2, 6, 5)}, "K2"), ({"V2": torch.zeros(1, 1, 6, 4)}, "V2"),
    ({"causal": 0}, "causal"), ({"scale": float("inf")}, "scale"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FUNCTION(**(tensors(inputs()) | change))


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(Unsupported, match="e = 257"):
        FUNCTION(**tensors(inputs(E=257)))
    x = tensors(inputs())
    x["V2"].requires_grad_()
    with pytest.raises(Unsupported, match="gradients"):
        FUNCTION(**x)
