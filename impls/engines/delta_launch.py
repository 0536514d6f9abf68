"""Launching the gated delta rule: tiles, outputs, and the sums over heads that share queries and keys.

`forward` and `backward` are what `attnspec.impls.delta` calls.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.delta_chunks import (
    delta_behind_kernel,
    delta_forward_kernel,
    delta_gradients_kernel,
    delta_system_kernel,
)
from attnspec.impls.engines.launch import Launch, Threads
from attnspec.impls.engines.linear_launch import largest_chunk, strides, threads_of, value_block
from attnspec.impls.engines.softmax_configs import padded

CHUNK = 32


@dataclass(frozen=True)
class Rule:
    """One call: Q, K `[b,k,t,d]`, V `[b,h,t,e]`, log decay and strength `[b,h,t]`, state `[b,h,d,e]`.

    `chunk` tokens are taken together; None: what suits the sizes.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor | None
    scale: float
    chunk: int | None = None

    @property
    def shared(self) -> int:
        """Value heads that share queries and keys."""
        return int(self.V.shape[1] // self.K.shape[1])

    @property
    def heads(self) -> int:
        return int(self.V.shape[0] * self.V.shape[1])

    def constants(self, backward: bool = False) -> dict[str, Any]:
        """Sizes and constants of a kernel. A chunk longer than what fits is cut: the result does not depend on it."""
        T, D, E = self.V.shape[2], self.K.shape[-1], self.V.shape[-1]
        C = min(self.chunk or CHUNK, largest_chunk(D, self.V.dtype, backward), CHUNK if D <= 32 < 2 * T else 16)
        block = value_block(D, E, self.V.dtype, backward)
        return {
            "scale": self.scale, "H": self.V.shape[1], "R": self.shared, "T": T, "chunks": -(-T // C),
            "D": D, "E": E, "D_PAD": padded(D), "E_BLOCK": block, "E_BLOCKS": -(-E // block), "C": C,
        }  # fmt: skip

    def inputs(self, names: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "A": self.g, **strides("a", self.g, "bht"), "W": self.beta, **strides("w", self.beta, "bht")
        }  # fmt: skip
        for name, tensor, axes in (("Q", self.Q, "bhtd"), ("K", self.K, "bhtd"), ("V", self.V, "bhte")):
            if name in names:
                found |= {name: tensor, **strides(name.lower(), tensor, axes)}
        return found

    def new(self, *shape: int) -> Tensor:
        """Room for float32 numbers `[b, h, *shape]`."""
        return torch.empty((*self.V.shape[:2], *shape), dtype=torch.float32, device=self.V.device)


def _launch(r: Rule, name: str, kernel: Any, programs: int, arguments: dict[str, Any]) -> Launch:
    """Constants that a kernel does not have are left out."""
    # The assembler's own choice of registers spills less here than all of them.
    threads = Threads(threads_of(r.Q, backward=name in ("delta_behind", "delta_gradients")).warps)
    return Launch(name, kernel, programs, {key: arguments[key] for key in kernel.arg_names}, threads)


def _system(r: Rule, constants: dict[str, Any]) -> tuple[Launch, Tensor]:
    inverse = r.new(constants["chunks"], constants["C"], constants["C"])
    arguments = {**r.inputs("K"), "INV": inverse, **constants}
    return _launch(r, "delta_system", delta_system_kernel, r.heads * constants["chunks"], arguments), inverse


def _walk(r: Rule, constants: dict[str, Any], **tensors: Tensor) -> Launch:
    """Forward with O and S1, or with U, ERR and ST."""
    wanted = {name: tensors.get(name) for name in ("O", "S1", "U", "ERR", "ST")}
    arguments = {
        **r.inputs("QKV"), **wanted, "INV": tensors["INV"], "S0": r.state, **strides("s", r.state, "bhde"),
        **strides("o", wanted["O"], "bhte"), **constants,
    }  # fmt: skip
    return _launch(r, "delta_forward", delta_forward_kernel, r.heads * constants["E_BLOCKS"], arguments)


def forward(r: Rule) -> tuple[Tensor, Tensor]:
    """O `[b,h,t,e]` in the inputs' dtype and the final state `[b,h,d,e]` in float32."""
    runtime.target_of(r.Q)
    O = torch.empty(r.V.shape, dtype=r.V.dtype, device=r.V.device)
    last = r.new(r.K.shape[-1], r.V.shape[-1])
    constants = r.constants()
    system, inverse = _system(r, constants)
    for launch in (system, _walk(r, constants, INV=inverse, O=O, S1=last)):
        launch.run(r.Q.device)
    return O, last


def backward(r: Rule, dO: Tensor, dS: Tensor | None) -> dict[str, Tensor]:
    """Gradients of Q, K, V, beta, g and the initial state (if given) in float32, by name."""
    runtime.target_of(r.Q)
    constants = r.constants(backward=True)
    T, D, E, chunks = r.V.shape[2], r.K.shape[-1], r.V.shape[-1], constants["chunks"]
    system, inverse = _system(r, constants)
    U, ERR, DU, ST, BH = r.new(T, E), r.new(T, E), r.new(T, E), r.new(chunks, D, E), r.new(chunks, D, E)
    DQ, DK, DW, DA, DP = r.new(T, D), r.new(T, D), r.new(T), r.new(T), r.new(T)
    DS0 = None if r.state is None else r.new(D, E)
    cotangent = {"DO": dO, **strides("do", dO, "bhte"), **constants}
    behind = {
        **r.inputs("QK"), **cotangent, "INV": inverse, "DS1": dS, **strides("s", dS, "bhde"), "DU": DU, "BH": BH,
        "DS0": DS0,
    }  # fmt: skip
    features = min(padded(D), 32)
    rest = {
        **r.inputs("QK"), **cotangent, "D_BLOCK": features, "D_BLOCKS": -(-D // features),
        "U": U, "ERR": ERR, "DU": DU, "ST": ST, "BH": BH, "DQ": DQ, "DK": DK, "DW": DW, "DA": DA, "DP": DP,
    }  # fmt: skip
    for launch in (
        system,
        _walk(r, constants, INV=inverse, U=U, ERR=ERR, ST=ST),
        _launch(r, "delta_behind", delta_behind_kernel, r.heads * constants["E_BLOCKS"], behind),
        _launch(r, "delta_gradients", delta_gradients_kernel, r.heads * chunks, rest),
    ):
        launch.run(r.Q.device)
    DA[:, :, 1:] += DP[:, :, :-1]
    DQ, DK = (x.unflatten(1, (-1, r.shared)).sum(2) for x in (DQ, DK))
    found = {"Q": DQ, "K": DK, "V": DU * r.beta[..., None], "beta": DW, "g": DA}
    return found if DS0 is None else found | {"state": DS0}
