"""The Triton landmark attention against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.landmark_launch import INTERPRETED  # noqa: E402
from attnspec.impls.landmark import landmark_attention  # noqa: E402
from attnspec.tests.kernel_calls import agrees, strided  # noqa: E402

NAME = "landmark_attention"
WRT = ("Q", "K", "V")
# Ends of blocks: some long, some of one token, some empty; the second entry of the batch has few.
ENDS = ([0, 7, 8, 11, 30], [20])


def inputs(N: int = 37, M: int = 37, B: int = 2, H: int = 2, D: int = 6, E: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(M)
    landmark = np.zeros((B, M), dtype=bool)
    for row, ends in zip(landmark, ENDS):
        row[[at for at in ends if at < M]] = True
    shapes = {"Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"landmark": landmark}


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
def test_outputs_and_gradients_equal_the_equations(config: Any) -> None:
    agrees(NAME, landmark_attention, inputs(H=1), {}, config=config, layout=strided)


@pytest.mark.parametrize("select", ["token_and_head", "over_heads", "over_tokens"])
def test_retrieval_of_cached_blocks(select: str) -> None:
    agrees(NAME, landmark_attention, inputs(3), {"topk": 2, "select": select}, layout=strided)


@pytest.mark.parametrize("topk", [0, 1, 9])
def test_any_number_of_blocks_is_fetched(topk: int) -> None:
    agrees(NAME, landmark_attention, inputs(4, H=1), {"topk": topk, "scale": -0.7}, layout=strided, gradients=False)


def test_equal_ratings_fetch_the_earlier_block() -> None:
    x = inputs(2, H=1)
    x["K"][:, :, x["landmark"][0]] = 0.5
    agrees(NAME, landmark_attention, x, {"topk": 2}, layout=strided, gradients=False)


@pytest.mark.parametrize(("N", "M"), [(0, 0), (0, 5), (5, 0), (1, 1), (9, 4), (1, 37)])
def test_small_and_empty_sizes(N: int, M: int) -> None:
    agrees(NAME, landmark_attention, inputs(N, M, H=1), {}, layout=strided)


def test_a_moved_landmark_is_noticed() -> None:
    """The comparison has teeth: a kernel that closes a block one token later fails it."""

    def later(landmark: Any, **rest: Any) -> Any:
        return landmark_attention(landmark=landmark.roll(1, 1), **rest)

    with pytest.raises(AssertionError):
        agrees(NAME, later, inputs(), {}, layout=strided, gradients=False)


def test_what_a_query_does_not_see_cannot_leak() -> None:
    """Values of landmarks, later tokens and blocks that are not fetched may be NaN."""
    x = inputs(B=1, H=1)
    x["V"][:, :, x["landmark"][0]] = np.nan
    x["V"][:, :, 33] = x["K"][:, :, 34] = np.nan
    agrees(NAME, landmark_attention, x, {}, layout=strided, gradients=False)
    x = inputs(2, B=1, H=1)
    x["V"][:, :, 12:30] = x["K"][:, :, 12:30] = np.nan
    x["K"][:, :, 30] = -9 * x["Q"][:, :, :2].mean(2)
    agrees(NAME, landmark_attention, x, {"topk": 2}, layout=strided, gradients=False)


@pytest.mark.parametrize(("name", "at"), [("K", 34), ("V", 34), ("Q", 20)])
def test_gradients_of_what_a_query_does_not_see_cannot_leak(name: str, at: int) -> None:
    given = {n: torch.tensor(value) for n, value in inputs(B=1, H=1).items()}
    given = {n: value.float().requires_grad_() if n in WRT else value for n, value in given.items()}
    given[name].detach()[0, 0, at] = torch.nan
    landmark_attention(**given).sum().backward()
    broken = {n: given[n].grad[0, 0].isnan().any(-1) for n in WRT}
    # Keys and values: rows from `at` on have broken queries, or come too late for the one query that is.
    clean = {"Q": slice(0, at)} if name != "Q" else {"K": slice(at + 1, None), "V": slice(at + 1, None)}
    for n, places in clean.items():
        assert not broken[n][places].any()
    assert any(mask.any() for mask in broken.values())


@pytest.mark.parametrize("wrong", [
    {"landmark": torch.zeros(2, 37)}, {"landmark": torch.zeros(2, 36, dtype=torch.bool)}, {"landmark": None},
    {"topk": -1}, {"topk": True}, {"select": "best"}, {"V": torch.zeros(2, 2, 36, 5)}, {"K": torch.zeros(2, 2, 37, 7)},
])  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    given = {name: torch.tensor(value) for name, value in inputs().items()}
    given = {name: value if name == "landmark" else value.float() for name, value in given.items()}
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        landmark_attention(**given | wrong)


def test_large_heads_are_refused() -> None:
    with pytest.raises(Unsupported, match="257"):
        x = torch.zeros(1, 1, 4, 257)
        landmark_attention(x, x, x, torch.zeros(1, 4, dtype=torch.bool))
