"""Launching landmark attention: where blocks begin and end, which cached blocks are fetched, tiles, and launches.

The numbers of landmarks of a call decide about the shapes of tables, so that the host waits for them: once for the
backward pass, once for a forward pass with retrieval.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnspec.impls.engines.landmark_backward import landmark_blocks_kernel, landmark_dkv_kernel, landmark_dq_kernel
from attnspec.impls.engines.landmark_forward import landmark_forward_kernel, landmark_scores_kernel
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.neighborhood_launch import strides
from attnspec.impls.engines.softmax_backward import row_term_kernel
from attnspec.impls.engines.softmax_configs import LARGE, TileConfig, interpreted_tile, padded

Target = tuple[str, int | str]
Kind = Literal["forward", "scores", "blocks", "dq", "dkv"]
TERM_ROWS = 16
INTERPRETED = [TileConfig(32, 32, 1, 1), TileConfig(16, 16, 1, 1), TileConfig(16, 64, 1, 1)]


@dataclass(frozen=True)
class Blocks:
    """Tables of int32: `lm [b,M+2]` positions of the landmarks in order, then M; `blk [b,j]`; `cur [b,i]`."""

    lm: Tensor
    blk: Tensor
    cur: Tensor


@dataclass(frozen=True)
class Problem:
    """A checked call; landmark is `[b,j]` bool."""

    Q: Tensor
    K: Tensor
    V: Tensor
    landmark: Tensor
    topk: int | None
    select: str
    scale: float
    config: TileConfig | None = None


def blocks_of(p: Problem) -> Blocks:
    """The tables of a call."""
    N, (batch, M) = p.Q.shape[2], p.landmark.shape
    counted = torch.nn.functional.pad(p.landmark.to(torch.int32).cumsum(1, dtype=torch.int32), (1, 0))
    blk, places = counted[:, :-1], torch.arange(M, device=p.Q.device, dtype=torch.int32)
    lm = torch.full((batch, M + 2), M, dtype=torch.int32, device=p.Q.device)
    # What is not a landmark writes to the last column, which must read M again.
    lm.scatter_(1, torch.where(p.landmark, blk, M + 1).long(), places.expand(batch, M))
    lm[:, M + 1] = M
    at = (torch.arange(N, device=p.Q.device) + (M - N)).clamp(min=0)
    return Blocks(lm, blk.contiguous(), counted[:, at].contiguous())


def tile_of(p: Problem, kind: Kind, target: Target | None) -> TileConfig:
    """The configuration of a kernel; what the call gives comes first.

    The choices are those that compile without spilling, not timed.
    """
    if p.config is not None:
        return p.config
    if target is None:
        # A step takes one block of keys, which may be short: many queries make the steps few.
        found = interpreted_tile(INTERPRETED, p.Q.shape[2], p.K.shape[2])
        return found if found == INTERPRETED[0] else replace(found, block_m=8 * LARGE, block_n=32)
    head, narrow = max(padded(p.Q.shape[-1]), padded(p.V.shape[-1])), p.Q.element_size() == 2
    # A wave of AMD has 64 lanes: eight of them have 256 registers each, four have 512.
    limit, wide = (255, 8) if target[0] == "cuda" else (0, 4)
    if kind == "scores":
        return TileConfig(32, 32, 4, 1, registers=limit) if narrow else TileConfig(16, 16, 8, 1, registers=limit)
    if kind == "forward" and narrow:
        return TileConfig(64 if head <= 64 else 32, 32, 4 if head <= 128 else 8, 1, registers=limit)
    if head <= (128 if narrow and kind != "blocks" else 64) and (narrow or kind == "forward"):
        return TileConfig(32, 32, 4 if narrow and head <= 64 else wide, 1, registers=limit)
    return TileConfig(16, 16, wide if head > 64 else 4, 1, registers=limit)


def _common(p: Problem, blocks: Blocks) -> dict[str, Any]:
    D, E = p.Q.shape[-1], p.V.shape[-1]
    return {
        "Q": p.Q, "K": p.K, "V": p.V, "LM": blocks.lm, "BLK": blocks.blk, "CUR": blocks.cur,
        **strides("q", p.Q, "bhid"), **strides("k", p.K, "bhjd"), **strides("v", p.V, "bhje"),
        "H": p.Q.shape[1], "N": p.Q.shape[2], "M": p.K.shape[2], "scale": p.scale,
        "D": D, "E": E, "D_PAD": padded(D), "E_PAD": padded(E),
    }  # fmt: skip


def _launch(
    name: str, kernel: Any, tile: TileConfig, size: int, heads: int, given: dict[str, Any], axis: str = "block_m"
) -> Launch:
    """One program for every tile of `axis` of every head, times `columns_tiles` where there are such."""
    tiles = -(-size // getattr(tile, axis))
    arguments = given | {"tiles": tiles, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    programs = tiles * heads * given.get("columns_tiles", 1)
    return Launch(name, kernel, programs, {n: arguments[n] for n in kernel.arg_names}, tile)


def _twice(p: Problem, kind: Kind, kernel: Any, target: Target | None, given: dict[str, Any]) -> list[Launch]:
    """The launch, and its repair of heads that are not finite, which holds more and takes the smallest tiles."""
    heads = p.Q.shape[0] * p.Q.shape[1]
    tile = tile_of(p, kind, target)
    small = tile if target is None else TileConfig(16, 16, tile.warps, 1, registers=tile.registers)
    flags = torch.zeros(heads, dtype=torch.int32, device=p.Q.device)
    size, axis = (p.K.shape[2], "block_n") if kind == "dkv" else (p.Q.shape[2], "block_m")
    return [
        _launch(f"landmark_{kind}{'_repair' if repair else ''}", kernel, own, size, heads,
                given | {"FLAG": flags, "REPAIR": repair}, axis)
        for repair, own in ((False, tile), (True, small))
    ]  # fmt: skip


def fetched(p: Problem, blocks: Blocks, target: Target | None) -> Tensor | None:
    """`[b,h|1,i|1,c]` bytes: which of the cached blocks a row attends to; None: all of them."""
    (batch, H, N), M = p.Q.shape[:3], p.K.shape[2]
    cache = max(M - N, 0)
    cached = int(p.landmark[:, :cache].sum(1).max()) if p.topk is not None and batch and N else 0
    if p.topk is None or cached <= p.topk:
        return None
    tile = tile_of(p, "scores", target)
    logits = torch.empty((batch, H, N, cached), dtype=torch.float32, device=p.Q.device)
    given = _common(p, blocks) | {"S": logits, "cached": cached, "columns_tiles": -(-cached // tile.block_n)}
    _launch("landmark_scores", landmark_scores_kernel, tile, N, batch * H, given).run(p.Q.device)
    rating = logits
    if p.select != "token_and_head":
        # The logarithm of the softmax over the cached blocks: comparable between rows.
        rating = logits.log_softmax(-1).amax(1 if p.select == "over_heads" else 2, keepdim=True)
    order = rating.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(rating.shape, dtype=torch.uint8, device=p.Q.device)
    kept.scatter_(-1, order[..., : p.topk], 1)
    # An entry of the batch with fewer cached blocks: the others are closed later, and not chosen among.
    missing = blocks.lm[:, :cached] >= cache
    return kept.masked_fill_(missing[:, None, None, :], 1)


def forward(p: Problem, target: Target | None) -> tuple[Tensor, Tensor, Blocks, Tensor | None]:
    """O `[b,h,i,e]`, LSE of the outer softmax `[b,h,i]`, and what the backward pass needs again."""
    blocks = blocks_of(p)
    kept = fetched(p, blocks, target)
    O = torch.empty((*p.Q.shape[:3], p.V.shape[-1]), dtype=p.V.dtype, device=p.V.device)
    LSE = torch.empty(p.Q.shape[:3], dtype=torch.float32, device=p.Q.device)
    given = _common(p, blocks) | {"O": O, "LSE": LSE, **strides("o", O, "bhie"), **_open(p, kept)}
    for launch in _twice(p, "forward", landmark_forward_kernel, target, given):
        launch.run(p.Q.device)
    return O, LSE, blocks, kept


def _open(p: Problem, kept: Tensor | None) -> dict[str, Any]:
    shape = None if kept is None else kept.expand(*p.Q.shape[:3], -1)
    return {"OPEN": kept, **strides("open", shape, "bhic"), "cached": 0 if kept is None else kept.shape[-1]}


def backward(
    p: Problem, O: Tensor, LSE: Tensor, dO: Tensor, blocks: Blocks, kept: Tensor | None, target: Target | None
) -> dict[str, Tensor]:
    """Gradients of Q, K and V in their dtype; the choice of blocks is constant."""
    batch, H, N = p.Q.shape[:3]
    columns = int(p.landmark.sum(1).max()) + 1 if p.landmark.numel() else 1
    found = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in zip("QKV", (p.Q, p.K, p.V))}
    T = torch.empty_like(LSE)
    A, G = (torch.empty((batch, H, N, columns), dtype=torch.float32, device=p.Q.device) for _ in range(2))
    given = _common(p, blocks) | {
        "O": O, "DO": dO, "LSE": LSE, "DLSE": None, "T": T, "Q_LEN": None, "Q_SEG": None, "A": A, "G": G,
        "columns": columns, **strides("o", O, "bhie"), **strides("do", dO, "bhie"), **strides("l", LSE, "bhi"),
        **strides("dl", None, "bhi"), "DQ": found["Q"], "DK": found["K"], "DV": found["V"],
        **strides("dq", found["Q"], "bhid"), **strides("dk", found["K"], "bhjd"), **strides("dv", found["V"], "bhje"),
        **_open(p, kept),
    }  # fmt: skip
    rows = TileConfig(TERM_ROWS, 16, 4, 1)
    launches = [_launch("row_term", row_term_kernel, rows, N, batch * H, given)]
    tile = tile_of(p, "blocks", target)
    launches.append(_launch("landmark_blocks", landmark_blocks_kernel, tile, N, batch * H, given))
    launches += _twice(p, "dq", landmark_dq_kernel, target, given)
    launches += _twice(p, "dkv", landmark_dkv_kernel, target, given)
    for launch in launches:
        launch.run(p.Q.device)
    return found
