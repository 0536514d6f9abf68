"""The implementations that every law is checked on: the equations, the hand-written reference, the Triton kernels.

Each is a pair of functions over float64 NumPy arrays; kernels compute in float32 (under Triton's interpreter where
there is no GPU) and get the tolerance that this leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from attnspec.conformance.candidate import described
from attnspec.impls import find as find_kernel
from attnspec.impls import written
from attnspec.reference import find as find_reference
from attnspec.spec.mechanism import Mechanism


class Forward(Protocol):
    def __call__(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]: ...


class Backward(Protocol):
    def __call__(
        self,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        cotangents: Mapping[str, Any],
        wrt: Sequence[str],
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Implementation:
    """`outputs` are the names of what it returns; `tolerance` is relative to 1 + the largest magnitude of the tensor
    compared; `on` is the same for another mechanism."""

    name: str
    outputs: tuple[str, ...]
    forward: Forward
    backward: Backward
    tolerance: float
    examples: int
    on: Callable[[Mechanism], Implementation]


def spec(mechanism: Mechanism) -> Implementation:
    """The equations themselves, in float64."""

    def backward(
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        cotangents: Mapping[str, Any],
        wrt: Sequence[str],
    ) -> dict[str, Any]:
        return mechanism.gradients(inputs, options, cotangents, wrt=wrt)

    names = tuple(mechanism.outputs)
    return Implementation("spec", names, lambda i, o: mechanism.evaluate(i, o), backward, 1e-11, 20, spec)


def reference(mechanism: Mechanism) -> Implementation:
    """The NumPy reference, in float64."""
    function, gradient = find_reference(mechanism.name)

    def backward(
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        cotangents: Mapping[str, Any],
        wrt: Sequence[str],
    ) -> dict[str, Any]:
        if gradient is None:
            raise LookupError(f"the reference of {mechanism.name} has no backward function")
        given = {f"d{name}": value for name, value in cotangents.items()}
        first = next(iter(mechanism.outputs))
        if f"d{first}" not in given:
            given[f"d{first}"] = np.zeros_like(function(**inputs, **options)[first])
        got = gradient(**given, **inputs, **options)
        return {name: got[name] for name in wrt}

    names = tuple(mechanism.outputs)
    return Implementation("reference", names, lambda i, o: function(**i, **o), backward, 1e-11, 20, reference)


def kernel(mechanism: Mechanism) -> Implementation:
    """The Triton implementation in float32, on the GPU where there is one, else under the interpreter.

    Its outputs are those that its description declares: a kernel need not return all of the mechanism's.
    """
    import torch

    function = find_kernel(mechanism.name)
    description = described(function, mechanism.name)
    declared = None if description is None else description.outputs
    names = tuple(mechanism.outputs) if declared is None else declared
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in inputs.items():
            tensor = torch.as_tensor(np.ascontiguousarray(value), device=device)
            out[name] = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        return out

    def named(returned: Any) -> dict[str, Any]:
        values = returned if isinstance(returned, tuple) else (returned,)
        return {name: value for name, value in zip(names, values, strict=True) if name != "_"}

    def forward(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        values = named(function(**tensors(inputs), **options))
        return {name: value.double().cpu().numpy() for name, value in values.items()}

    def backward(
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        cotangents: Mapping[str, Any],
        wrt: Sequence[str],
    ) -> dict[str, Any]:
        given = tensors(inputs)
        for name in wrt:
            given[name].requires_grad_()
        values = named(function(**given, **options))
        weights = tensors(cotangents)
        torch.autograd.backward([values[name] for name in weights], list(weights.values()))
        return {name: given[name].grad.double().cpu().numpy() for name in wrt}

    return Implementation("triton", names, forward, backward, 2e-5, 3, kernel_or_reference)


def kernel_or_reference(mechanism: Mechanism) -> Implementation:
    """The Triton implementation, or the reference where there is none: what a kernel is compared with."""
    return kernel(mechanism) if list(written(mechanism.name)) else reference(mechanism)
