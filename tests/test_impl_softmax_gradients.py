"""Gradients of the Triton softmax attention against float64 autograd through the plain formula, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.impls.engines.softmax_configs import TileConfig  # noqa: E402
from attnspec.impls.softmax import softmax_attention  # noqa: E402
from attnspec.tests.test_impl_softmax import CASES, close, extra, formula, tensors  # noqa: E402

INF = float("inf")
SMALL = TileConfig(16, 16, 1, 1)
DIFFERENTIABLE = ("Q", "K", "V", "bias", "sink")


def gradients(function: Any, x: dict[str, Any], dO: Any, dLSE: Any, dtype: Any) -> dict[str, Any]:
    leaves = {n: x[n].detach().to(dtype).requires_grad_() for n in DIFFERENTIABLE if n in x}
    O, LSE = function(x | leaves)
    # The cotangent of an infinite LSE has no meaning; the formula's autograd would make NaN of it.
    dLSE = torch.where(torch.isfinite(LSE), dLSE, 0.0)
    loss = (O * dO.to(dtype)).sum() + (torch.where(torch.isfinite(LSE), LSE, 0.0) * dLSE.to(LSE.dtype)).sum()
    got = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, got))


def check(x: dict[str, Any], config: Any = SMALL, tolerance: float = 1e-5) -> None:
    g = torch.Generator().manual_seed(3)
    B, H, N = x["Q"].shape[:3]
    dO = torch.randn(B, H, N, x["V"].shape[3], generator=g)
    dLSE = torch.randn(B, H, N, generator=g)
    got = gradients(lambda y: softmax_attention(**y, config=config), x, dO, dLSE, torch.float32)
    want = gradients(formula, x, dO, dLSE, torch.float64)
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd_of_the_formula(name: str) -> None:
    names, options = CASES[name]
    check(tensors() | {n: extra()[n] for n in names} | options)
