"""Flow attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.flow import BLOCKS, flow_attention  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "flow_attention"


def inputs(B: int = 2, H: int = 2, N: int = 7, M: int = 9, D: int = 5, E: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E)}
    return {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}


def same(given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(NAME, flow_attention, given, options, gradients=False, **({"tolerance": 2e-6} | more))


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_equal_the_equations(seed: int) -> None:
    same(*random_call(load(NAME), seed, largest=9))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_tile_with_any_strides(causal: bool, block: int) -> None:
    same(inputs(B=1, H=1, N=70, M=70, D=17, E=66), {"causal": causal}, layout=strided, block=block)


@pytest.mark.parametrize("options", [
    {"phi": "relu"}, {"clip_at": float("inf")}, {"clip_at": 0.1}, {"eps": 0.5, "outer_eps": 0.25},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_every_option(causal: bool, options: dict[str, Any]) -> None:
    same(inputs(M=7), options | {"causal": causal})


@pytest.mark.parametrize("causal", [False, True])
def test_long_rows_in_blocks_of_features(causal: bool) -> None:
    same(inputs(B=1, H=1, N=20, M=20, D=130, E=70), {"causal": causal})


def test_lengths_cut_off_padding_even_where_it_is_not_finite() -> None:
    x = inputs() | {"q_length": torch.tensor([5, 0]).numpy(), "kv_length": torch.tensor([0, 8]).numpy()}
    same(x, {})
    x = {n: torch.tensor(v).float() if v.dtype == float else torch.tensor(v) for n, v in x.items()}
    x |= {"q_length": torch.tensor([5, 3]), "kv_length": torch.tensor([4, 8])}
    want = flow_attention(**x)
    for name, first in (("Q", 5), ("K", 4), ("V", 4)):
        x[name][0, :, first:] = torch.nan
    assert torch.equal(flow_attention(**x), want) and not want[0, :, 5:].any()


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}, {"N": 0, "M": 0}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    same(inputs(**sizes), {"eps": 0.0})
    if sizes.get("N", 7) == sizes.get("M", 9):
        same(inputs(**sizes), {"causal": True})


def test_the_future_does_not_leak() -> None:
    x = {n: torch.tensor(v).float() for n, v in inputs(N=40, M=40).items()}
    want = flow_attention(**x, causal=True)
    for name in x:
        spoilt = x | {name: x[name].clone()}
        spoilt[name][:, :, 35] = torch.nan
        got = flow_attention(**spoilt, causal=True)
        assert torch.equal(got[:, :, :35], want[:, :, :35]) and torch.isnan(got[:, :, 35]).all()


def test_half_precision_is_near_the_equations_and_a_wrong_clip_is_noticed() -> None:
    same(inputs(), {}, dtype=torch.bfloat16, tolerance=0.02)
    assert gaps(NAME, lambda clip_at, **x: flow_attention(**x), inputs(), {"clip_at": 0.1}, gradients=False)["O"] > 1e-3


@pytest.mark.parametrize(("change", "message"), [
    ({"causal": True}, "as many positions"), ({"phi": "elu"}, "phi"), ({"eps": -1.0}, "eps"), ({"block": 8}, "block"),
    ({"kv_length": torch.tensor([3, 10])}, "kv_length"), ({"clip_at": float("nan")}, "clip_at"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow_attention(**({n: torch.tensor(v).float() for n, v in inputs().items()} | change))


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(Unsupported, match="d = 257"):
        flow_attention(*(torch.zeros(1, 1, 1, 257) for _ in range(3)))
    with pytest.raises(Unsupported, match="gradients"):
        flow_attention(*(torch.zeros(1, 1, 1, 2, requires_grad=True) for _ in range(3)))
