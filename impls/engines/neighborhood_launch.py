"""Launching neighborhood attention: boxes, tiles, and the launches of the forward and backward passes.

`plan_forward` and `plan_backward` return launches without running them.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.neighborhood_backward import (
    neighborhood_dkv_kernel,
    neighborhood_dq_kernel,
    neighborhood_extra_kernel,
)
from attnspec.impls.engines.neighborhood_forward import neighborhood_forward_kernel
from attnspec.impls.engines.softmax_backward import row_term_kernel
from attnspec.impls.engines.softmax_configs import TileConfig, interpreted_tile, padded

Target = tuple[str, int | str]
Kind = Literal["forward", "dq", "dkv", "extra"]
TERM_ROWS = 16
SPLIT_QUERIES = 512
"""Queries of a head that one program adds up for the extra keys' gradients."""

INTERPRETED = [TileConfig(32, 32, 1, 1), TileConfig(16, 16, 1, 1), TileConfig(64, 16, 1, 1)]


@dataclass(frozen=True)
class Problem:
    """A checked call. Pairs are (column, row): of windows, dilations, strides and causal flags."""

    Q: Tensor
    K: Tensor
    V: Tensor
    Kx: Tensor | None
    Vx: Tensor | None
    rows: int
    windows: tuple[int, int]
    dilations: tuple[int, int]
    strides: tuple[int, int]
    causal: tuple[bool, bool]
    scale: float
    config: TileConfig | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, int(self.Q.shape[2]) // self.rows


def tile_of(p: Problem, kind: Kind, target: Target | None) -> TileConfig:
    """The configuration of a kernel; what the call gives comes first.

    The choices are those that compile without spilling, not timed.
    """
    if p.config is not None:
        return p.config
    if target is None:
        return interpreted_tile(INTERPRETED, p.Q.shape[2], p.K.shape[2])
    head, narrow = max(padded(p.Q.shape[-1]), padded(p.V.shape[-1])), p.Q.element_size() == 2
    # A wave of AMD has 64 lanes: eight of them have 256 registers each, four have 512.
    limit, wide = (255, 8) if target[0] == "cuda" else (0, 4)
    if kind == "forward" and narrow:
        return TileConfig(64, 32, 4 if head <= 64 else 8, 2, registers=limit)
    if head <= (128 if narrow else 64) and (narrow or kind == "forward"):
        return TileConfig(32, 32, 4 if narrow else 8, 1, registers=limit)
    return TileConfig(16, 16, wide if head > 64 else 4, 1, registers=limit)


def box(block: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a box of `block` places, as square as the area of height x width allows."""
    tall = min(1 << (block.bit_length() - 1) // 2, _power(height))
    wide = min(block // tall, _power(width))
    return block // wide, wide


def _power(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """The steps of a tensor's axes by name; 0 for a tensor that is absent."""
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _common(p: Problem) -> dict[str, Any]:
    D, E = p.Q.shape[-1], p.V.shape[-1]
    (rows, cols), (wy, wx), (py, px), (sy, sx) = p.grid, p.windows, p.dilations, p.strides
    return {
        "Q": p.Q, "K": p.K, "V": p.V, "KX": p.Kx, "VX": p.Vx, **strides("q", p.Q, "bhid"), **strides("k", p.K, "bhid"),
        **strides("v", p.V, "bhie"), **strides("kx", p.Kx, "bhid"), **strides("vx", p.Vx, "bhie"),
        "H": p.Q.shape[1], "N": p.Q.shape[2], "X": 0 if p.Kx is None else p.Kx.shape[2], "G": _group(p),
        "rows": rows, "cols": cols, "wy": wy, "wx": wx, "py": py, "px": px, "sy": sy, "sx": sx,
        "scale": p.scale, "D": D, "E": E, "D_PAD": padded(D), "E_PAD": padded(E),
        "CAUSAL_Y": p.causal[0], "CAUSAL_X": p.causal[1],
    }  # fmt: skip


def _group(p: Problem) -> int:
    return int(p.Q.shape[1] // p.K.shape[1])


def _boxes(
    name: Kind, kernel: Any, p: Problem, target: Target | None, arguments: dict[str, Any], heads: int
) -> list[Launch]:
    """The launch over all boxes of all groups of all heads, and its repair, which holds more and takes small boxes."""
    found = []
    flags = torch.zeros(heads, dtype=torch.int32, device=p.Q.device)
    area = tuple(-(-length // dilation) for length, dilation in zip(p.grid, p.dilations))
    for repair in (False, True):
        tile = tile_of(p, name, target)
        if repair and target is not None:
            tile = TileConfig(16, 16, tile.warps, 1, registers=tile.registers)
        ty, tx = box(tile.block_m, *area)
        ky, kx = box(tile.block_n, *area)
        own = (ky, kx) if name == "dkv" else (ty, tx)
        tiles = tuple(-(-length // side) for length, side in zip(area, own))
        given = arguments | {
            "FLAG": flags, "REPAIR": repair, "TY": ty, "TX": tx, "KY": ky, "KX_": kx,
            "tiles_y": tiles[0], "tiles_x": tiles[1],
        }  # fmt: skip
        programs = heads * tiles[0] * tiles[1] * p.dilations[0] * p.dilations[1] if p.Q.shape[2] else 0
        label = f"neighborhood_{name}" + ("_repair" if repair else "")
        found.append(Launch(label, kernel, programs, {n: given[n] for n in kernel.arg_names}, tile))
    return found


def plan_forward(p: Problem, target: Target | None) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches, O `[b,h,i,e]` in the inputs' dtype and LSE `[b,h,i]` in float32, not yet written."""
    O = torch.empty((*p.Q.shape[:3], p.V.shape[-1]), dtype=p.V.dtype, device=p.V.device)
    LSE = torch.empty(p.Q.shape[:3], dtype=torch.float32, device=p.Q.device)
    arguments = _common(p) | {"O": O, "LSE": LSE, **strides("o", O, "bhie"), **strides("l", LSE, "bhi")}
    heads = p.Q.shape[0] * p.Q.shape[1]
    return _boxes("forward", neighborhood_forward_kernel, p, target, arguments, heads), O, LSE


def plan_backward(
    p: Problem, O: Tensor, LSE: Tensor, dO: Tensor, dLSE: Tensor | None, target: Target | None
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches, and the gradients by input name, not yet written; those of Kx and Vx in parts `[split,...]`."""
    T = torch.empty_like(LSE)
    found = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in _inputs(p).items()}
    arguments = _common(p) | {
        "O": O, "DO": dO, "LSE": LSE, "DLSE": dLSE, "T": T, **strides("o", O, "bhie"), **strides("do", dO, "bhie"),
        **strides("l", LSE, "bhi"), **strides("dl", dLSE, "bhi"), "Q_LEN": None, "Q_SEG": None,
        "DQ": found["Q"], **strides("dq", found["Q"], "bhid"),
    }  # fmt: skip
    batch, H, N = p.Q.shape[:3]
    term = arguments | {"tiles": -(-N // TERM_ROWS), "BLOCK_M": TERM_ROWS}
    names = row_term_kernel.arg_names
    launches = [Launch("row_term", row_term_kernel, term["tiles"] * batch * H, {n: term[n] for n in names}, None)]
    launches += _boxes("dq", neighborhood_dq_kernel, p, target, arguments, batch * H)
    arguments |= {
        "DK": found["K"], "DV": found["V"], **strides("dk", found["K"], "bhid"), **strides("dv", found["V"], "bhie")
    }  # fmt: skip
    Hk = p.K.shape[1]
    launches += _boxes("dkv", neighborhood_dkv_kernel, p, target, arguments, batch * Hk)
    if p.Kx is not None and p.Vx is not None:
        tile = tile_of(p, "extra", target)
        splits, tiles = -(-N // SPLIT_QUERIES), -(-p.Kx.shape[2] // tile.block_n)
        for name, like in (("Kx", p.Kx), ("Vx", p.Vx)):
            found[name] = torch.empty((splits, *like.shape), dtype=torch.float32, device=like.device)
        given = arguments | {
            "DK": found["Kx"], "DV": found["Vx"], **strides("dk", found["Kx"], "sbhid"),
            **strides("dv", found["Vx"], "sbhie"), "tiles_x": tiles, "share": SPLIT_QUERIES, "splits": splits,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        }  # fmt: skip
        kernel = neighborhood_extra_kernel
        programs = batch * Hk * tiles * splits
        taken = {n: given[n] for n in kernel.arg_names}
        launches.append(Launch("neighborhood_extra", kernel, programs, taken, tile))
    return launches, found


def _inputs(p: Problem) -> dict[str, Tensor]:
    return {"Q": p.Q, "K": p.K, "V": p.V}
