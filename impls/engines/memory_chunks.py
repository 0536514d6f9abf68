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

Memories are `[d, e]` here. Products of bfloat16 inputs with float32 operands are taken in three parts, so that errors
and states lose nothing to the inputs' format; float16 has not the range for that, and is widened (WIDE). What can be a
product of tiles is one, sums along gates included: reductions and scans cost more, on a device and, where each is a
function call, far more in the interpreter. Launched by `memory_launch`.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.linear_chunks import tile
from attnspec.impls.engines.softmax_tiles import narrowed, product, widened

SIZES = ["H", "T", "tiles", "per_group", "group", "part"]
VECTORS = tl.constexpr(7)
COLUMNS = tl.constexpr(16)
"""Of a matrix that stands for a few vectors: the least that a product takes."""


@triton.jit
def exact(a, b, acc):
    """acc + a @ b with a in the inputs' dtype and b in float32, as three parts of it where that is bfloat16."""
    # The operands of one product fill the registers: products are kept apart.
    tl.debug_barrier()
    if a.dtype == tl.float32:
        total = tl.dot(a, b, acc, input_precision="ieee")
    else:
        high = narrowed(b, a.dtype)
        rest = b - widened(high)
        middle = narrowed(rest, a.dtype)
        low = narrowed(rest - widened(middle), a.dtype)
        total = product(a, high, product(a, middle, product(a, low, acc)))
    return total


@triton.jit
def both(a, c, b, acc):
    """acc + a @ b and acc + c @ b, likewise, for a and c in bfloat16: one part of b at a time."""
    tl.debug_barrier()
    high = narrowed(b, a.dtype)
    rest = b - widened(high)
    middle = narrowed(rest, a.dtype)
    low = narrowed(rest - widened(middle), a.dtype)
    first = product(a, low, acc)
    second = product(c, low, acc)
    tl.debug_barrier()
    first = product(a, middle, first)
    second = product(c, middle, second)
    tl.debug_barrier()
    return product(a, high, first), product(c, high, second)


@triton.jit
def decay(chosen, logs, rests):
    """Powers of two of sums of logarithms. `logs` are coarse, so that their sums are exact; `rests` are what they leave
    out: a rounded sum of strong decays would be off by more than a product of as many gates."""
    whole = tl.exp2(tl.dot(chosen, logs, input_precision="ieee"))
    return whole * tl.exp2(tl.dot(chosen, rests, input_precision="ieee"))


@triton.jit
def span(tile_index, T, per_group, group, C: tl.constexpr):
    """First token of a tile, and how many tokens it has."""
    inner = tile_index % per_group * C
    first = tile_index // per_group * group + inner
    return first, tl.minimum(tl.minimum(C, group - inner), T - first)


@triton.jit(do_not_specialize=SIZES)
def memory_system_kernel(
    Q, K, GATES, INV, SC, VEC,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, gate_x, H, T, tiles, per_group, group, part,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, HELD: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """INV `[b,h,tiles,C,C]`, from right sides to errors; SC, from errors to outputs; VEC `[b,h,tiles,7,C]`, weights.

    GATES `[x,b,h,t]`, contiguous: logarithms of 1 - alpha and of eta, finite; their rests; the step. VEC: of memory and
    momentum in the predictions, of both in the outputs, of the errors in the next memory and the next momentum, and (in
    one row) of memory and momentum in the next memory and of momentum in the next one.
    """
    program = tl.program_id(0)
    index, head = program % tiles, program // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    at, d, c = tl.arange(0, C), tl.arange(0, D_PAD), tl.arange(0, COLUMNS)
    row, column = at[:, None], at[None, :]
    first, valid = span(index, T, per_group, group, C)
    Q += b * q_b + h * q_h + first.to(tl.int64) * q_t
    K += b * k_b + h * k_h + first.to(tl.int64) * k_t
    q = tile(Q, at, d, q_t, q_d, valid, D, D_PAD)
    k = tile(K, at, d, k_t, k_d, valid, D, D_PAD)
    gates = GATES + head.to(tl.int64) * T + first + at
    keep = tl.load(gates, mask=at < valid, other=0.0)[:, None]
    stay = tl.load(gates + gate_x, mask=at < valid, other=0.0)[:, None]
    keep_rest = tl.load(gates + 2 * gate_x, mask=at < valid, other=0.0)[:, None]
    stay_rest = tl.load(gates + 3 * gate_x, mask=at < valid, other=0.0)[:, None]
    step = tl.load(gates + 4 * gate_x, mask=at < valid, other=0.0)[None, :]
    # `[i, j]`: from token j to a later token i, of a memory, of a momentum, and of an error to the memory.
    upto = tl.where(row >= column, 1.0, 0.0)
    after = row > column
    kept = decay(upto, tl.where(after, keep, 0.0), tl.where(after, keep_rest, 0.0)) * upto
    momenta = decay(upto, tl.where(after, stay, 0.0), tl.where(after, stay_rest, 0.0)) * upto
    through = tl.dot(kept, momenta, input_precision="ieee")
    # `[i, c]`: from before the tile to token i, of a memory and a momentum; of a momentum to the memory.
    memories = (c == 0)[None, :]
    before = decay(upto, tl.where(memories, keep, stay), tl.where(memories, keep_rest, stay_rest))
    gained = tl.dot(kept, before, input_precision="ieee")
    both = tl.where(memories, before, gained)
    # The memory that an error is taken at, and the one that a query reads: both are named by the token before.
    anchor = tl.where(at < valid, at // part * part, 0) - 1
    seen = at if POST else at - 1
    at_anchor = tl.where(anchor[:, None] == column, 1.0, 0.0)
    at_seen = tl.where(seen[:, None] == column, 1.0, 0.0)
    inverse = tl.where(row == column, 1.0, 0.0)
    if not HELD:
        alike = product(k, tl.trans(k), tl.full([C, C], 0.0, tl.float32))
        system = tl.dot(at_anchor, through, input_precision="ieee") * alike * step
        # Blocks of twice the size from the inverses of both halves: powers of the system would cancel where keys are
        # alike.
        apart = row ^ column
        size = 1
        while size < C:
            corner = tl.where(after & (apart >= size) & (apart < 2 * size), system, 0.0)
            inner = tl.dot(corner, inverse, input_precision="ieee")
            inverse -= tl.dot(inverse, inner, input_precision="ieee")
            size *= 2
    weights = tl.dot(at_seen, through, input_precision="ieee") * step
    scores = product(q, tl.trans(k), tl.full([C, C], 0.0, tl.float32)) * weights
    place = (head.to(tl.int64) * tiles + index) * C
    square = place * C + row * C + column
    tl.store(INV + square, inverse)
    tl.store(SC + square, scores)
    rows = VEC + place * VECTORS + row
    pair = c[None, :]
    new = tl.where(pair == 0, 1.0, 0.0)
    predicted = tl.where(anchor[:, None] < 0, new, tl.dot(at_anchor, both, input_precision="ieee"))
    tl.store(rows + pair * C, predicted, mask=pair < 2)
    read = tl.where(seen[:, None] < 0, new, tl.dot(at_seen, both, input_precision="ieee"))
    tl.store(rows + (2 + pair) * C, read, mask=pair < 2)
    last = row == valid - 1
    line = VEC + place * VECTORS + column
    tl.store(line + 4 * C + row * 0, through * step, mask=last)
    tl.store(line + 5 * C + row * 0, momenta * step, mask=last)
    final = VEC + place * VECTORS + 6 * C + pair
    tl.store(final + row * 0, tl.where(pair < 2, both, before), mask=last & (pair < 3))


@triton.jit(do_not_specialize=SIZES)
def memory_kernel(
    Q, K, V, INV, SC, VEC, W0, S0, O, W1, S1,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, w_b, w_h, w_e, w_d, s_b, s_h, s_e, s_d,
    o_b, o_h, o_t, o_e, H, T, tiles, per_group, group,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
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
    O += b * o_b + h * o_h
    memory = widened(tl.load(W0 + b * w_b + h * w_h + d[:, None] * w_d + e[None, :] * w_e, mask=inside, other=0.0))
    momentum = tl.full([D_PAD, E_BLOCK], 0.0, tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + h * s_h + d[:, None] * s_d + e[None, :] * s_e
        momentum += widened(tl.load(at_state, mask=inside, other=0.0))
    held = memory
    none = tl.full([C, E_BLOCK], 0.0, tl.float32)
    for index in range(tiles):
        first, valid = span(index, T, per_group, group, C)
        start = first.to(tl.int64)
        k = tile(K + start * k_t, at, d, k_t, k_d, valid, D, D_PAD)
        if WIDE:
            k = k.to(tl.float32)
        v = widened(tile(V + start * v_t, at, e, v_t, v_e, valid, E, E_BLOCK * E_BLOCKS))
        place = (head.to(tl.int64) * tiles + index) * C
        square = place * C + at[:, None] * C + at[None, :]
        rows = VEC + place * VECTORS + at
        # Operands fill the registers. Parts of 16 bits are shared by both reads, one at a time; in float32 the errors
        # come first, and queries are loaded when it is their turn.
        if HELD:
            held = tl.where(index % per_group == 0, memory, held)
            errors = exact(k, held, none) - v
            q = tile(Q + start * q_t, at, d, q_t, q_d, valid, D, D_PAD)
        elif WIDE:
            right = exact(k, memory, none) * tl.load(rows)[:, None]
            right += exact(k, momentum, none) * tl.load(rows + C)[:, None]
            tl.debug_barrier()
            errors = tl.dot(tl.load(INV + square), right - v, input_precision="ieee")
            q = tile(Q + start * q_t, at, d, q_t, q_d, valid, D, D_PAD)
        else:
            q = tile(Q + start * q_t, at, d, q_t, q_d, valid, D, D_PAD)
            from_memory, out = both(k, q, memory, none)
            from_momentum, out_momentum = both(k, q, momentum, none)
            right = from_memory * tl.load(rows)[:, None] + from_momentum * tl.load(rows + C)[:, None]
            out = out * tl.load(rows + 2 * C)[:, None] + out_momentum * tl.load(rows + 3 * C)[:, None]
            tl.debug_barrier()
            errors = tl.dot(tl.load(INV + square), right - v, input_precision="ieee")
        if WIDE:
            q = q.to(tl.float32)
        if HELD or WIDE:
            out = exact(q, memory, none) * tl.load(rows + 2 * C)[:, None]
            out += exact(q, momentum, none) * tl.load(rows + 3 * C)[:, None]
        tl.debug_barrier()
        out -= tl.dot(tl.load(SC + square), errors, input_precision="ieee")
        at_out = O + (start + at)[:, None] * o_t + e[None, :] * o_e
        tl.store(at_out, narrowed(out, O.dtype.element_ty), mask=(at < valid)[:, None] & (e < E)[None, :])
        final = VEC + place * VECTORS + 6 * C
        memory = memory * tl.load(final) + momentum * tl.load(final + 1)
        memory = exact(tl.trans(k), errors * -tl.load(rows + 4 * C)[:, None], memory)
        momentum = exact(tl.trans(k), errors * -tl.load(rows + 5 * C)[:, None], momentum * tl.load(final + 2))
    at_state = (head.to(tl.int64) * E + e[None, :]) * D + d[:, None]
    tl.store(W1 + at_state, memory, mask=inside)
    tl.store(S1 + at_state, momentum, mask=inside)
