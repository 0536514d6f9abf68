"""Comparing an implementation on Triton with its mechanism's equations, for the tests of `attnspec.impls`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attnspec.property_tests.random_calls import cotangents
from attnspec.spec import load

Named = dict[str, Any]


def strided(value: Any) -> Any:
    """The same tensor with other strides: its axes reversed in memory, with a gap between the elements."""
    wide = torch.empty((*reversed(value.shape), 2), dtype=value.dtype)[..., 0]
    return wide.permute(*range(value.ndim - 1, -1, -1)).copy_(value)


def tensors(inputs: Named, dtype: torch.dtype = torch.float32, layout: Callable[[Any], Any] = lambda x: x) -> Named:
    """NumPy inputs as tensors; what is real in `dtype`."""
    out = {}
    for name, value in inputs.items():
        tensor = torch.as_tensor(np.asarray(value))
        out[name] = layout(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return out


def _exact(given: Named) -> Named:
    return {n: v.detach().double().numpy() if v.is_floating_point() else v.numpy() for n, v in given.items()}


def gap(got: Any, want: Any) -> float:
    """The largest difference relative to 1 + |want|; infinity where one is not finite and the other differs.

    NaN differs from everything but NaN.
    """
    got, want = got.detach().double().numpy(), np.asarray(want, dtype=float)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        apart = np.where(got == want, 0.0, np.abs(got - want) / (1.0 + np.abs(want)))
    apart = np.where(np.isnan(got) & np.isnan(want), 0.0, apart)
    apart = np.where(finite & np.isfinite(got) | (apart == 0.0), apart, np.inf)
    return float(apart.max(initial=0.0))


def gaps(
    name: str, function: Any, inputs: Named, options: Named, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    layout: Callable[[Any], Any] = lambda x: x, gradients: bool = True, **more: Any,
) -> dict[str, float]:  # fmt: skip
    """The gap of every output, and of every gradient as `d` + input, between `function` and the mechanism's equations.

    Args:
        inputs: NumPy arrays; both sides get them rounded to `dtype`. layout: applied to every tensor, `strided` say.
        more: further arguments of the function, such as a tile configuration.
    """
    mechanism = load(name)
    given = tensors(inputs, dtype, layout)
    exact = _exact(given)
    leaves = {n: x.requires_grad_() for n, x in given.items() if gradients and n in mechanism.differentiable}
    found = function(**given, **options, **more)
    found = dict(zip(mechanism.outputs, found if isinstance(found, tuple) else (found,)))
    want = mechanism.evaluate(exact, options, outputs=list(found))
    out = {o: gap(value, want[o]) for o, value in found.items()}
    if gradients:
        weights = {o: np.float32(w).astype(float) for o, w in cotangents(mechanism, want, seed).items()}
        real = {o: value for o, value in found.items() if value.requires_grad}
        weights = {o: torch.as_tensor(weights[o]).to(real[o].dtype) for o in real}
        got = torch.autograd.grad(
            [torch.where(torch.isfinite(value), value, 0.0) for value in real.values()], list(leaves.values()),
            list(weights.values()), allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        expected = mechanism.gradients(exact, options, _exact(weights), wrt=list(leaves))
        out |= {f"d{n}": gap(grad, expected[n]) for n, grad in zip(leaves, got)}
    return out


def agrees(*args: Any, tolerance: float = 1e-5, **named: Any) -> None:
    """Fails where a gap of `gaps(...)` exceeds the tolerance."""
    found = gaps(*args, **named)
    far = {name: apart for name, apart in found.items() if not apart < tolerance}
    assert not far, far
