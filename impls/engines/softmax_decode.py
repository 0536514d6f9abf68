"""Split-KV attention for few queries and many keys (flash-decoding): how many splits, and the merge of their results.

The splits themselves are computed by `softmax_forward_kernel` with SPLITS > 1; each leaves a normalized partial
output in float32 and its LSE. The merge weighs them by exp(LSE_s - LSE); a split without any key has LSE = -inf and
weight 0. A sink logit joins here, once.
"""

# ruff: noqa: E741, PIE808 (Triton takes Python only as far as this: O is the output, ranges state their start)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import (
    LOG2E,
    narrowed,
    widened,
)

ROWS = 16


@triton.jit(do_not_specialize=["H", "N", "splits"])
def softmax_merge_kernel(
    PART, PART_LSE, SINK, O, LSE, p_s, p_b, p_h, p_i, l_s, l_b, l_h, l_i, o_b, o_h, o_i, o_e, f_b, f_h, f_i,
    H, N, splits, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_R rows of one head of one batch entry. Two passes over the splits: the maximum, then the sum."""
    tiles = tl.cdiv(N, BLOCK_R)
    pid = tl.program_id(0)
    b = (pid // (tiles * H)).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    i = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, E_PAD)
    rows = i < N
    i64 = i.to(tl.int64)
    lse_rows = PART_LSE + (b * l_b + h * l_h + i64 * l_i)
    part_rows = PART + (b * p_b + h * p_h + i64 * p_i)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if SINK is not None:
        top = tl.maximum(top, widened(tl.load(SINK + h)))
    for s in range(0, splits):
        top = tl.maximum(top, tl.load(lse_rows + s * l_s, mask=rows, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    norm = tl.zeros([BLOCK_R], tl.float32)
    if SINK is not None:
        norm += tl.exp2((widened(tl.load(SINK + h)) - safe) * LOG2E)
    acc = tl.zeros([BLOCK_R, E_PAD], tl.float32)
    for s in range(0, splits):
        weight = tl.exp2((tl.load(lse_rows + s * l_s, mask=rows, other=float("-inf")) - safe) * LOG2E)
        norm += weight
        part = tl.load((part_rows + s * p_s)[:, None] + e[None, :], mask=rows[:, None] & (e < E)[None, :], other=0.0)
        acc += tl.where((weight != 0.0)[:, None], weight[:, None] * part, 0.0)
    empty = norm == 0.0
    divisor = tl.where(empty, 1.0, norm)
    lse = tl.where(empty, float("-inf"), safe + tl.log(divisor))
    acc = acc / divisor[:, None]
    o_rows = O + (b * o_b + h * o_h + i64 * o_i)
    tl.store(
        o_rows[:, None] + (e.to(tl.int64) * o_e)[None, :],
        narrowed(acc, O.dtype.element_ty),
        mask=rows[:, None] & (e < E)[None, :],
    )
    tl.store(LSE + (b * f_b + h * f_h + i64 * f_i), lse, mask=rows)


def split_count(programs: int, key_tiles: int, processors: int) -> int:
    """How many splits keep about two programs per multiprocessor busy, at least two key tiles to each split."""
    wanted = max(1, 2 * processors // max(programs, 1))
    return max(1, min(wanted, key_tiles // 2, 64))
