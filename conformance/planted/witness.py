"""Runs a kernel on a witness input and compares: the anchors of the planted kernels.

A planted kernel whose fault point is never passed, or whose witness no longer tells it from the honest kernel, would
count as rejected or as survived for the wrong reason; `anchor` finds both. Used by the tests and by `mutation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from attnspec.conformance.planted.registry import Faults, Planted, Witness

Tensor = Any
SIZES = {"B": 1, "H": 1, "Hk": 1, "N": 3, "M": 3, "D": 4, "E": 4}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PAGES, PAGE_SIZE = 6, 4
DIFFERENT = 1e-3
"""Relative difference from which two results count as different (the kernels themselves compute in float32)."""


@dataclass
class Call:
    """What came of a witness: outputs, gradients, inputs after the call, their surroundings, repeated outputs."""

    arguments: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def arguments(witness: Witness, seed: int = 0) -> dict[str, Any]:
    """The inputs of a witness as torch tensors; the same seed gives the same inputs."""
    rng = np.random.default_rng(seed)
    s = {**SIZES, **witness.sizes}
    shapes = {
        "Q": (s["B"], s["H"], s["N"], s["D"]),
        "K": (s["B"], s["Hk"], s["M"], s["D"]),
        "V": (s["B"], s["Hk"], s["M"], s["E"]),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if witness.values == "large_logits":
        arrays["Q"], arrays["K"] = 30 * np.abs(arrays["Q"]), 30 * np.abs(arrays["K"])
    elif witness.values == "rising_keys":
        arrays["Q"] = np.abs(arrays["Q"])
        arrays["K"] = np.abs(arrays["K"]) * np.linspace(0, 3, s["M"])[:, None]
    elif witness.values == "forties":
        arrays["Q"], arrays["K"] = np.full(shapes["Q"], 40.0), np.full(shapes["K"], 40.0)
    tensors = {name: torch.tensor(value, dtype=DTYPES[witness.dtype]) for name, value in arrays.items()}
    for name, value in witness.inputs.items():
        tensors[name] = _optional(name, value, s, rng, DTYPES[witness.dtype])
    if "block_table" in witness.inputs:
        del tensors["K"], tensors["V"]
    for name in witness.strided:
        if name == "expanded":
            tensors["K"] = tensors["K"][:1].expand(tensors["K"].shape)
            tensors["V"] = tensors["V"][:1].expand(tensors["V"].shape)
        else:
            tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    return tensors


def _optional(name: str, value: Any, s: dict[str, int], rng: np.random.Generator, dtype: Any) -> Tensor:
    full = (s["B"], s["H"], s["N"], s["M"])
    if not isinstance(value, str):
        whole = name not in ("sink", "bias")
        return torch.tensor(value, dtype=torch.int64 if whole else dtype)
    if value == "normal":
        return torch.tensor(rng.standard_normal(full), dtype=dtype)
    if value == "shared":
        return torch.tensor(rng.standard_normal((1, *full[1:])), dtype=dtype)
    if value == "pages":
        size = s["D"] if name == "k_pages" else s["E"]
        return torch.tensor(rng.standard_normal((PAGES, PAGE_SIZE, s["Hk"], size)), dtype=dtype)
    mask = np.ones(full, dtype=bool)
    if value == "random":
        mask = rng.random(full) < 0.6
        mask[..., 0] = True
    elif value == "first_row_empty":
        mask[:, :, 0] = False
    elif value == "first_tile_hidden":
        mask[:, :, 0, :16] = False
    else:
        raise ValueError(f"witness input {name}: no generator {value!r}")
    return torch.tensor(mask)


def observe(function: Callable[..., Any], witness: Witness, seed: int = 0) -> Call:
    """Call `function` on the witness and collect everything that may show its fault."""
    call = Call(arguments(witness, seed))
    tensors, options = dict(call.arguments), dict(witness.options)
    stores: dict[str, Tensor] = {}
    if witness.guarded:
        for name, tensor in tensors.items():
            if tensor.dtype.is_floating_point:
                tensors[name], stores[name] = _guarded(tensor)
    real = [name for name in ("Q", "K", "V", "bias", "sink") if name in tensors]
    try:
        if witness.before is not None:
            function(**{name: t.clone() for name, t in tensors.items()}, **witness.before)
        if witness.backward:
            for name in real:
                tensors[name] = tensors[name].clone().requires_grad_(True)
        out, lse = function(**tensors, **options)
        call.results |= {"O": out.detach(), "LSE": lse.detach()}
        for number in range(1, witness.repeats):
            call.results[f"O of call {number}"] = function(**tensors, **options)[0].detach()
        if witness.backward:
            rng = torch.Generator().manual_seed(seed)
            weights = [torch.randn(x.shape, generator=rng).to(x.dtype) for x in (out, lse)]
            grads = torch.autograd.grad([out, lse], [tensors[name] for name in real], weights)
            call.results |= {f"d{name}": grad for name, grad in zip(real, grads)}
    except Exception as error:
        call.error = f"{type(error).__name__}: {error}"
    for name in real:
        call.results[f"{name} after the call"] = tensors[name].detach()
    for name, store in stores.items():
        call.results[f"memory around {name}"] = store.detach()
    return call


def _guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    store = torch.full((tensor.numel() + 16,), torch.nan, dtype=tensor.dtype)
    view = store[8 : 8 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, store


def differs(first: Call, second: Call) -> str | None:
    """The name of a result in which two calls differ; None: they agree."""
    if first.error or second.error:
        return "error" if first.error != second.error else None
    for name, value in first.results.items():
        other = second.results[name]
        if value.shape != other.shape:
            return name
        a, b = value.to(torch.float64), other.to(torch.float64)
        same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        near = (a - b).abs() <= DIFFERENT * (1 + b.abs())
        if not bool((same | near).all()):
            return name
    return None


def anchor(entry: Planted, honest: Callable[..., Any]) -> str | None:
    """What is wrong with a planted kernel as a planted kernel; None: it is one.

    Its fault point must be passed on the witness, and the honest kernel must differ from it there.
    """
    faults = Faults({entry.name})
    function = entry.build(faults)
    wrong = observe(function, entry.witness)
    if entry.name not in faults.reached:
        return "its fault point is not passed on its witness"
    if entry.witness.repeats > 1:
        outputs = [value for name, value in wrong.results.items() if name == "O" or name.startswith("O of call")]
        return None if any(not torch.equal(outputs[0], other) for other in outputs[1:]) else "its calls agree"
    return None if differs(wrong, observe(honest, entry.witness)) else "its witness does not tell it from the honest"
