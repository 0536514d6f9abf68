"""Gradients of a candidate: by the framework's autograd, or by the backward function that it brings along.

Every way returns (outputs, gradients by input name, inputs that no gradient reached). An input that no
gradient reached gets zeros, which is what the frameworks mean by it; the receipt names it. `NoGradientError`:
the candidate cannot be differentiated at all, or not through an output whose cotangent the case gives; the
case is then not posed to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.aliases import OUTPUT_ALIASES
from attnspec.conformance.binding import Binding, bind
from attnspec.conformance.candidate import Candidate
from attnspec.conformance.interface import InputFace, Interface
from attnspec.conformance.job import Call
from attnspec.conformance.returned import WrongResultError

Forward = Callable[[Mapping[str, Any]], dict[str, Any]]
Result = tuple[dict[str, Any], dict[str, Any], list[str]]

# What a backward function may call a cotangent.
COTANGENT_ALIASES = {
    "grad_output": "O",
    "grad_out": "O",
    "dout": "O",
    "doutput": "O",
    "grad_o": "O",
    "grad_lse": "LSE",
}


class NoGradientError(Exception):
    """The candidate has no gradient where the case asks for one."""


def by_torch(
    candidate: Candidate,
    forward: Forward,
    placed: Mapping[str, Any],
    cotangents: Mapping[str, Any],
    wrt: tuple[str, ...],
) -> Result:
    """Gradients through torch autograd."""
    import torch

    inputs = dict(placed)
    for name in wrt:
        inputs[name] = inputs[name].detach().requires_grad_(True)
    outputs = forward(inputs)
    _present(outputs, cotangents)
    reached = {name: outputs[name] for name in cotangents if outputs[name].requires_grad}
    for name in cotangents:
        if name not in reached and outputs[name].numel():
            raise NoGradientError(f"backward: {name} has no gradient (torch: requires_grad is False)")
    if not reached:
        zeros = {name: torch.zeros_like(inputs[name]) for name in wrt}
        return outputs, zeros, list(wrt)
    grads = torch.autograd.grad(
        list(reached.values()),
        [inputs[name] for name in wrt],
        [cotangents[name].to(value.dtype) for name, value in reached.items()],
        allow_unused=True,
    )
    found = dict(zip(wrt, grads, strict=True))
    unused = [name for name, grad in found.items() if grad is None]
    for name in unused:
        found[name] = torch.zeros_like(inputs[name])
    return {name: value.detach() for name, value in outputs.items()}, found, unused


def by_jax(
    candidate: Candidate,
    forward: Forward,
    placed: Mapping[str, Any],
    cotangents: Mapping[str, Any],
    wrt: tuple[str, ...],
) -> Result:
    """Gradients through `jax.vjp`."""
    import jax
    import jax.numpy as jnp

    def of(chosen: dict[str, Any]) -> dict[str, Any]:
        return forward({**placed, **chosen})

    outputs, pull = jax.vjp(of, {name: placed[name] for name in wrt})
    _present(outputs, cotangents)
    weights = {
        name: cotangents[name].astype(value.dtype) if name in cotangents else jnp.zeros_like(value)
        for name, value in outputs.items()
    }
    (grads,) = pull(weights)
    return outputs, dict(grads), []


def explicit(
    binding: Binding,
    back: Binding,
    forward: Forward,
    placed: Mapping[str, Any],
    cotangents: Mapping[str, Any],
    wrt: tuple[str, ...],
    call: Call,
) -> Result:
    """Gradients by the candidate's own backward function.

    Its parameters are matched like the forward's; cotangents are `dO`, `dLSE` (also `grad_output`, `dout`),
    saved outputs `O`, `LSE` (also `out`, `softmax_lse`). It returns a tuple in the order of the
    differentiable inputs, or a dict by `dQ` or `Q`.
    """
    outputs = forward(placed)
    _present(outputs, {name: value for name, value in cotangents.items() if name == next(iter(cotangents))})
    taken = {slot.target for slot in back.slots}
    for name in cotangents:
        if f"d{name}" not in taken:
            raise NoGradientError(f"backward: the backward function takes no d{name}")
    arrays = {**placed, **outputs, **{f"d{name}": value for name, value in cotangents.items()}}
    for slot in back.slots:
        if slot.required and slot.target in binding.interface.outputs and slot.target not in outputs:
            raise NoGradientError(
                f"backward: the backward function needs {slot.target}, which the forward does not return"
            )
    args, kwargs = back.arguments(arrays, call.options, call.resolved, _no_merge)
    result = back.candidate.function(*args, **kwargs)
    order = binding.signature.differentiable
    if isinstance(result, Mapping):
        known = {f"d{name}".lower(): name for name in order} | {name.lower(): name for name in order}
        stray = [key for key in result if str(key).lower() not in known]
        if stray:
            raise WrongResultError(f"backward returned an unknown gradient {stray[0]!r}; expected d{', d'.join(order)}")
        found = {known[str(key).lower()]: value for key, value in result.items()}
    else:
        values = result if isinstance(result, (tuple, list)) else (result,)
        if len(values) > len(order):
            raise WrongResultError(f"backward returned {len(values)} values, expected at most {len(order)}")
        found = dict(zip(order, values, strict=False))
    grads = {name: found[name] for name in wrt if found.get(name) is not None}
    absent = [name for name in wrt if name not in grads]
    if absent and not grads:
        raise WrongResultError("backward returned no gradient")
    return outputs, grads, absent


def backward_binding(binding: Binding) -> Binding:
    """The binding of the backward function: the forward's names, the cotangents and the saved outputs.

    Raises:
        CandidateError: a required parameter that stands for nothing known.
    """
    inner = binding.interface
    faces = {name: dataclasses.replace(face, optional=True) for name, face in inner.inputs.items()}
    for name, axes in inner.outputs.items():
        faces[name] = InputFace(name, axes, role="query" if len(axes) == 4 else "output", optional=True)
        faces[f"d{name}"] = InputFace(f"d{name}", axes, role="query" if len(axes) == 4 else "output", optional=True)
    names = dict(binding.candidate.names)
    parameters = getattr(getattr(binding.candidate.backward, "__code__", None), "co_varnames", ())
    for parameter in parameters:
        output = COTANGENT_ALIASES.get(parameter.lower())
        saved = OUTPUT_ALIASES.get(parameter.lower())
        if output in inner.outputs:
            names[parameter] = f"d{output}"
        elif saved in inner.outputs:
            names[parameter] = str(saved)
    assert binding.candidate.backward is not None
    function = binding.candidate.backward
    candidate = dataclasses.replace(
        binding.candidate,
        function=function,
        name=f"{binding.candidate.name} (backward)",
        names={key: value for key, value in names.items() if key in parameters},
        fixed={},
        outputs=None,
    )
    return bind(candidate, Interface(inner.mechanism, faces, inner.options, inner.outputs))


def _present(outputs: Mapping[str, Any], cotangents: Mapping[str, Any]) -> None:
    for name in cotangents:
        if name not in outputs:
            raise NoGradientError(f"backward: the candidate does not return {name}, whose gradient the case needs")


def _no_merge(mask: Any, bias: Any) -> Any:
    raise NoGradientError("backward: mask and bias in one parameter")
