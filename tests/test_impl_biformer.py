"""The Triton bi-level routing attention against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.biformer import biformer_bra  # noqa: E402
from attnspec.impls.engines.biformer_launch import INTERPRETED  # noqa: E402
from attnspec.tests.kernel_calls import agrees, strided  # noqa: E402

NAME = "biformer_bra"
compare = partial(agrees, NAME, biformer_bra, layout=strided, gradients=False)


def inputs(Y: int = 7, X: int = 5, side: int = 0, B: int = 1, H: int = 2, D: int = 6, E: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(Y)
    shapes: dict[str, tuple[int, ...]] = {"Q": (B, H, Y, X, D), "K": (B, H, Y, X, D), "V": (B, H, Y, X, E)}
    shapes |= {"lepe_w": (H * E, side, side), "lepe_b": (H * E,)} if side else {}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
@pytest.mark.parametrize("padding", ["masked", "zeros"])
def test_output_equals_the_equations(config: Any, padding: str) -> None:
    options = {"n_win": 2, "topk": 2, "padding": padding}
    compare(inputs(9, 8, H=1), options, config=config)


def test_soft_routing_and_local_enhancement() -> None:
    compare(inputs(side=3), {"n_win": 2, "topk": 3, "soft_routing": True, "scale": 0.6})
    compare(inputs(side=3, H=1), {"n_win": 2, "soft_routing": True, "padding": "zeros"})


@pytest.mark.parametrize(("Y", "X", "n_win", "topk"), [(1, 1, 7, 4), (2, 3, 9, 1), (3, 1, 1, 1), (4, 4, 2, 99)])
def test_small_maps_and_any_number_of_regions(Y: int, X: int, n_win: int, topk: int) -> None:
    compare(inputs(Y, X), {"n_win": n_win, "topk": topk})


def test_an_empty_batch() -> None:
    compare(inputs(B=0), {})


def test_equal_scores_keep_the_lower_region() -> None:
    x = inputs(6, 6, H=1)
    x["K"][:] = 0.25
    compare(x, {"n_win": 3, "topk": 2})


def test_another_choice_is_noticed() -> None:
    """The comparison has teeth: a kernel that keeps one region more fails it."""

    def more(topk: int, **rest: Any) -> Any:
        return biformer_bra(topk=topk + 1, **rest)

    with pytest.raises(AssertionError):
        agrees(NAME, more, inputs(), {"n_win": 2, "topk": 2}, gradients=False)


def test_regions_that_are_not_kept_cannot_leak() -> None:
    x = inputs(6, 6, H=1)
    x["K"][:, :, :2, :2] = -9 * np.sign(x["Q"].mean((2, 3)))[:, :, None, None]
    x["V"][:, :, :2, :2] = np.nan
    compare(x, {"n_win": 3, "topk": 1})


@pytest.mark.parametrize("wrong", [
    {"n_win": 0}, {"topk": 0}, {"padding": "none"}, {"lepe_w": torch.zeros(6, 2, 2)}, {"lepe_w": torch.zeros(5, 3, 3)},
    {"lepe_b": torch.zeros(6)}, {"K": torch.zeros(1, 2, 7, 4, 6)}, {"Q": torch.zeros(2, 7, 5, 6)},
])  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    given = {name: torch.tensor(value).float() for name, value in inputs().items()}
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        biformer_bra(**given | wrong)


def test_gradients_and_large_heads_are_refused() -> None:
    x = torch.zeros(1, 1, 2, 2, 4)
    with pytest.raises(Unsupported, match="no_grad"):
        biformer_bra(x.clone().requires_grad_(), x, x)
    with pytest.raises(Unsupported, match="257"):
        biformer_bra(*[torch.zeros(1, 1, 2, 2, 257)] * 3)
