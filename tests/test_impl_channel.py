"""Channel attention and channel gates on Triton against their equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.channel import (  # noqa: E402
    BLOCKS,
    MOST_CHANNELS,
    MOST_TAPS,
    davit_channel_attention,
    eca_channel_attention,
)
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

DAVIT, ECA = "davit_channel_attention", "eca_channel_attention"
FUNCTIONS: dict[str, Any] = {DAVIT: davit_channel_attention, ECA: eca_channel_attention}


def groups(B: int = 1, G: int = 2, N: int = 7, C: int = 5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(B, G, N, C, generator=g).numpy().astype("f8") for n in "QKV"}


def planes(B: int = 2, C: int = 5, Sy: int = 3, Sx: int = 4, rows: int = 1, T: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"X": (B, C, Sy, Sx), "w": (rows, T)}
    return {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}


def same(name: str, given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(name, FUNCTIONS[name], given, options, gradients=False, **({"tolerance": 5e-6} | more))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_random_calls_equal_the_equations(name: str, seed: int) -> None:
    same(name, *random_call(load(name), seed, largest=9))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_tile_with_any_strides(block: int) -> None:
    same(DAVIT, groups(N=70, C=35, G=1), {"scale": -0.1}, layout=strided, block=block, tolerance=5e-5)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"N": 1, "C": 1}, {"B": 0}, {"N": 33, "C": 17}], ids=str)
def test_groups_of_any_size(sizes: dict[str, int]) -> None:
    same(DAVIT, groups(**sizes), {})


@pytest.mark.parametrize("sizes", [
    {"C": 1}, {"C": 2, "T": 9}, {"rows": 5, "T": 5}, {"Sy": 1, "Sx": 1}, {"B": 0}, {"B": 1, "Sy": 37, "Sx": 41, "C": 2},
], ids=str)  # fmt: skip
def test_planes_of_any_size_with_any_strides(sizes: dict[str, int]) -> None:
    same(ECA, planes(**sizes), {}, layout=strided)


def test_half_precision_is_near_the_equations() -> None:
    same(DAVIT, groups(), {}, dtype=torch.bfloat16, tolerance=0.03)
    same(ECA, planes(), {}, dtype=torch.bfloat16, tolerance=0.02)


def test_wrong_variants_are_noticed() -> None:
    def turned(Q: Any, K: Any, V: Any) -> Any:
        return davit_channel_attention(Q, V, K)

    def shifted(X: Any, w: Any) -> Any:
        return eca_channel_attention(X, w.flip(1))

    assert min(gaps(DAVIT, turned, groups(), {}, gradients=False).values()) > 1e-2
    assert min(gaps(ECA, shifted, planes(), {}, gradients=False).values()) > 1e-2


def test_wrong_arguments_are_named() -> None:
    Q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="V must be of length 4 along c"):
        davit_channel_attention(Q, Q, Q[..., :3])
    with pytest.raises(ValueError, match="block"):
        davit_channel_attention(Q, Q, Q, block=8)
    with pytest.raises(ValueError, match="odd number of taps"):
        eca_channel_attention(Q, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="1 or 2 rows"):
        eca_channel_attention(Q, torch.zeros(3, 3))


def test_what_no_kernel_computes_is_refused() -> None:
    Q = torch.zeros(1, 1, 1, MOST_CHANNELS + 1)
    with pytest.raises(Unsupported, match="c = 1025"):
        davit_channel_attention(Q, Q, Q)
    with pytest.raises(Unsupported, match="taps"):
        eca_channel_attention(Q, torch.zeros(1, MOST_TAPS + 1))
    with pytest.raises(Unsupported, match="gradients"):
        eca_channel_attention(torch.zeros(1, 1, 1, 1, requires_grad=True), torch.zeros(1, 3))
