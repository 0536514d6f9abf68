"""A matrix memory trained by gradient steps with momentum and forgetting, tile by tile (Behrouz et al., arXiv
2501.00663, equations 8-15 and section 3.2).

    G[i] = slope * outer(k[i], held k[i] - v[i])
    S[i] = eta[i] S[i-1] - theta[i] G[i],    W[i] = (1 - alpha[i]) W[i-1] + S[i]

where `held` is the memory before the first token of the definition's chunk. Both recurrences are linear, so that all
memories of a tile are weighted sums of memory and momentum before the tile and of the tile's errors; and an error
depends on earlier ones through the memory that it is taken at, which is a triangular system. `memory_system_kernel`
solves it and weighs everything, for all tiles at once; `memory_kernel` walks the tiles with memory and momentum in
registers. A definition's chunk is either one of several within a tile (tokens beyond the last whole one wait for the
next tile) or covers several tiles (HELD: then `held` is kept as well).

Memories are `[d, e]` here. Products with float32 operands in 16-bit inputs are taken in three parts, so that errors and
states lose nothing to the inputs' format. Launched by `memory_launch`.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.linear_chunks import between, tile
from attnspec.impls.engines.softmax_tiles import narrowed, product, widened

SIZES = ["H", "T", "tiles", "per_group", "group", "part"]
VECTORS = tl.constexpr(7)


@triton.jit
def exact(a, b, acc):
    """acc + a @ b with a in the inputs' dtype and b in float32, as three parts of the inputs' dtype."""
    # The operands of one product fill the registers: products are kept apart.
    tl.debug_barrier()
    if a.dtype == tl.float32:
        total = product(a, b, acc)
    else:
        high = narrowed(b, a.dtype)
        rest = b - widened(high)
        middle = narrowed(rest, a.dtype)
        low = narrowed(rest - widened(middle), a.dtype)
        total = product(a, high, product(a, middle, product(a, low, acc)))
    return total


@triton.jit
def span(tile_index, T, per_group, group, C: tl.constexpr):
    """First token of a tile, and how many tokens it has."""
    inner = tile_index % per_group * C
    first = tile_index // per_group * group + inner
    return first, tl.minimum(tl.minimum(C, group - inner), T - first)


@triton.jit
def gate(X, at, first, valid, x_t):
    """`[i]`: a gate of a tile's tokens in float32, 0 beyond them."""
    return widened(tl.load(X + (first + at).to(tl.int64) * x_t, mask=at < valid, other=0.0))


@triton.jit
def rows_of(X, at, columns, first, valid, x_t, x_d, D: tl.constexpr, D_PAD: tl.constexpr):
    """`[i, d]`: a tile's tokens, zeros beyond them."""
    return tile(X + first.to(tl.int64) * x_t, at, columns, x_t, x_d, valid, D, D_PAD)


@triton.jit
def picked(x, chosen, C: tl.constexpr):
    """`[i, m]`: row chosen[i] of the `[l, m]`, zeros where chosen is none."""
    onehot = tl.where(chosen[:, None] == tl.arange(0, C)[None, :], 1.0, 0.0)
    return product(onehot, x, tl.zeros([C, C], tl.float32))


@triton.jit
def entries(x, chosen, C: tl.constexpr):
    """`[i]`: entry chosen[i] of the `[l]`, 0 where chosen is none."""
    at = tl.arange(0, C)
    return tl.sum(tl.where(chosen[:, None] == at[None, :], x[None, :], 0.0), 1)


@triton.jit(do_not_specialize=SIZES)
def memory_system_kernel(
    Q, K, KEEP, STAY, THETA, INV, SC, VEC,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, keep_b, keep_h, keep_t, stay_b, stay_h, stay_t,
    theta_b, theta_h, theta_t, slope, H, T, tiles, per_group, group, part,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, HELD: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """INV `[b,h,tiles,C,C]`, from right sides to errors; SC, from errors to outputs; VEC `[b,h,tiles,7,C]`, weights.

    KEEP and STAY are the logarithms of 1 - alpha and eta. VEC: of memory and momentum in the predictions, of both in
    the outputs, of the errors in the next memory and the next momentum, and (in one row) of memory and momentum in the
    next memory and of momentum in the next one.
    """
    program = tl.program_id(0)
    index, head = program % tiles, program // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    at, d = tl.arange(0, C), tl.arange(0, D_PAD)
    first, valid = span(index, T, per_group, group, C)
    q = rows_of(Q + b * q_b + h * q_h, at, d, first, valid, q_t, q_d, D, D_PAD)
    k = rows_of(K + b * k_b + h * k_h, at, d, first, valid, k_t, k_d, D, D_PAD)
    keeps = gate(KEEP + b * keep_b + h * keep_h, at, first, valid, keep_t)
    stays = gate(STAY + b * stay_b + h * stay_h, at, first, valid, stay_t)
    step = slope * gate(THETA + b * theta_b + h * theta_h, at, first, valid, theta_t)
    kept = between(keeps, C)
    momenta = between(stays, C)
    # From a token's error, or the momentum before the tile, to the memory after a later token.
    start = tl.exp(tl.cumsum(keeps, 0))
    fading = tl.exp(tl.cumsum(stays, 0))
    through = product(kept, momenta, tl.zeros([C, C], tl.float32))
    gained = tl.sum(kept * fading[None, :], 1)
    # The memory that an error is taken at, and the one that a query reads: both are named by the token before.
    anchor = tl.where(at < valid, at // part * part, 0) - 1
    inverse = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    if not HELD:
        alike = product(k, tl.trans(k), tl.zeros([C, C], tl.float32))
        system = picked(through, anchor, C) * alike * step[None, :]
        for i in range(1, C):
            own = (at == i)[:, None]
            line = tl.sum(tl.where(own, system, 0.0), 0)
            inverse = tl.where(own, inverse - tl.sum(line[:, None] * inverse, 0)[None, :], inverse)
    seen = at if POST else at - 1
    scores = product(q, tl.trans(k), tl.zeros([C, C], tl.float32)) * picked(through, seen, C) * step[None, :]
    place = (head.to(tl.int64) * tiles + index) * C
    square = place * C + at[:, None] * C + at[None, :]
    tl.store(INV + square, inverse)
    tl.store(SC + square, scores)
    last = at == valid - 1
    final = tl.where(at == 0, tl.sum(tl.where(last, start, 0.0), 0), 0.0)
    final += tl.where(at == 1, tl.sum(tl.where(last, gained, 0.0), 0), 0.0)
    final += tl.where(at == 2, tl.sum(tl.where(last, fading, 0.0), 0), 0.0)
    rows = VEC + place * VECTORS + at
    tl.store(rows, tl.where(anchor < 0, 1.0, entries(start, anchor, C)))
    tl.store(rows + C, entries(gained, anchor, C))
    tl.store(rows + 2 * C, tl.where(seen < 0, 1.0, entries(start, seen, C)))
    tl.store(rows + 3 * C, entries(gained, seen, C))
    tl.store(rows + 4 * C, tl.sum(tl.where(last[:, None], through, 0.0), 0) * step)
    tl.store(rows + 5 * C, tl.sum(tl.where(last[:, None], momenta, 0.0), 0) * step)
    tl.store(rows + 6 * C, final)


@triton.jit(do_not_specialize=SIZES)
def memory_kernel(
    Q, K, V, INV, SC, VEC, W0, S0, O, W1, S1,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, w_b, w_h, w_e, w_d, s_b, s_h, s_e, s_d,
    o_b, o_h, o_t, o_e, H, T, tiles, per_group, group,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Outputs, and memory W1 and momentum S1 after the last token, contiguous `[b,h,e,d]` in float32."""
    program = tl.program_id(0)
    block, head = program % E_BLOCKS, program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    at, d = tl.arange(0, C), tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    inside = (d < D)[:, None] & (e < E)[None, :]
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    memory = widened(tl.load(W0 + b * w_b + h * w_h + d[:, None] * w_d + e[None, :] * w_e, mask=inside, other=0.0))
    momentum = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + h * s_h + d[:, None] * s_d + e[None, :] * s_e
        momentum += widened(tl.load(at_state, mask=inside, other=0.0))
    held = memory
    none = tl.zeros([C, E_BLOCK], tl.float32)
    for index in range(tiles):
        first, valid = span(index, T, per_group, group, C)
        q = rows_of(Q, at, d, first, valid, q_t, q_d, D, D_PAD)
        k = rows_of(K, at, d, first, valid, k_t, k_d, D, D_PAD)
        v = widened(rows_of(V, at, e, first, valid, v_t, v_e, E, E_BLOCK * E_BLOCKS))
        place = (head.to(tl.int64) * tiles + index) * C
        square = place * C + at[:, None] * C + at[None, :]
        rows = VEC + place * VECTORS + at
        if HELD:
            held = tl.where(index % per_group == 0, memory, held)
            errors = exact(k, held, none) - v
        else:
            right = exact(k, memory, none) * tl.load(rows)[:, None]
            right += exact(k, momentum, none) * tl.load(rows + C)[:, None]
            errors = product(tl.load(INV + square), right - v, none)
        out = exact(q, memory, none) * tl.load(rows + 2 * C)[:, None]
        out += exact(q, momentum, none) * tl.load(rows + 3 * C)[:, None]
        out -= product(tl.load(SC + square), errors, none)
        at_out = O + b * o_b + h * o_h + (first + at).to(tl.int64)[:, None] * o_t + e[None, :] * o_e
        tl.store(at_out, narrowed(out, O.dtype.element_ty), mask=(at < valid)[:, None] & (e < E)[None, :])
        final = VEC + place * VECTORS + 6 * C
        memory = memory * tl.load(final) + momentum * tl.load(final + 1)
        memory = exact(tl.trans(k), errors * -tl.load(rows + 4 * C)[:, None], memory)
        momentum = exact(tl.trans(k), errors * -tl.load(rows + 5 * C)[:, None], momentum * tl.load(final + 2))
    at_state = (head.to(tl.int64) * E + e[None, :]) * D + d[:, None]
    tl.store(W1 + at_state, memory, mask=inside)
    tl.store(S1 + at_state, momentum, mask=inside)
