"""Comparing a Triton kernel with its mechanism's equations on one call, in Triton's interpreter; used by the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import attnspec


def tensors(inputs: Mapping[str, Any], wrt: Sequence[str] = ()) -> dict[str, Any]:
    """The inputs as float32, bool or int64 tensors, none of which is contiguous; gradients are asked for `wrt`."""
    kinds = {"f": torch.float32, "b": torch.bool}
    out = {}
    for name, value in inputs.items():
        array = np.asarray(value)
        dense = torch.tensor(array, dtype=kinds.get(array.dtype.kind, torch.int64))
        # Every other place of a tensor with reversed axes.
        spread = torch.zeros((*reversed(dense.shape), 2), dtype=dense.dtype)[..., 0]
        spread = spread.permute(*reversed(range(dense.ndim)))
        spread.copy_(dense)
        out[name] = spread.requires_grad_() if name in wrt else spread
    return out


def compare(
    name: str, function: Callable[..., Any], inputs: Mapping[str, Any], options: Mapping[str, Any],
    wrt: Sequence[str] = (), tolerance: float = 1e-5, **extra: Any,
) -> None:  # fmt: skip
    """Outputs, and the gradients of `wrt` for random cotangents, must be those of the equations.

    extra: arguments of the kernel only. The tolerance is relative to 1 + the largest magnitude of the tensor.
    """
    mechanism = attnspec.load(name)
    want: dict[str, Any] = dict(mechanism.evaluate(inputs, options))
    given = tensors(inputs, wrt)
    result = function(**given, **options, **extra)
    outputs = result if isinstance(result, tuple) else (result,)
    got = dict(zip(mechanism.outputs, outputs))
    if wrt:
        rng = np.random.default_rng(0)
        up = {output: rng.normal(size=np.shape(value)) for output, value in want.items()}
        want |= {f"d{n}": g for n, g in mechanism.gradients(inputs, options, up, wrt=list(wrt)).items()}
        torch.autograd.backward(outputs, [torch.tensor(up[n], dtype=torch.float32) for n in got])
        got |= {f"d{n}": given[n].grad for n in wrt}
    assert got.keys() == want.keys()
    for label, value in got.items():
        close(label, value, want[label], tolerance)


def close(label: str, got: Any, want: Any, tolerance: float = 1e-5) -> None:
    array = got.detach().double().numpy()
    assert array.shape == np.shape(want), label
    np.testing.assert_array_equal(np.isnan(array), np.isnan(want), err_msg=label)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(array[~finite], np.asarray(want)[~finite], err_msg=label)
    scale = 1 + (np.abs(np.asarray(want)[finite]).max() if finite.any() else 0)
    np.testing.assert_allclose(array[finite], np.asarray(want)[finite], rtol=0, atol=tolerance * scale, err_msg=label)
