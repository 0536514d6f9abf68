"""Attention over channels: maps between the channels of a group, and one gate per channel.

    S[c,k] = scale * sum_i K[i,c] V[i,k],    O[i,c] = sum_k softmax_k(S[c,k]) Q[i,k]        (channel groups)
    O[c,y,x] = X[c,y,x] * sigmoid(sum_m w[c,m] mean(X[c + m - (T-1)/2]))                    (channel gates)

Sums over positions run over spans, whose parts the next kernel adds up: no atomics. Launched by
`attnspec.impls.channel`.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed, product, widened


@triton.jit
def block_of(X, rows, columns, x_r, x_c, R, C):
    """Elements `[rows, columns]` of a matrix, zeros outside."""
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    at = (X + rows.to(tl.int64) * x_r)[:, None] + (columns.to(tl.int64) * x_c)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["G", "N", "C", "spans", "steps", "blocks"])
def channel_products_kernel(
    K, V, PARTIAL, k_b, k_g, k_i, k_c, v_b, v_g, v_i, v_c, G, N, C, spans, steps, blocks,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of sum_i K[i,c] V[i,k] over a span of positions: PARTIAL `[b,g,spans,c,k]`, contiguous in float32."""
    program = tl.program_id(0)
    part = program // (blocks * blocks)
    head = part // spans
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    c = program // blocks % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for step in range(steps):
        i = (part % spans * steps + step) * BLOCK + tl.arange(0, BLOCK)
        left = block_of(K + b * k_b + g * k_g, i, c, k_i, k_c, N, C)
        right = block_of(V + b * v_b + g * v_g, i, k, v_i, v_c, N, C)
        acc = product(tl.trans(left), right, acc)
    at = PARTIAL + part.to(tl.int64) * C * C + c[:, None] * C + k[None, :]
    tl.store(at, acc, mask=(c < C)[:, None] & (k < C)[None, :])


@triton.jit(do_not_specialize=["C", "spans"])
def channel_softmax_kernel(PARTIAL, A, a_b, a_g, a_c, a_k, G, C, spans, scale, C_PAD: tl.constexpr):
    """One row of the map: the parts added up, scaled, and their softmax over k."""
    program = tl.program_id(0)
    head = program // C
    c = program % C
    k = tl.arange(0, C_PAD)
    total = tl.zeros([C_PAD], tl.float32)
    for span in range(spans):
        at = PARTIAL + (head * spans + span).to(tl.int64) * C * C + c * C + k
        total += tl.load(at, mask=k < C, other=0.0)
    s = tl.where(k < C, total * scale, float("-inf"))
    p = tl.exp2((s - tl.max(s, 0)) * LOG2E)
    row = A + (head // G).to(tl.int64) * a_b + (head % G).to(tl.int64) * a_g + c.to(tl.int64) * a_c
    tl.store(row + k.to(tl.int64) * a_k, narrowed(p / tl.sum(p, 0), A.dtype.element_ty), mask=k < C)


@triton.jit(do_not_specialize=["G", "N", "C", "tiles", "blocks"])
def channel_mixing_kernel(
    Q, A, O, q_b, q_g, q_i, q_c, a_b, a_g, a_c, a_k, o_b, o_g, o_i, o_c, G, N, C, tiles, blocks,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """O[i,c] = sum_k A[c,k] Q[i,k], for a tile of positions and a block of channels."""
    program = tl.program_id(0)
    head = program // (tiles * blocks)
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    i = program // blocks % tiles * BLOCK + tl.arange(0, BLOCK)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        q = block_of(Q + b * q_b + g * q_g, i, k, q_i, q_c, N, C)
        a = block_of(A + b * a_b + g * a_g, c, k, a_c, a_k, C, C)
        acc = product(q, tl.trans(a), acc)
    at = (O + b * o_b + g * o_g + i.to(tl.int64) * o_i)[:, None] + (c.to(tl.int64) * o_c)[None, :]
    tl.store(at, narrowed(acc, O.dtype.element_ty), mask=(i < N)[:, None] & (c < C)[None, :])


@triton.jit
def plane(at, y_step, x_step, WIDTH):
    """Offsets of the cells `at` of a plane, counted row by row."""
    return (at // WIDTH).to(tl.int64) * y_step + (at % WIDTH).to(tl.int64) * x_step


@triton.jit(do_not_specialize=["C", "area", "WIDTH"])
def channel_means_kernel(X, MEAN, x_b, x_c, x_y, x_x, C, area, WIDTH, BLOCK: tl.constexpr):
    """The mean of one channel's plane: MEAN `[b,c]`, contiguous in float32."""
    program = tl.program_id(0)
    X += (program // C).to(tl.int64) * x_b + (program % C).to(tl.int64) * x_c
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, area, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += widened(tl.load(X + plane(at, x_y, x_x, WIDTH), mask=at < area, other=0.0))
    tl.store(MEAN + program, tl.sum(acc, 0) / area)


@triton.jit(do_not_specialize=["C", "T", "area", "WIDTH", "tiles"])
def channel_gates_kernel(
    X, MEAN, W, O, GATE, x_b, x_c, x_y, x_x, o_b, o_c, o_y, o_x, w_c, w_m, C, T, area, WIDTH, tiles,
    T_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gate of one channel, GATE `[b,c]` (contiguous), and a tile of its plane multiplied by it."""
    program = tl.program_id(0)
    c = program // tiles % C
    b = program // tiles // C
    m = tl.arange(0, T_PAD)
    near = c + m - (T - 1) // 2
    inside = (m < T) & (near >= 0) & (near < C)
    w = widened(tl.load(W + c.to(tl.int64) * w_c + m.to(tl.int64) * w_m, mask=inside, other=0.0))
    u = tl.sum(w * tl.load(MEAN + (b * C + near).to(tl.int64), mask=inside, other=0.0), 0)
    gate = 1.0 / (1.0 + tl.exp2(-u * LOG2E))
    if program % tiles == 0:
        # A block of one: a store of a scalar takes no part in rounding by hand.
        one = tl.zeros([1], tl.float32) + gate
        tl.store(GATE + (b * C + c).to(tl.int64) + tl.arange(0, 1), narrowed(one, GATE.dtype.element_ty))
    at = program % tiles * BLOCK + tl.arange(0, BLOCK)
    b64, c64 = b.to(tl.int64), c.to(tl.int64)
    x = widened(tl.load(X + b64 * x_b + c64 * x_c + plane(at, x_y, x_x, WIDTH), mask=at < area, other=0.0))
    here = O + b64 * o_b + c64 * o_c + plane(at, o_y, o_x, WIDTH)
    tl.store(here, narrowed(x * gate, O.dtype.element_ty), mask=at < area)
