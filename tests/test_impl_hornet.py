"""Recursive gated convolution on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.hornet import BLOCKS, INTERPRETED, hornet_gnconv  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided, tensors  # noqa: E402

NAME = "hornet_gnconv"
BIASES = ("in_bias", "dw_bias", "p_bias", "out_bias")


def inputs(*names: str, B: int = 1, C: int = 4, Sy: int = 3, Sx: int = 4, k: int = 2, R: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    F = 2 * C - C // 2**k
    shapes = {
        "X": (B, C, Sy, Sx), "Win": (2 * C, C), "DW": (F, R, R), "P": (k, C, C // 2), "Wout": (C, C),
        "in_bias": (2 * C,), "dw_bias": (F,), "p_bias": (k, C), "out_bias": (C,),
    }  # fmt: skip
    small = {"Win": C**-0.5, "P": C**-0.5, "Wout": C**-0.5}
    out = {n: (torch.randn(s, generator=g) * small.get(n, 1.0)).numpy().astype("f8") for n, s in shapes.items()}
    return {n: out[n] for n in ("X", "Win", "DW", "P", "Wout", *names)}


def same(given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(NAME, hornet_gnconv, given, options, gradients=False, **({"tolerance": 1e-5} | more))


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_equal_the_equations(seed: int) -> None:
    same(*random_call(load(NAME), seed))


@pytest.mark.parametrize("names", [(), *((name,) for name in BIASES), BIASES], ids=str)
def test_every_bias_with_any_strides(names: tuple[str, ...]) -> None:
    same(inputs(*names), {"scale": 1 / 3}, layout=strided)


@pytest.mark.parametrize("block", (*BLOCKS, INTERPRETED))
def test_every_tile(block: int) -> None:
    same(inputs(*BIASES, C=36, Sy=5, Sx=9, k=1, R=1), {}, block=block)


@pytest.mark.parametrize("sizes", [
    {"B": 0}, {"C": 1, "k": 0}, {"C": 2, "k": 1, "Sy": 1, "Sx": 1, "R": 5}, {"C": 8, "k": 3}, {"C": 6, "k": 1},
], ids=str)  # fmt: skip
def test_any_order_and_size(sizes: dict[str, int]) -> None:
    same(inputs(*BIASES, **sizes), {})


def test_what_the_maps_do_not_read_does_not_matter() -> None:
    x = tensors(inputs("p_bias"))
    want = hornet_gnconv(**x)
    x["P"][0, 2:], x["P"][0, :, 1:], x["p_bias"][0, 2:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(hornet_gnconv(**x), want)


def test_half_precision_is_near_the_equations_and_a_convolution_turned_is_noticed() -> None:
    same(inputs(), {}, dtype=torch.bfloat16, tolerance=0.03)

    def turned(DW: Any, **x: Any) -> Any:
        return hornet_gnconv(DW=DW.flip(1, 2), **x)

    assert gaps(NAME, turned, inputs(), {}, gradients=False)["O"] > 1e-2


@pytest.mark.parametrize(("change", "message"), [
    ({"X": torch.zeros(1, 6, 3, 4)}, "multiple of 2"), ({"DW": torch.zeros(7, 2, 2)}, "odd side"),
    ({"block": 8}, "block"),
    ({"DW": torch.zeros(7, 3, 5)}, "DW"), ({"Wout": torch.zeros(4, 3)}, "Wout"),
    ({"dw_bias": torch.zeros(8)}, "dw_bias"),
    ({"P": torch.zeros(2, 4)}, "P"), ({"scale": "1"}, "scale"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        hornet_gnconv(**(tensors(inputs()) | change))


def test_gradients_are_refused() -> None:
    x = tensors(inputs())
    x["P"].requires_grad_()
    with pytest.raises(Unsupported, match="gradients"):
        hornet_gnconv(**x)
