"""The Triton neighborhood attention against its equations, in Triton's interpreter."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines import neighborhood_launch  # noqa: E402
from attnspec.impls.engines.neighborhood_launch import INTERPRETED, box  # noqa: E402
from attnspec.impls.neighborhood import fused_neighborhood_attention  # noqa: E402
from attnspec.tests.kernel_calls import agrees, strided  # noqa: E402

NAME = "fused_neighborhood_attention"
CASES: dict[str, dict[str, Any]] = {
    "line": {"window_x": 7},
    "even window, stride": {"window_x": 6, "stride_x": 4},
    "causal, stride": {"window_x": 5, "stride_x": 3, "causal_x": True},
    "dilation": {"window_x": 6, "dilation_x": 3},
    "map": {"rows": 5, "window_y": 3, "window_x": 2, "stride_x": 2, "causal_y": True},
    "dilated map": {"rows": 5, "dilation_y": 2, "window_x": 3, "dilation_x": 2, "causal_x": True, "scale": -0.4},
}


def inputs(N: int = 40, X: int | None = None, D: int = 6, E: int = 5, H: int = 2, Hk: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(N)
    shapes = {"Q": (1, H, N, D), "K": (1, Hk, N, D), "V": (1, Hk, N, E)}
    shapes |= {} if X is None else {"Kx": (1, Hk, X, D), "Vx": (1, Hk, X, E)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_the_equations(case: str) -> None:
    x = inputs(X=3 if "map" in case else None)
    agrees(NAME, fused_neighborhood_attention, x, CASES[case], layout=strided)


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
def test_every_tile_configuration(config: Any) -> None:
    x = inputs(70, X=20, H=1)
    options = {"rows": 7, "window_y": 4, "window_x": 3}
    agrees(NAME, fused_neighborhood_attention, x, options, config=config, layout=strided)


@pytest.mark.parametrize(("N", "X"), [(0, None), (0, 2), (1, 0), (1, 2), (33, 0)])
def test_small_and_empty_sizes(N: int, X: int | None) -> None:
    x = inputs(N, X)
    agrees(NAME, fused_neighborhood_attention, x, {}, layout=strided)


def test_a_wrong_window_is_noticed() -> None:
    """The comparison has teeth: a kernel called with another window fails it."""

    def wider(window_x: int, **rest: Any) -> Any:
        return fused_neighborhood_attention(window_x=window_x + 1, **rest)

    with pytest.raises(AssertionError):
        agrees(NAME, wider, inputs(), {"window_x": 7}, layout=strided, gradients=False)


def test_what_a_query_does_not_see_cannot_leak() -> None:
    """Only queries that see a key of NaN become NaN, and only keys that a query of NaN sees get its gradient."""
    x = inputs(30)
    for name in ("K", "V"):
        x[name][0, 0, 11] = np.nan
    agrees(NAME, fused_neighborhood_attention, x, {"window_x": 5}, layout=strided, gradients=False)
    given = {name: torch.tensor(value, dtype=torch.float32) for name, value in inputs(30).items()}
    given["Q"][0, 1, 20] = torch.nan
    for tensor in given.values():
        tensor.requires_grad_()
    O, _ = fused_neighborhood_attention(**given, window_x=5)
    O.sum().backward()
    for name in ("K", "V"):
        broken = given[name].grad[0, 0].isnan().any(-1).nonzero().flatten().tolist()
        assert broken == [18, 19, 20, 21, 22]
    given["V"].detach()[0, 0, 11] = torch.nan
    given["Q"].detach()[0, 1, 20] = 0.0
    given["Q"].grad = None
    fused_neighborhood_attention(**given, window_x=5)[0].sum().backward()
    assert given["Q"].grad[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [9, 10, 11, 12, 13]


def test_extra_keys_gradients_add_up_over_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighborhood_launch, "SPLIT_QUERIES", 16)
    x = inputs(40, X=3)
    agrees(NAME, fused_neighborhood_attention, x, {"window_x": 3}, layout=strided)


@pytest.mark.parametrize("wrong", [
    {"rows": 7}, {"window_x": 41}, {"stride_x": 3, "window_x": 2}, {"window_x": 14, "dilation_x": 3}, {"window_x": 0},
    {"rows": 1.5}, {"Kx": torch.zeros(1, 1, 2, 6)}, {"K": torch.zeros(1, 1, 39, 6)},
    {"Q": torch.zeros(1, 3, 40, 6), "Hk": 2},
])  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    kwargs = {name: torch.tensor(value) for name, value in inputs(Hk=wrong.get("Hk", 1)).items()}
    given = {name: value.float() for name, value in kwargs.items()} | {n: v for n, v in wrong.items() if n != "Hk"}
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        fused_neighborhood_attention(**given)


def test_large_heads_are_refused() -> None:
    with pytest.raises(Unsupported, match="257"):
        fused_neighborhood_attention(*[torch.zeros(1, 1, 4, 257)] * 3)


def test_boxes_are_as_square_as_the_area_allows() -> None:
    assert box(64, 56, 56) == (8, 8) and box(64, 1, 100) == (1, 64)
    assert box(64, 2, 100) == (2, 32) and box(32, 100, 3) == (8, 4)
