"""Auto-correlation on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.auto_correlation import BLOCKS, INTERPRETED, MODES, auto_correlation  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "auto_correlation"


def inputs(B: int = 2, H: int = 2, N: int = 12, M: int = 9, D: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, D)}
    return {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}


def same(given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(NAME, auto_correlation, given, options, gradients=False, **({"tolerance": 1e-5} | more))


@pytest.mark.parametrize("seed", range(5))
def test_random_calls_equal_the_equations(seed: int) -> None:
    same(*random_call(load(NAME), seed, largest=9))


@pytest.mark.parametrize("block", (*BLOCKS, INTERPRETED))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_tile_with_any_strides(mode: str, block: int) -> None:
    same(inputs(N=70, M=75, D=5), {"mode": mode}, layout=strided, block=block)
    same(inputs(N=40, M=23, D=70, B=1), {"mode": mode, "factor": 1.7}, block=block)


@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 99}, {"factor": 0.0}, {"factor": 9.0},
], ids=str)  # fmt: skip
def test_every_number_of_delays(options: dict[str, Any]) -> None:
    for mode in MODES:
        same(inputs(), options | {"mode": mode})


@pytest.mark.parametrize("sizes", [{"N": 1}, {"M": 1}, {"N": 1, "M": 1, "B": 1, "H": 1, "D": 1}], ids=str)
def test_small_sizes(sizes: dict[str, int]) -> None:
    same(inputs(**sizes), {})


def test_steps_beyond_the_queries_are_not_read() -> None:
    x = {n: torch.tensor(v).float() for n, v in inputs(N=5, M=9).items()}
    want = auto_correlation(**x)
    x["K"][:, :, 5:] = torch.nan
    x["V"][:, :, 5:] = torch.nan
    assert torch.equal(auto_correlation(**x), want)


def test_half_precision_is_near_the_equations_and_a_wrong_roll_is_noticed() -> None:
    same(inputs(), {}, dtype=torch.bfloat16, tolerance=0.03)
    assert gaps(NAME, lambda Q, K, V: auto_correlation(K, Q, V), inputs(M=12), {}, gradients=False)["O"] > 1e-2


@pytest.mark.parametrize(("change", "message"), [
    ({"mode": "fast"}, "mode"), ({"top_k": 0}, "top_k"), ({"factor": -1.0}, "factor"), ({"block": 8}, "block"),
    ({"V": torch.zeros(2, 2, 8, 3)}, "V"), ({"Q": torch.zeros(2, 2, 0, 3)}, "empty"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auto_correlation(**({n: torch.tensor(v).float() for n, v in inputs().items()} | change))


def test_gradients_are_refused() -> None:
    with pytest.raises(Unsupported, match="gradients"):
        auto_correlation(*(torch.zeros(1, 1, 2, 2, requires_grad=True) for _ in range(3)))
