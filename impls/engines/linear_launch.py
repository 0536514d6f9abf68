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
from attnspec.impls.engines.launch import Launch, Threads, without_spills
from attnspec.impls.engines.linear_chunks import (
    linear_dkv_kernel,
    linear_dq_kernel,
    linear_forward_kernel,
    linear_read_kernel,
)
from attnspec.impls.engines.softmax_configs import padded

CHUNK = 32
VECTOR_CHUNK = 16


def threads_of(Q: Tensor, backward: bool = False) -> Threads:
    """Products of float32 take no tensor cores on CUDA, and want their rows spread over more threads."""
    target = runtime.target_of(Q)
    large = Q.dtype == torch.float32 or (backward and padded(Q.shape[-1]) > 64)
    many = large and target is not None and target[0] == "cuda"
    return without_spills(8 if many else 4, target)


def largest_chunk(D: int, dtype: torch.dtype, backward: bool) -> int:
    """Tokens per chunk that fit into the registers beside a state of D key features."""
    if dtype == torch.float32 or backward:
        return 16
    return 64 if padded(D) <= 32 else 32 if padded(D) <= 64 else 16


def value_block(D: int, E: int, dtype: torch.dtype, backward: bool) -> int:
    """Value features per program: the state of a program is `[D, block]` in float32."""
    small = dtype == torch.float32 or padded(D) > (64 if backward else 128)
    return min(padded(E), 16 if small else 32)


@dataclass(frozen=True)
class Recurrence:
    """One call: Q `[b,h,t,d]`, K `[b,g,t,d]`, V `[b,g,t,e]`, log decay `[b,g,t,d]` or `[b,g,t]`, state `[b,g,d,e]`.

    Query head h reads the keys of head h // (H / G); or V, decays and states have more heads than Q and K, and head h
    reads queries and keys of head h // (H / G). `weight` `[b,h,t]` multiplies what a token writes.

    `output` is the dtype of O (None: the inputs'). `chunk` tokens are taken together, if so many fit; None: what suits
    the kind of decay. `begins` `[b,t]` marks where packed sequences start anew, which their decays say already;
    gradients of decays per feature need to know it.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    a: Tensor
    state: Tensor | None
    scale: float
    chunk: int | None = None
    begins: Tensor | None = None
    weight: Tensor | None = None
    output: torch.dtype | None = None

    @property
    def vector(self) -> bool:
        return bool(self.a.ndim == 4)

    @property
    def tokens(self) -> int:
        return int(self.Q.shape[2])

    @property
    def group(self) -> int:
        """Query heads that share keys, values, decays and a state."""
        return self.width // int(self.V.shape[1])

    @property
    def shared(self) -> int:
        """States that share queries and keys."""
        return self.width // int(self.Q.shape[1])

    def shares(self, name: str) -> int:
        """Heads that share an input."""
        return {"Q": self.shared, "K": self.group * self.shared}.get(name, self.group)

    @property
    def width(self) -> int:
        """Heads of the output."""
        return max(int(self.Q.shape[1]), int(self.V.shape[1]))

    def heads(self) -> int:
        return int(self.Q.shape[0]) * self.width

    def constants(self, backward: bool = False) -> dict[str, Any]:
        """Sizes and constants of a kernel. A chunk longer than what fits is cut: the result does not depend on it."""
        D, E = self.Q.shape[-1], self.V.shape[-1]
        block = value_block(D, E, self.V.dtype, backward)
        C = min(self.chunk or (VECTOR_CHUNK if self.vector else CHUNK), largest_chunk(D, self.V.dtype, backward))
        return {
            "scale": self.scale, "H": self.width, "G": self.group, "R": self.shared, "T": self.tokens,
            "chunks": -(-self.tokens // C),
            "D": D, "E": E,
            "D_PAD": padded(D), "E_BLOCK": block, "E_BLOCKS": -(-E // block), "C": C, "VECTOR": self.vector,
        }  # fmt: skip


def strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """A tensor's strides by name; zeros where it is absent or has fewer axes."""
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    named = {f"{prefix}_{axis}": 0 for axis in axes}
    return named | {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _inputs(r: Recurrence, names: str) -> dict[str, Any]:
    found: dict[str, Any] = {"A": r.a, **strides("a", r.a, "bhtd"), "W": r.weight, **strides("w", r.weight, "bht")}
    for name, tensor, axes in (("Q", r.Q, "bhtd"), ("K", r.K, "bhtd"), ("V", r.V, "bhte")):
        if name in names:
            found |= {name: tensor, **strides(name.lower(), tensor, axes)}
    return found


def plan_forward(r: Recurrence, last: bool, outputs: bool = True) -> tuple[Launch, Tensor | None, Tensor | None]:
    """The launch, O in the inputs' dtype and the final state in float32, each if wanted."""
    B, E = r.Q.shape[0], r.V.shape[-1]
    O = None
    if outputs:
        O = torch.empty((B, r.width, r.tokens, E), dtype=r.output or r.V.dtype, device=r.V.device)
    shape = (*r.V.shape[:2], r.K.shape[-1], E)
    S1 = torch.empty(shape, dtype=torch.float32, device=r.Q.device) if last else None
    constants = r.constants()
    arguments = {
        **_inputs(r, "QKV"), "S0": r.state, **strides("s", r.state, "bhde"), "O": O, **strides("o", O, "bhte"),
        "S1": S1, **constants,
    }  # fmt: skip
    programs = r.heads() * constants["E_BLOCKS"]
    return Launch("linear_forward", linear_forward_kernel, programs, arguments, threads_of(r.Q)), O, S1


def plan_backward(
    r: Recurrence, dO: Tensor, dS: Tensor | None, decays: bool = False
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches, and dQ and dK as slices `[blocks,b,h,t,d]`, dV `[b,h,t,e]` and dS0 `[b,h,d,e]`, all float32.

    All are per head: those of heads that share an input are still to be added. With `decays` also those of decays per
    head, as slices `[blocks,b,h,t]`: sums of what stands across a token, exact however strong the decays are, for
    which the states between chunks are kept.
    """
    constants = r.constants(backward=True)
    blocks = constants["E_BLOCKS"]
    where: dict[str, Any] = {"dtype": torch.float32, "device": r.Q.device}
    B, D, E = r.Q.shape[0], r.Q.shape[-1], r.V.shape[-1]
    rows = (B, r.width, r.tokens)
    found = {
        "Q": torch.empty((blocks, *rows, D), **where), "K": torch.empty((blocks, *rows, D), **where),
        "V": torch.empty((*rows, E), **where),
    }  # fmt: skip
    if r.state is not None:
        found["state"] = torch.empty((B, r.width, D, E), **where)
    if r.weight is not None:
        found["weight"] = torch.empty((blocks, *rows), **where)
    between = None
    if decays:
        found["a"] = torch.empty((blocks, *rows), **where)
        found["next a"] = torch.empty((blocks, *rows), **where)
        between = torch.empty((B, r.width, constants["chunks"], D, E), **where)
    cotangent = {"DO": dO, **strides("do", dO, "bhte"), "ST": between, "DA": found.get("a")}
    dq = {
        **_inputs(r, "QKV"), "S0": r.state, **strides("s", r.state, "bhde"), **cotangent, "DQ": found["Q"],
        **constants,
    }  # fmt: skip
    dkv = {
        **_inputs(r, "QKV"), **cotangent, "DS1": dS, **strides("s", dS, "bhde"), "DK": found["K"], "DV": found["V"],
        **strides("o", found["V"], "bhte"), "DW": found.get("weight"), "DP": found.get("next a"),
        "DS0": found.get("state"), **constants,
    }  # fmt: skip
    programs = r.heads() * blocks
    launches = [
        Launch("linear_dq", linear_dq_kernel, programs, dq, threads_of(r.Q, True)),
        Launch("linear_dkv", linear_dkv_kernel, programs, dkv, threads_of(r.Q, True)),
    ]
    return launches, found


def forward(r: Recurrence, last: bool = True) -> tuple[Tensor, Tensor | None]:
    """O `[b,h,t,e]` in the inputs' dtype and the final state `[b,h,d,e]` in float32."""
    runtime.target_of(r.Q)
    launch, O, S1 = plan_forward(r, last)
    launch.run(r.Q.device)
    assert O is not None
    return O, S1


def final_state(r: Recurrence) -> Tensor:
    """The final state `[b,h,d,e]` in float32 alone; the queries are not looked at."""
    runtime.target_of(r.Q)
    launch, _, S1 = plan_forward(r, True, outputs=False)
    launch.run(r.Q.device)
    assert S1 is not None
    return S1


def read_state(Q: Tensor, state: Tensor) -> Tensor:
    """Q `[b,h,t,d]` times a state `[b,h,d,e]`, in Q's dtype."""
    runtime.target_of(Q)
    (B, H, T, D), E = Q.shape, state.shape[-1]
    O = torch.empty((B, H, T, E), dtype=Q.dtype, device=Q.device)
    block, C = value_block(D, E, Q.dtype, False), 16
    arguments = {
        "Q": Q, **strides("q", Q, "bhtd"), "S": state, **strides("s", state, "bhde"), "O": O, **strides("o", O, "bhte"),
        "H": H, "T": T, "chunks": -(-T // C), "D": D, "E": E, "D_PAD": padded(D), "E_BLOCK": block,
        "E_BLOCKS": -(-E // block), "C": C,
    }  # fmt: skip
    programs = B * H * arguments["chunks"] * arguments["E_BLOCKS"]
    Launch("linear_read", linear_read_kernel, programs, arguments, threads_of(Q)).run(Q.device)
    return O


def backward(r: Recurrence, dO: Tensor, dS: Tensor | None, decays: bool = False) -> dict[str, Tensor]:
    """Gradients of Q, K, V, the initial state and the weights (if given) in float32, by name; with `decays` also of "a"
    (one decay per head)."""
    runtime.target_of(r.Q)
    launches, found = plan_backward(r, dO, dS, decays)
    for launch in launches:
        launch.run(r.Q.device)
    sums = {name: grad if name in ("V", "state") else grad.sum(0) for name, grad in found.items()}
    if decays:
        sums["a"][:, :, 1:] += sums.pop("next a")[:, :, :-1]
    return {name: grad.unflatten(1, (-1, r.shares(name))).sum(2) for name, grad in sums.items()}
