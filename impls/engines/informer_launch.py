"""Launching ProbSparse attention: the choice of active queries, tiles, and launches."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines.informer_rows import (
    active_rows_kernel,
    sample_measure_kernel,
    value_rows_kernel,
    value_sum_kernel,
)
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.neighborhood_launch import strides
from attnspec.impls.engines.softmax_configs import TileConfig, interpreted_tile, padded

Target = tuple[str, int | str]
MEASURE_ROWS = 16
CHUNK = 32
INTERPRETED = [TileConfig(32, 32, 1, 1), TileConfig(16, 16, 1, 1), TileConfig(16, 64, 1, 1)]


@dataclass(frozen=True)
class Problem:
    """A checked call; `active` queries of each head attend; `divisor` of the sum of sampled scores."""

    Q: Tensor
    K: Tensor
    V: Tensor
    samp: Tensor
    causal: bool
    active: int
    divisor: int
    scale: float
    config: TileConfig | None = None


def tile_of(p: Problem, target: Target | None) -> TileConfig:
    """The configuration of the attention kernel; what the call gives comes first.

    The choices are those that compile without spilling, not timed. Few queries are active: tiles of them are small.
    """
    if p.config is not None:
        return p.config
    if target is None:
        return interpreted_tile(INTERPRETED, p.Q.shape[2], p.K.shape[2])
    head = max(padded(p.Q.shape[-1]), padded(p.V.shape[-1]))
    limit = 255 if target[0] == "cuda" else 0
    return TileConfig(16, 32 if head <= 128 else 16, 4 if head <= 64 else 8, 1, registers=limit)


def _run(name: str, kernel: Any, programs: int, given: dict[str, Any], p: Problem, tile: TileConfig | None) -> None:
    Launch(name, kernel, programs, {n: given[n] for n in kernel.arg_names}, tile).run(p.Q.device)


def _common(p: Problem) -> dict[str, Any]:
    (_, H, N, D), M, E = p.Q.shape, p.K.shape[2], p.V.shape[-1]
    return {
        "Q": p.Q, "K": p.K, "V": p.V, **strides("q", p.Q, "bhid"), **strides("k", p.K, "bhjd"),
        **strides("v", p.V, "bhje"), "H": H, "N": N, "M": M, "D": D, "E": E, "D_PAD": padded(D), "E_PAD": padded(E),
        "scale": p.scale,
    }  # fmt: skip


def active_queries(p: Problem) -> Tensor:
    """`[b,h,r]` int32: the active queries in rising order; of equal measures the earlier query."""
    batch, H, N = p.Q.shape[:3]
    measure = torch.empty((batch, H, N), dtype=torch.float32, device=p.Q.device)
    samp = p.samp.to(torch.int32)
    tiles = -(-N // MEASURE_ROWS)
    given = _common(p) | {
        "SAMP": samp, **strides("s", samp, "is"), "MSR": measure, "U": samp.shape[1], "tiles": tiles,
        "divisor": float(p.divisor), "BLOCK_M": MEASURE_ROWS,
    }  # fmt: skip
    _run("sample_measure", sample_measure_kernel, batch * H * tiles, given, p, None)
    # A stable sort: `topk` says nothing about ties.
    order = measure.sort(dim=-1, descending=True, stable=True).indices[..., : p.active]
    return order.sort(dim=-1).values.to(torch.int32)


def default_rows(p: Problem, O: Tensor) -> None:
    """The mean of the values, or their running sums, into all rows of O."""
    (batch, H, N), M, E = p.Q.shape[:3], p.K.shape[2], p.V.shape[-1]
    chunks = -(-M // CHUNK)
    sums = torch.empty((batch * H, chunks, E), dtype=torch.float32, device=p.Q.device)
    given = _common(p) | {"SUM": sums, "tiles": chunks, "BLOCK_N": CHUNK}
    _run("value_sum", value_sum_kernel, batch * H * chunks, given, p, None)
    if p.causal:
        before = torch.nn.functional.pad(sums[:, :-1], (0, 0, 1, 0)).cumsum(1).contiguous()
    else:
        before = (sums.sum(1, keepdim=True) / M).expand(-1, -(-N // CHUNK), -1)
    tiles = -(-N // CHUNK)
    given = _common(p) | {
        "BEFORE": before, "f_h": before.stride(0), "f_c": before.stride(1), "O": O, **strides("o", O, "bhie"),
        "tiles": tiles, "RUNNING": p.causal, "BLOCK_N": CHUNK,
    }  # fmt: skip
    _run("value_rows", value_rows_kernel, batch * H * tiles, given, p, None)


def forward(p: Problem, target: Target | None) -> Tensor:
    """Rows `[b,h,i,e]`, contiguous, in the inputs' dtype."""
    batch, H, N = p.Q.shape[:3]
    O = torch.empty((batch, H, N, p.V.shape[-1]), dtype=p.V.dtype, device=p.V.device)
    if p.active < N:
        default_rows(p, O)
    if p.active == 0:
        return O
    tile = tile_of(p, target)
    chosen = active_queries(p).contiguous()
    flags = torch.zeros(batch * H, dtype=torch.int32, device=p.Q.device) if p.causal else None
    for repair in (False, True) if p.causal else (False,):
        own = tile
        if repair and target is not None:
            own = TileConfig(16, 16, tile.warps, 1, registers=tile.registers)
        tiles = -(-p.active // own.block_m)
        given = _common(p) | {
            "O": O, **strides("o", O, "bhie"), "ACTIVE": chosen, "FLAG": flags, "tiles": tiles, "active": p.active,
            "CAUSAL": p.causal, "REPAIR": repair, "BLOCK_M": own.block_m, "BLOCK_N": own.block_n,
        }  # fmt: skip
        name = "active_rows_repair" if repair else "active_rows"
        _run(name, active_rows_kernel, batch * H * tiles, given, p, own)
    return O
