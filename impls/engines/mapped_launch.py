"""Launching tiled attention with mapped logits and probabilities: tiles, outputs, and its gradients for torch.autograd.

`attend` is what the mechanisms call. Tile configurations are those of `mapped_configs`; a call may be given one.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.impls.engines import runtime
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.mapped_backward import mapped_dkv_kernel, mapped_dq_kernel
from attnspec.impls.engines.mapped_forward import mapped_forward_kernel
from attnspec.impls.engines.mapped_tiles import CLIPPED, IDENTITY, SHARPENED, SIGMOID, SOFTPLUS
from attnspec.impls.engines.softmax_configs import TileConfig, interpreted_tile, padded

MOST_FEATURES = 256
SHORTEST = 1e-12
CHUNK = 32
"""Features of a product where rows are longer than 128."""
ACTIVATIONS = {"exp": IDENTITY, "softplus": SOFTPLUS, "sigmoid": SIGMOID}
INTERPRETED = [TileConfig(32, 32, 1, 1), TileConfig(16, 64, 1, 1), TileConfig(64, 16, 1, 1)]
Kind = Literal["forward", "dq", "dkv"]


@dataclass(frozen=True)
class Call:
    """One call: Q `[b,h,i,d]`, K `[b,h,j,d]`, V `[b,h,j,e]`, mask `[b,h,i,j]` (expanded).

    scale: of the dot products; None: ln(D) times the logarithm of the number of keys that a row sees. unit: dot
    products of the queries and keys divided by their lengths. clip: (low, high) of the stretch. power: of the excess
    over the average, with eps; the first `offset_rows` positions of a causal call have no average to exceed.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None
    activation: str = "exp"
    unit: bool = False
    clip: tuple[float, float] | None = None
    power: int | None = None
    eps: float = 0.0
    offset_rows: int = 0
    config: TileConfig | None = None

    def constants(self) -> dict[str, Any]:
        D, E = self.Q.shape[-1], self.V.shape[-1]
        low, high = self.clip or (0.0, 1.0)
        shape = CLIPPED if self.clip is not None else IDENTITY if self.power is None else SHARPENED
        grows = self.scale is None
        return {
            "H": self.Q.shape[1], "N": self.Q.shape[2], "M": self.K.shape[2], "offset_rows": self.offset_rows,
            "scale": 0.0 if self.scale is None else self.scale, "growth": math.log(D) if grows else 0.0,
            "low": low, "high": high, "power": float(self.power or 1),
            "log_eps": math.log(self.eps) if self.eps > 0.0 else -math.inf,
            "D": D, "E": E, "D_PAD": padded(D), "E_PAD": padded(E), "CAUSAL": self.causal, "GROWS": grows,
            "ACTIVATION": ACTIVATIONS[self.activation].value, "MAP": shape.value,
            "CHUNK": CHUNK if max(padded(D), padded(E)) > 128 else 0,
        }  # fmt: skip


def configs(kind: Kind, call: Call, target: runtime.Target | None) -> list[TileConfig]:
    """Tile configurations of a kernel for a call, the preferred one first."""
    if target is None:
        return INTERPRETED
    wide, size = max(padded(call.Q.shape[-1]), padded(call.V.shape[-1])), call.Q.dtype.itemsize
    cuda = target[0] == "cuda"
    limit = 255 if cuda else 0
    if wide > 128:
        return [TileConfig(16, 16, 8 if cuda else 4, 1, registers=limit)]
    if size == 4:
        block = (32, 16) if cuda or kind == "dkv" else (32, 32)
        return [TileConfig(*block, 8 if cuda else 4, 1, registers=limit)]
    if kind == "forward":
        warps = 8 if cuda and (wide > 64 or target[1] == 80) else 4
        return [TileConfig(64, 32, warps, 2, registers=limit), TileConfig(32, 32, 4, 1, registers=limit)]
    if kind == "dq" and wide <= 64:
        return [TileConfig(32, 32, 4, 1, registers=limit)]
    narrow = cuda or (kind == "dkv" and wide > 64)
    return [TileConfig(32, 16 if narrow else 32, 8 if cuda else 4, 1, registers=limit)]


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _launch(kind: Kind, kernel: Any, call: Call, arguments: dict[str, Any]) -> None:
    target = runtime.target_of(call.Q)
    known = configs(kind, call, target)
    tile = call.config or (known[0] if target else interpreted_tile(known, call.Q.shape[2], call.K.shape[2]))
    rows, block = (call.K.shape[2], tile.block_n) if kind == "dkv" else (call.Q.shape[2], tile.block_m)
    tiles = -(-rows // block)
    given = arguments | {"tiles": tiles, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    taken = {name: given[name] for name in kernel.arg_names}
    programs = tiles * call.Q.shape[0] * call.Q.shape[1]
    Launch(f"mapped_{kind}", kernel, programs, taken, tile).run(call.Q.device)


def _lengths(x: Tensor) -> Tensor:
    """`[b,h,i]`: Euclidean lengths of rows, at least SHORTEST."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32).clamp(min=SHORTEST).contiguous()


def forward(call: Call, gate: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """O `[b,h,i,e]`, and the arguments that the backward kernels take over."""
    (B, H, N), E = call.Q.shape[:3], call.V.shape[-1]
    constants = call.constants()
    shape: dict[str, Any] = {"size": (B, H, N), "dtype": torch.float32, "device": call.Q.device}
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    O = torch.empty((B, H, N, E), dtype=call.V.dtype, device=call.Q.device)
    TOP = torch.empty(**shape)
    # Tables that a variant does not use are never read; any pointer will do.
    counted = constants["GROWS"] or call.power is not None
    arguments = {
        **constants, "Q": call.Q, "K": call.K, "V": call.V, "O": O, "MASK": mask, "GATE": gate,
        "Q_LENGTH": _lengths(call.Q) if call.unit else None, "K_LENGTH": _lengths(call.K) if call.unit else None,
        "TOP": TOP, "REST": torch.empty(**shape), "COUNT": torch.empty(**shape) if counted else TOP,
        "PEAK": TOP if call.power is None else torch.empty(**shape),
        "TOTAL": TOP if call.power is None else torch.empty(**shape),
        **_strides("q", call.Q, "bhid"), **_strides("k", call.K, "bhjd"), **_strides("v", call.V, "bhje"),
        **_strides("o", O, "bhie"), **_strides("mask", mask, "bhij"),
    }  # fmt: skip
    _launch("forward", mapped_forward_kernel, call, arguments)
    return O, arguments


def backward(
    call: Call, arguments: dict[str, Any], dO: Tensor, gate: Tensor | None, values: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Q, K, V (those of keys and values only if wanted) and of the gate."""
    TOP = arguments["TOP"]
    dQ = torch.empty_like(call.Q, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(TOP)
    arguments = arguments | {
        "DO": dO, **_strides("do", dO, "bhie"), "DQ": dQ, **_strides("dq", dQ, "bhid"), "DGATE": dgate,
        "TERM": torch.empty_like(TOP), "SHIFT": torch.empty_like(TOP),
    }  # fmt: skip
    _launch("dq", mapped_dq_kernel, call, arguments)
    if not values:
        return dQ, None, None, dgate
    dK = torch.empty_like(call.K, memory_format=torch.contiguous_format)
    dV = torch.empty_like(call.V, memory_format=torch.contiguous_format)
    arguments |= {"DK": dK, **_strides("dk", dK, "bhjd"), "DV": dV, **_strides("dv", dV, "bhje")}
    # Registers hold one of two sums over long rows.
    for part in ({"DV": None}, {"DK": None}) if arguments["CHUNK"] else ({},):
        _launch("dkv", mapped_dkv_kernel, call, arguments | part)
    return dQ, dK, dV, dgate


class _Attend(torch.autograd.Function):  # type: ignore[misc]
    """Saves O and the row's normalisers; the weights are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, gate: Tensor | None, call: Call) -> Tensor:
        O, arguments = forward(call, gate)
        # Saved for autograd's check that nobody changed them in between; the arguments hold the same tensors.
        ctx.save_for_backward(Q, K, V, gate, O)
        ctx.call, ctx.arguments = call, {name: value for name, value in arguments.items() if name != "O"}
        return O

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor) -> Any:
        *_, gate, O = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dQ, dK, dV, dgate = backward(ctx.call, ctx.arguments | {"O": O}, dO, gate, wanted[1] or wanted[2])
        return dQ, dK, dV, dgate, None


def attend(call: Call, gate: Tensor | None = None) -> Tensor:
    """O `[b,h,i,e]` in the inputs' dtype, differentiable in Q, K, V and the gate `[b,h,i]` (float32, contiguous)."""
    inputs = (call.Q, call.K, call.V, gate)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        found: Tensor = _Attend.apply(*inputs, call)
        return found
    return forward(call, gate)[0]
