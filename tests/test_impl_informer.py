"""The Triton ProbSparse attention against its equations, in Triton's interpreter."""

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
from attnspec.impls.engines.informer_launch import INTERPRETED  # noqa: E402
from attnspec.impls.informer import informer_probsparse  # noqa: E402
from attnspec.tests.kernel_calls import agrees, strided  # noqa: E402

NAME = "informer_probsparse"
compare = partial(agrees, NAME, informer_probsparse, layout=strided, gradients=False)


def inputs(N: int = 40, M: int = 40, B: int = 1, H: int = 2, D: int = 6, E: int = 5, U: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(N)
    shapes = {"Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"samp": rng.integers(0, M, (N, U))}


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_output_equals_the_equations(config: Any, causal: bool) -> None:
    compare(inputs(), {"causal": causal, "active": 20}, config=config)


@pytest.mark.parametrize("options", [
    {}, {"mean_over": "sample", "active": 7}, {"mix": True, "active": 7, "scale": -0.3}, {"active": 0}, {"factor": 1},
    {"active": 99},
], ids=str)  # fmt: skip
def test_every_option(options: dict[str, Any]) -> None:
    compare(inputs(M=70), options)
    compare(inputs(), options | {"causal": True})


@pytest.mark.parametrize(("N", "M", "U"), [(0, 3, 1), (1, 1, 1), (1, 5, 3), (33, 1, 2), (2, 65, 1)])
def test_small_and_empty_sizes(N: int, M: int, U: int) -> None:
    compare(inputs(N, M, U=U), {})
    compare(inputs(N, M, U=U), {"active": 1})


def test_an_empty_batch_and_an_empty_causal_call() -> None:
    compare(inputs(B=0), {})
    compare(inputs(B=0), {"causal": True})


def test_equal_measures_choose_the_earlier_query() -> None:
    x = inputs()
    x["K"][:] = 0.5
    x["Q"][:] = x["Q"][:, :, :1]
    compare(x | {"V": inputs()["V"]}, {"active": 3, "causal": True})


def test_another_choice_is_noticed() -> None:
    """The comparison has teeth: a kernel that lets one more query attend fails it."""

    def more(active: int, **rest: Any) -> Any:
        return informer_probsparse(active=active + 1, **rest)

    with pytest.raises(AssertionError):
        agrees(NAME, more, inputs(), {"active": 5}, gradients=False)


@pytest.mark.parametrize("active", [0, 3, 99])
def test_later_values_cannot_leak(active: int) -> None:
    x = inputs()
    x["V"][:, :, 27] = np.nan
    x["V"][:, :, 35] = np.inf
    compare(x, {"causal": True, "active": active})


@pytest.mark.parametrize("wrong", [
    {"samp": torch.zeros(40, 4)}, {"samp": torch.zeros(39, 4, dtype=torch.int64)}, {"samp": None}, {"active": -1},
    {"samp": torch.zeros(40, 0, dtype=torch.int64)}, {"factor": 0}, {"mean_over": "all"},
    {"K": torch.zeros(1, 2, 39, 6), "V": torch.zeros(1, 2, 39, 5), "causal": True},
])  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    given = {name: torch.tensor(value) for name, value in inputs().items()}
    given = {name: value if name == "samp" else value.float() for name, value in given.items()}
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        informer_probsparse(**given | wrong)


def test_gradients_and_large_heads_are_refused() -> None:
    given = {name: torch.tensor(value) for name, value in inputs().items()}
    given = {name: value if name == "samp" else value.float() for name, value in given.items()}
    with pytest.raises(Unsupported, match="no_grad"):
        informer_probsparse(**given | {"V": given["V"].requires_grad_()})
    with pytest.raises(Unsupported, match="257"):
        x = torch.zeros(1, 1, 2, 257)
        informer_probsparse(x, x, x, torch.zeros((2, 1), dtype=torch.int64))
