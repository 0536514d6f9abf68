"""Launching bi-level routing attention: the regions of a map, the choice among them, tiles, and launches."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines.biformer_regions import region_attention_kernel, region_mean_kernel, region_score_kernel
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.neighborhood_launch import strides
from attnspec.impls.engines.softmax_configs import TileConfig, interpreted_tile, padded

Target = tuple[str, int | str]
MEAN_REGIONS = 16
SCORE_TILE = TileConfig(32, 32, 4, 1)
SCORE_FEATURES = 32
INTERPRETED = [TileConfig(32, 32, 1, 1), TileConfig(16, 16, 1, 1), TileConfig(64, 16, 1, 1)]


@dataclass(frozen=True)
class Problem:
    """A checked call; `high` x `wide` cells make a region."""

    Q: Tensor
    K: Tensor
    V: Tensor
    lepe_w: Tensor | None
    lepe_b: Tensor | None
    high: int
    wide: int
    topk: int
    soft: bool
    zeros: bool
    scale: float
    config: TileConfig | None = None

    @property
    def across(self) -> int:
        return -(-int(self.Q.shape[3]) // self.wide)

    @property
    def regions(self) -> int:
        return -(-int(self.Q.shape[2]) // self.high) * self.across


def tile_of(p: Problem, target: Target | None) -> TileConfig:
    """The configuration of the attention kernel; what the call gives comes first.

    The choices are those that compile without spilling, not timed.
    """
    if p.config is not None:
        return p.config
    if target is None:
        cells = p.high * p.wide
        return interpreted_tile(INTERPRETED, p.regions * cells, p.topk * cells)
    head, narrow = max(padded(p.Q.shape[-1]), padded(p.V.shape[-1])), p.Q.element_size() == 2
    rows = min(64 if narrow and head <= 128 else 32, padded(p.high * p.wide))
    if target[0] == "hip" and head > 64:
        return TileConfig(16, 16 if head > 128 else 32, 4, 1)
    limit = 255 if target[0] == "cuda" else 0
    return TileConfig(rows, 32 if narrow or head <= 64 else 16, 4 if head <= 64 else 8, 1, registers=limit)


def _sizes(p: Problem) -> dict[str, Any]:
    _, H, Y, X, D = p.Q.shape
    return {
        "H": H, "Y": Y, "X": X, "D": D, "D_PAD": padded(D), "high": p.high, "wide": p.wide, "across": p.across,
        "regions": p.regions,
    }  # fmt: skip


def region_scores(p: Problem) -> Tensor:
    """`[b,a,n]` in float32: products of mean queries and mean keys, over all heads (Eq. 4)."""
    batch, H, _, _, D = p.Q.shape
    means, tiles = [], -(-p.regions // MEAN_REGIONS)
    for tensor in (p.Q, p.K):
        mean = torch.empty((batch, p.regions, H * D), dtype=torch.float32, device=p.Q.device)
        arguments = {"A": tensor, "MEAN": mean, **strides("a", tensor, "bhyxd"), **_sizes(p), "tiles": tiles,
                     "BLOCK": MEAN_REGIONS}  # fmt: skip
        names = region_mean_kernel.arg_names
        programs = batch * H * tiles
        Launch("region_mean", region_mean_kernel, programs, {n: arguments[n] for n in names}).run(p.Q.device)
        means.append(mean)
    scores = torch.empty((batch, p.regions, p.regions), dtype=torch.float32, device=p.Q.device)
    tiles = -(-p.regions // SCORE_TILE.block_m)
    arguments = {
        "Q": means[0], "K": means[1], "A": scores, "regions": p.regions, "tiles": tiles, "F": H * D,
        "BLOCK_M": SCORE_TILE.block_m, "BLOCK_N": SCORE_TILE.block_n, "BLOCK_F": SCORE_FEATURES,
    }  # fmt: skip
    Launch("region_score", region_score_kernel, batch * tiles * tiles, arguments, SCORE_TILE).run(p.Q.device)
    return scores


def forward(p: Problem, target: Target | None) -> Tensor:
    """O `[b,h,y,x,e]` in the inputs' dtype. Of region pairs of equal score the lower number is kept."""
    scores = region_scores(p)
    # A stable sort: `topk` says nothing about ties.
    best = scores.sort(dim=-1, descending=True, stable=True)
    kept = min(p.topk, p.regions)
    pick = best.indices[..., :kept].to(torch.int32).contiguous()
    share = (p.scale * best.values[..., :kept]).softmax(-1) if p.soft else None
    O = torch.empty(p.V.shape, dtype=p.V.dtype, device=p.V.device)
    tile, E = tile_of(p, target), p.V.shape[-1]
    tiles = -(-(p.high * p.wide) // tile.block_m)
    arguments = {
        "Q": p.Q, "K": p.K, "V": p.V, "O": O, "PICK": pick, "SHARE": share, "LEPE": p.lepe_w, "LEPE_BIAS": p.lepe_b,
        **strides("q", p.Q, "bhyxd"), **strides("k", p.K, "bhyxd"), **strides("v", p.V, "bhyxe"),
        **strides("o", O, "bhyxe"), **strides("w", p.lepe_w, "cpq"), **strides("bias", p.lepe_b, "c"), **_sizes(p),
        "kept": kept, "tiles": tiles, "S": 0 if p.lepe_w is None else p.lepe_w.shape[-1], "scale": p.scale,
        "E": E, "E_PAD": padded(E), "ZEROS": p.zeros, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    programs = p.Q.shape[0] * p.Q.shape[1] * p.regions * tiles
    kernel = region_attention_kernel
    Launch("region_attention", kernel, programs, {n: arguments[n] for n in kernel.arg_names}, tile).run(p.Q.device)
    return O
