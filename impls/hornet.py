"""Recursive gated convolution on Triton: launches of the one kernel of `engines.gated_convolution`."""



from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.gated_convolution import gated_map_kernel
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.softmax_configs import padded

BLOCKS = (32, 16, 64)
"""Cells of a tile, and the most channels of a block; the first is taken by default on a device."""
INTERPRETED = 512
"""Cells of a tile in the interpreter."""


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _map(
    X: Tensor, W: Tensor | None, bias: Tensor | None, block: int, channels: int, group: Tensor | None = None,
    DW: Tensor | None = None, dw_bias: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """X `[b,c,y,x]` mapped by W `[o,c]` with its bias, then gated by the convolved group `[b,o,y,x]`: `[b,o,y,x]`."""
    B, C, Sy, Sx = X.shape
    out = torch.empty((B, channels, Sy, Sx), dtype=X.dtype, device=X.device)
    wide = min(padded(max(C, channels)), block, max(BLOCKS))
    tiles, blocks = -(-Sy * Sx // block), -(-channels // wide)
    arguments: dict[str, Any] = {
        "X": X, "W": W, "BIAS": bias, "GROUP": group, "DW": DW, "DW_BIAS": dw_bias, "OUT": out,
        **_strides("x", X, "bcyx"), **_strides("w", W, "oc"), **_strides("group", group, "bcyx"),
        **_strides("dw", DW, "cvu"), **_strides("out", out, "bcyx"), **_strides("bias", bias, "o"),
        **_strides("dw_bias", dw_bias, "c"), "C_IN": C, "C_OUT": channels, "Sy": Sy, "Sx": Sx, "tiles": tiles,
        "blocks": blocks, "scale": scale, "R": 1 if DW is None else DW.shape[-1], "BLOCK_C": wide, "BLOCK_P": block,
    }  # fmt: skip
    Launch("gated_map", gated_map_kernel, B * tiles * blocks, arguments).run(X.device)
    return out


@candidate(mechanism="hornet_gnconv", outputs=("O",), differentiable=False)
def hornet_gnconv(
    X: Tensor, Win: Tensor, DW: Tensor, P: Tensor, Wout: Tensor, in_bias: Tensor | None = None,
    dw_bias: Tensor | None = None, p_bias: Tensor | None = None, out_bias: Tensor | None = None, *, scale: float = 1.0,
    block: int | None = None,
) -> Tensor:  # fmt: skip
    """Recursive gated convolution of order k + 1 (Rao et al., arXiv 2207.14284, Eq. 3.3-3.6).

    Args:
        X: `[b,c,y,x]`, c a multiple of 2 ** k. Win: `[2c,c]`. DW: `[f,r,r]`, r odd, f = 2c - c / 2 ** k. Wout: `[c,c]`.
        P: `[k,c,c/2]`; of map m the first c / 2 ** (k - m - 1) rows and half as many columns are read. One dtype,
            fp16, bf16 or fp32.
        in_bias: `[2c]`. dw_bias: `[f]`. p_bias: `[k,c]`. out_bias: `[c]`.
        scale: of the depthwise output and its bias.
        block: cells of a tile, one of BLOCKS (in the interpreter INTERPRETED, too); the result does not depend on it.

    Returns:
        O `[b,c,y,x]` in the inputs' dtype. Not differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for dtypes without a kernel.
    """
    call = Arguments("hornet_gnconv")
    call.tensor("X", X, "b c y x")
    C, Sy, Sx = call.sizes("c y x")
    if not isinstance(P, Tensor) or P.ndim != 3:
        raise TypeError("hornet_gnconv: P must be a tensor [k, c, c/2]")
    orders = P.shape[0]
    if C < 1 or C % 2**orders:
        raise call.wrong("X", f"of a multiple of 2 ** {orders} channels", C)
    narrow = C // 2**orders
    call.lengths |= {"a": 2 * C, "o": C, "n": C // 2, "f": 2 * C - narrow}
    call.tensor("Win", Win, "a c")
    call.tensor("DW", DW, "f r r")
    call.tensor("P", P, "k o n")
    call.tensor("Wout", Wout, "o c")
    for name, value, axes in (("in_bias", in_bias, "a"), ("dw_bias", dw_bias, "f"), ("p_bias", p_bias, "k o"),
                              ("out_bias", out_bias, "o")):  # fmt: skip
        call.tensor(name, value, axes, real=True, optional=True)
    if DW.shape[-1] % 2 == 0:
        raise call.wrong("DW", "of an odd side", DW.shape[-1])
    if Sy * Sx >= 2**31 - 64:
        raise Unsupported("hornet_gnconv: planes of 2^31 cells or more")
    block = call.block(block, BLOCKS, INTERPRETED, X)
    factor = call.number("scale", scale)
    call.no_gradients(X, Win, DW, P, Wout, in_bias, dw_bias, p_bias, out_bias)
    mapped = _map(X, Win, in_bias, block, 2 * C)
    state, start = mapped[:, :narrow], narrow
    for k in range(orders + 1):
        width = narrow * 2**k
        weight = P[k - 1, :width, : width // 2] if k else None
        bias = p_bias[k - 1, :width] if k and p_bias is not None else None
        kernels = DW[start - narrow : start - narrow + width]
        shift = None if dw_bias is None else dw_bias[start - narrow : start - narrow + width]
        group = mapped[:, start : start + width]
        state = _map(state, weight, bias, block, width, group, kernels, shift, factor)
        start += width
    return _map(state, Wout, out_bias, block, C)


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler."""

    def call() -> object:
        X, Win, Wout = (torch.zeros(shape, dtype=dtype) for shape in ((1, 64, 28, 28), (128, 64), (64, 64)))
        DW, P = torch.zeros(112, 7, 7, dtype=dtype), torch.zeros(2, 64, 32, dtype=dtype)
        biases = [torch.zeros(size, dtype=dtype) for size in (128, 112, (2, 64), 64)]
        return hornet_gnconv(X, Win, DW, P, Wout, *biases, scale=1 / 3)

    yield "hornet_gnconv", "order3", call
