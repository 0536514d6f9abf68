"""Deformable attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.deformable import BLOCKS, INTERPRETED, deformable_attention  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided, tensors  # noqa: E402

NAME = "deformable_attention"


def inputs(*names: str, B: int = 1, H: int = 2, N: int = 5, L: int = 2, P: int = 3, E: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "V": (B, H, L, 6, 5, E), "ref": (B, N, 1, 2), "off": (B, H, N, L, P, 2), "logits": (B, H, N, L, P),
        "box": (B, N, L, 2),
    }  # fmt: skip
    out: dict[str, Any] = {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}
    out |= {"ref": 1 / (1 + abs(out["ref"])), "box": abs(out["box"]) + 0.1, "off": 2 * out["off"]}
    out["mask"] = (torch.rand(B, L, 6, 5, generator=g) < 0.7).numpy()
    out["height"], out["width"] = torch.arange(6, 6 - L, -1).numpy(), torch.arange(6 - L, 6).numpy()
    return {n: out[n] for n in ("V", "height", "width", "ref", "off", "logits", *names)}


def same(given: dict[str, Any], **more: Any) -> None:
    agrees(NAME, deformable_attention, given, {}, gradients=False, **({"tolerance": 5e-6} | more))


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, _ = random_call(load(NAME), seed)
    same(given)


@pytest.mark.parametrize("names", [(), ("mask",), ("box",), ("box", "mask")], ids=str)
def test_every_optional_input_with_any_strides(names: tuple[str, ...]) -> None:
    same(inputs(*names), layout=strided)


@pytest.mark.parametrize("block", (*BLOCKS, INTERPRETED))
def test_every_tile_and_features_beyond_a_tile(block: int) -> None:
    same(inputs(N=33, H=1, P=1, E=70), block=block)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"B": 0}, {"N": 1, "L": 1, "P": 1, "E": 1}], ids=str)
def test_small_sizes(sizes: dict[str, int]) -> None:
    same(inputs("mask", **sizes))


def test_offsets_far_outside_hit_nothing_and_what_is_no_map_is_not_read() -> None:
    x = tensors(inputs())
    want = deformable_attention(**x)
    spoilt = x | {"V": x["V"].clone()}
    spoilt["V"][:, :, 0, :, 4:] = torch.nan
    spoilt["V"][:, :, 1, 5:] = torch.nan
    assert torch.equal(deformable_attention(**spoilt), want) and want.any()
    for far in (1e9, -1e30, torch.inf):
        assert not deformable_attention(**(x | {"off": torch.full_like(x["off"], far)})).any()


def test_half_precision_is_near_the_equations_and_swapped_axes_are_noticed() -> None:
    same(inputs(), dtype=torch.bfloat16, tolerance=0.03)

    def swapped(height: Any, width: Any, **x: Any) -> Any:
        return deformable_attention(height=width, width=height.clamp(max=5), **x)

    assert gaps(NAME, swapped, inputs(), {}, gradients=False)["O"] > 1e-2


@pytest.mark.parametrize(("change", "message"), [
    ({"height": torch.tensor([7, 1])}, "height"), ({"width": torch.tensor([0, 1])}, "width"), ({"block": 3}, "block"),
    ({"ref": torch.zeros(1, 5, 3, 2)}, "ref"), ({"off": torch.zeros(1, 2, 5, 2, 3, 3)}, "off"),
    ({"mask": torch.zeros(1, 2, 6, 5)}, "mask"), ({"width": torch.tensor([1.0, 1.0])}, "width"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deformable_attention(**(tensors(inputs()) | change))


def test_gradients_are_refused() -> None:
    x = tensors(inputs())
    x["off"].requires_grad_()
    with pytest.raises(Unsupported, match="gradients"):
        deformable_attention(**x)
