"""Launching the chunked linear recurrence: tiles, outputs, and the sums over partial slices.

`forward` and `backward` are what the mechanisms of `attnspec.impls.linear` call; `plan_forward` and `plan_backward`
return the launches without running them, which the ahead-of-time compiler compiles on tensors without storage.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.linear_chunks import linear_dkv_kernel, linear_dq_kernel, linear_forward_kernel
from attnspec.impls.engines.softmax_configs import padded
from attnspec.impls.engines.softmax_launch import Launch

CHUNK = 32
VECTOR_CHUNK = 16
WIDEST = 32
"""Value features per program: with 256 key features the state of a program is [256, 32] in float32."""


@dataclass(frozen=True)
class Recurrence:
    """One call: Q `[b,h,t,d]`, K `[b,g,t,d]`, V `[b,g,t,e]`, log decay `[b,g,t,d]` or `[b,g,t]`, state `[b,g,d,e]`.

    Query head h reads the keys of head h // (H / G).

    `chunk` tokens are taken together; None: what suits the kind of decay. `begins` `[b,t]` marks where packed sequences
    start anew, which their decays say already; gradients of the decays need to know it.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    a: Tensor
    state: Tensor | None
    scale: float
    chunk: int | None = None
    begins: Tensor | None = None

    @property
    def vector(self) -> bool:
        return bool(self.a.ndim == 4)

    @property
    def tokens(self) -> int:
        return int(self.Q.shape[2])

    @property
    def group(self) -> int:
        """Query heads that share keys, values, decays and a state."""
        return int(self.Q.shape[1] // self.K.shape[1])

    def heads(self) -> int:
        return int(self.Q.shape[0] * self.Q.shape[1])

    def constants(self) -> dict[str, Any]:
        D, E = self.Q.shape[-1], self.V.shape[-1]
        block = min(padded(E), WIDEST)
        C = self.chunk or (VECTOR_CHUNK if self.vector else CHUNK)
        return {
            "scale": self.scale, "H": self.Q.shape[1], "G": self.group, "T": self.tokens,
            "chunks": -(-self.tokens // C),
            "D": D, "E": E,
            "D_PAD": padded(D), "E_BLOCK": block, "E_BLOCKS": -(-E // block), "C": C, "VECTOR": self.vector,
        }  # fmt: skip


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    named = {f"{prefix}_{axis}": 0 for axis in axes}
    return named | {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _inputs(r: Recurrence, names: str) -> dict[str, Any]:
    found: dict[str, Any] = {"A": r.a, **_strides("a", r.a, "bhtd")}
    for name, tensor, axes in (("Q", r.Q, "bhtd"), ("K", r.K, "bhtd"), ("V", r.V, "bhte")):
        if name in names:
            found |= {name: tensor, **_strides(name.lower(), tensor, axes)}
    return found


def plan_forward(r: Recurrence, last: bool) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch, O in the inputs' dtype, and the final state in float32 if wanted."""
    O = torch.empty((*r.Q.shape[:3], r.V.shape[-1]), dtype=r.V.dtype, device=r.V.device)
    shape = (*r.K.shape[:2], r.K.shape[-1], r.V.shape[-1])
    S1 = torch.empty(shape, dtype=torch.float32, device=r.Q.device) if last else None
    constants = r.constants()
    arguments = {
        **_inputs(r, "QKV"), "S0": r.state, **_strides("s", r.state, "bhde"), "O": O, **_strides("o", O, "bhte"),
        "S1": S1, **constants,
    }  # fmt: skip
    programs = r.heads() * constants["E_BLOCKS"]
    return Launch("linear_forward", linear_forward_kernel, programs, arguments, None), O, S1


def plan_backward(r: Recurrence, dO: Tensor, dS: Tensor | None) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches, and dQ and dK as slices `[blocks,b,h,t,d]`, dV `[b,h,t,e]` and dS0 `[b,h,d,e]`, all float32.

    All are per query head: those of a group are still to be added.
    """
    constants = r.constants()
    blocks = constants["E_BLOCKS"]
    where: dict[str, Any] = {"dtype": torch.float32, "device": r.Q.device}
    E = r.V.shape[-1]
    found = {
        "Q": torch.empty((blocks, *r.Q.shape), **where), "K": torch.empty((blocks, *r.Q.shape), **where),
        "V": torch.empty((*r.Q.shape[:3], E), **where),
    }  # fmt: skip
    if r.state is not None:
        found["state"] = torch.empty((*r.Q.shape[:2], r.Q.shape[-1], E), **where)
    cotangent = {"DO": dO, **_strides("do", dO, "bhte")}
    dq = {
        **_inputs(r, "KV"), "S0": r.state, **_strides("s", r.state, "bhde"), **cotangent, "DQ": found["Q"], **constants
    }  # fmt: skip
    dkv = {
        **_inputs(r, "QKV"), **cotangent, "DS1": dS, **_strides("s", dS, "bhde"), "DK": found["K"], "DV": found["V"],
        **_strides("o", found["V"], "bhte"), "DS0": found.get("state"), **constants,
    }  # fmt: skip
    programs = r.heads() * blocks
    launches = [
        Launch("linear_dq", linear_dq_kernel, programs, dq, None),
        Launch("linear_dkv", linear_dkv_kernel, programs, dkv, None),
    ]
    return launches, found


def forward(r: Recurrence, last: bool = True) -> tuple[Tensor, Tensor | None]:
    """O `[b,h,t,e]` in the inputs' dtype and the final state `[b,h,d,e]` in float32."""
    runtime.target_of(r.Q)
    launch, O, S1 = plan_forward(r, last)
    launch.run(r.Q.device)
    return O, S1


def backward(r: Recurrence, dO: Tensor, dS: Tensor | None) -> dict[str, Tensor]:
    """Gradients of Q, K, V and the initial state (if given) in float32, by name."""
    runtime.target_of(r.Q)
    launches, found = plan_backward(r, dO, dS)
    for launch in launches:
        launch.run(r.Q.device)
    found |= {"Q": found["Q"].sum(0), "K": found["K"].sum(0)}
    shared = {name: grad.unflatten(1, (-1, r.group)).sum(2) for name, grad in found.items() if name != "Q"}
    return found | shared
