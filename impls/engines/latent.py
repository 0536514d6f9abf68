"""Attention of many heads over one latent per token (multi-query, absorbed form): the latents are keys and values.

A program owns a tile of rows, a row being one head of one query, and walks the tokens that some row may see. A token's
key is its latent beside a short rotary key; the latent is read once and serves both products. With SPLITS > 1 the
tokens are divided over programs, and `softmax_decode` merges the partial results. What a row may not see does not
reach it, not even NaN: a tile whose result is not finite is taken again over its kept pairs only (REPAIR).
"""

# ruff: noqa: E741 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.softmax_configs import TileConfig, interpreted_tile, padded
from attnspec.impls.engines.softmax_decode import ROWS, softmax_merge_kernel, split_count
from attnspec.impls.engines.softmax_tiles import LOG2E, exact_product, narrowed, not_finite, product

WIDEST_LATENT = {2: 512, 4: 256}
"""By bytes per element: a row of the accumulator stays in registers, and float32 products take more of them."""
WIDEST_ROTARY = 128


@triton.jit(do_not_specialize=["H", "N", "M", "tiles", "flag_tiles"])
def latent_kernel(
    QA, QR, C, KR, MASK, K_LEN, O, LSE, FLAG, qa_b, qa_h, qa_i, qa_r, qr_b, qr_h, qr_i, qr_u, c_b, c_j, c_r,
    kr_b, kr_j, kr_u, mask_b, mask_h, mask_i, mask_j, o_s, o_b, o_h, o_i, l_s, l_b, l_h, l_i,
    H, N, M, tiles, flag_tiles, scale, R: tl.constexpr, U: tl.constexpr, R_PAD: tl.constexpr, U_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, SPLITS: tl.constexpr, REPAIR: tl.constexpr, FLAG_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program: one tile of rows (i, h), h running faster, of one split of one batch entry."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    split = pid // tiles % SPLITS
    b = pid // (tiles * SPLITS)
    flag = pid // tiles * flag_tiles + tile * BLOCK_M // FLAG_BLOCK
    b64 = b.to(tl.int64)
    split64 = split.to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = row // H
    inside = i < N
    i64 = i.to(tl.int64)
    h64 = (row % H).to(tl.int64)
    r = tl.arange(0, R_PAD)
    r64 = r.to(tl.int64)
    nk = M
    if K_LEN is not None:
        nk = tl.minimum(tl.load(K_LEN + b), M)
    pos = i + nk - N
    hi = nk
    if CAUSAL:
        last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // H, N - 1)
        hi = tl.minimum(hi, last + nk - N + 1)
    end = tl.cdiv(tl.maximum(hi, 0), BLOCK_N)
    begin = 0
    if SPLITS > 1:
        share = tl.cdiv(end, SPLITS)
        begin = split * share
        end = tl.minimum(begin + share, end)
    if REPAIR:
        broken = tl.load(FLAG + flag) != 0
        end = tl.where(broken, end, begin)

    q_mask = inside[:, None] & (r < R)[None, :]
    qa = tl.load((QA + (b64 * qa_b + h64 * qa_h + i64 * qa_i))[:, None] + (r64 * qa_r)[None, :], mask=q_mask, other=0.0)
    if U > 0:
        u = tl.arange(0, U_PAD)
        u64 = u.to(tl.int64)
        u_mask = inside[:, None] & (u < U)[None, :]
        qr_rows = QR + (b64 * qr_b + h64 * qr_h + i64 * qr_i)
        qr = tl.load(qr_rows[:, None] + (u64 * qr_u)[None, :], mask=u_mask, other=0.0)
    if MASK is not None:
        mask_rows = MASK + (b64 * mask_b + h64 * mask_h + i64 * mask_i)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, R_PAD], tl.float32)
    for it in range(begin, end):
        j = it * BLOCK_N + tl.arange(0, BLOCK_N)
        j64 = j.to(tl.int64)
        real = j < hi
        c_rows = C + (b64 * c_b + j64 * c_j)
        c = tl.load(c_rows[:, None] + (r64 * c_r)[None, :], mask=real[:, None] & (r < R)[None, :], other=0.0)
        raw = product(qa, tl.trans(c), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if U > 0:
            kr_rows = KR + (b64 * kr_b + j64 * kr_j)
            kr = tl.load(kr_rows[:, None] + (u64 * kr_u)[None, :], mask=real[:, None] & (u < U)[None, :], other=0.0)
            raw = product(qr, tl.trans(kr), raw)
        keep = inside[:, None] & real[None, :]
        if CAUSAL:
            keep = keep & (j[None, :] <= pos[:, None])
        if MASK is not None:
            keep = keep & (tl.load(mask_rows[:, None] + (j64 * mask_j)[None, :], mask=keep, other=0) != 0)
        s = tl.where(keep, raw * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen no token yet keeps top = -inf; subtracting it would give -inf - -inf.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((top - safe) * LOG2E)
        norm = norm * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        top = new_top
        if REPAIR:
            acc = exact_product(acc, p, keep, c, BLOCK_N)
        else:
            acc = product(narrowed(p, c.dtype), c, acc)

    empty = norm == 0.0
    acc = acc / tl.where(empty, 1.0, norm)[:, None]
    rows = N
    if REPAIR:
        rows = tl.where(broken, N, 0)
    else:
        lse = tl.where(empty, float("-inf"), tl.where(empty, 0.0, top) + tl.log(tl.where(empty, 1.0, norm)))
        tl.store(LSE + (split64 * l_s + b64 * l_b + h64 * l_h + i64 * l_i), lse, mask=inside)
        if FLAG is not None:
            tl.store(FLAG + flag, not_finite(acc))
    o_rows = O + (split64 * o_s + b64 * o_b + h64 * o_h + i64 * o_i)
    o_mask = (i < rows)[:, None] & (r < R)[None, :]
    tl.store(o_rows[:, None] + r64[None, :], narrowed(acc, O.dtype.element_ty), mask=o_mask)


@dataclass(frozen=True)
class Latent:
    """A checked problem: QA `[b,h,i,r]`, QR `[b,h,i,u]`, C `[b,j,r]`, KR `[b,j,u]` of one dtype; any strides.

    mask: bool `[b,h,i,j]`. length: int32 `[b]`, tokens in use. Queries are the last of them.
    """

    QA: Tensor
    QR: Tensor
    C: Tensor
    KR: Tensor
    mask: Tensor | None
    length: Tensor | None
    causal: bool
    scale: float


def configs(r: int, itemsize: int, target: runtime.Target | None) -> list[TileConfig]:
    """Configurations for latents of this rank, the preferred one first. `target` is None under the interpreter."""
    if target is None:
        return [TileConfig(32, 32, 1, 1), TileConfig(16, 16, 1, 1, splits=3), TileConfig(64, 16, 1, 1)]
    wide = padded(r)
    registers = 255 if target[0] == "cuda" else 0
    if itemsize == 4:
        sizes = [(16, 16, 8 if wide > 128 else 4)]
    elif wide > 256:
        sizes = [(32, 16, 8), (16, 16, 8)] if registers else [(16, 16, 8)]
    else:
        sizes = [(64, 32, 8), (16, 32, 4)] if wide > 128 and registers else [(32, 32, 4)]
    return [TileConfig(m, n, warps, 1, registers=registers) for m, n, warps in sizes]


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def plan(
    p: Latent, config: TileConfig | None, target: runtime.Target | None, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches, the output in the latent space `[b,h,i,r]` and LSE `[b,h,i]`, not yet written."""
    B, H, N, R = p.QA.shape
    M, U = p.C.shape[1], p.QR.shape[3]
    known = configs(R, p.QA.dtype.itemsize, target)
    tile = config or (known[0] if target else interpreted_tile(known, N * H, M))
    tiles = -(-N * H // tile.block_m)
    splits = tile.splits or split_count(tiles * B, -(-M // tile.block_n), processors)
    where: dict[str, Any] = {"device": p.QA.device}
    O = torch.empty((B, H, N, R), dtype=p.QA.dtype, **where)
    LSE = torch.empty((B, H, N), dtype=torch.float32, **where)
    part, part_lse = O[None], LSE[None]
    if splits > 1:
        part = torch.empty((splits, *O.shape), dtype=torch.float32, **where)
        part_lse = torch.empty((splits, *LSE.shape), dtype=torch.float32, **where)
    flags = None
    if p.mask is not None or (p.causal and N > 1):
        flags = torch.empty(tiles * splits * B, dtype=torch.int32, **where)
    mask = None if p.mask is None else p.mask.view(torch.uint8)
    arguments = {
        "QA": p.QA, "QR": p.QR, "C": p.C, "KR": p.KR, "MASK": mask, "K_LEN": p.length, "O": part, "LSE": part_lse,
        "FLAG": flags, **_strides("qa", p.QA, "bhir"), **_strides("qr", p.QR, "bhiu"), **_strides("c", p.C, "bjr"),
        **_strides("kr", p.KR, "bju"), **_strides("mask", mask, "bhij"), **_strides("o", part[..., 0], "sbhi"),
        **_strides("l", part_lse, "sbhi"), "H": H, "N": N, "M": M, "tiles": tiles, "flag_tiles": tiles,
        "scale": p.scale, "R": R, "U": U, "R_PAD": padded(R), "U_PAD": padded(max(U, 1)), "CAUSAL": p.causal,
        "SPLITS": splits, "FLAG_BLOCK": tile.block_m, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    programs = tiles * splits * B
    launches = [Launch("latent", latent_kernel, programs, arguments | {"REPAIR": False}, tile)]
    if flags is not None:
        # The repair holds more in registers: fewer rows, but as many tokens, of which splits share out whole tiles.
        own = tile if target is None else replace(tile, block_m=16, warps=max(tile.warps, 8))
        tiles = -(-N * H // own.block_m)
        again = arguments | {"REPAIR": True, "BLOCK_M": own.block_m, "BLOCK_N": own.block_n, "tiles": tiles}
        launches.append(Launch("latent_repair", latent_kernel, tiles * splits * B, again, own))
    if splits > 1:
        merge = {
            "PART": part, "PART_LSE": part_lse, "SINK": None, "O": O, "LSE": LSE,
            **_strides("p", part[..., 0], "sbhi"), **_strides("l", part_lse, "sbhi"), **_strides("o", O, "bhie"),
            **_strides("f", LSE, "bhi"), "H": H, "N": N, "splits": splits, "E": R, "E_PAD": padded(R), "BLOCK_R": ROWS,
        }  # fmt: skip
        launches.append(Launch("latent_merge", softmax_merge_kernel, -(-N // ROWS) * H * B, merge, None))
    return launches, O, LSE


def forward(p: Latent, config: TileConfig | None = None) -> tuple[Tensor, Tensor]:
    """The output in the latent space `[b,h,i,r]`, in the inputs' dtype, and LSE `[b,h,i]` in float32."""
    target = runtime.target_of(p.QA)
    launches, O, LSE = plan(p, config, target, runtime.processors(p.QA))
    for launch in launches:
        launch.run(p.QA.device)
    return O, LSE
