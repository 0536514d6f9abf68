"""Linear attention with a decaying matrix state, chunk by chunk: forward, and the two sweeps of the backward pass.

    S[t] = diag(exp(a[t])) S[t-1] + outer(k[t], v[t]),    o[t] = scale * q[t] S[t]

A program owns one head and a block of value features, and walks the chunks with the state in registers: inside a chunk
the masked product (Q K^T) V, across chunks the state (Qin et al., arXiv 2405.17381, Algorithms 1 and 2; Yang et al.,
arXiv 2312.06635, section 4). The log decay `a` is one number per token and head, or (VECTOR) one per key feature; then
the decay between two tokens cannot leave the product, and a chunk's scores are taken column by column. Decays enter as
exponentials of differences that are never positive, so that nothing overflows however strong they are.

Head h reads values, decays and the state of head h // G, queries of head h // R and keys of head h // (G R): G > 1
where query heads share a state, R > 1 where states share queries and keys. Gradients are given per head. `W` `[b,h,t]`
multiplies what a token writes (None: by 1).
Sums over value features are left partial, one slice per program, and added by the caller: no atomics, the same bits
every time. Launched by `linear_launch`, compiled ahead of time by `attnspec.impls.aot`.
"""

# ruff: noqa: E741, RUF059 (O is the field's name of the output; Triton knows no placeholder names)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import narrowed, product, widened

SIZES = ["H", "G", "R", "T", "chunks"]


@triton.jit
def apart(x):
    """Keep products of float32 before and after this apart: the operands of one of them fill the registers."""
    if x.dtype == tl.float32:
        tl.debug_barrier()


@triton.jit
def tile(X, rows, columns, x_t, x_d, T, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of `[t, d]` at `rows`, columns at `columns`; zeros outside."""
    mask = (rows < T)[:, None]
    if D != D_PAD:
        mask = mask & (columns < D)[None, :]
    return tl.load(X + rows.to(tl.int64)[:, None] * x_t + columns[None, :] * x_d, mask=mask, other=0.0)


@triton.jit
def log_decays(
    A, rows, columns, a_t, a_d, T,
    C: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Log decays of a chunk in float32: of each token, of the token after it, from the chunk's start through it, and
    from after it to the chunk's end.

    Each sum is one of its own terms and no difference of longer sums, which would lose the digits of weak decays beside
    strong ones.
    """
    # What comes after a row, within the chunk.
    after = rows + 1
    last = tl.arange(0, C) == C - 1
    if VECTOR:
        a = widened(tile(A, rows, columns, a_t, a_d, T, D, D_PAD))
        later = tl.where(last[:, None], 0.0, widened(tile(A, after, columns, a_t, a_d, T, D, D_PAD)))
    else:
        a = widened(tl.load(A + rows.to(tl.int64) * a_t, mask=rows < T, other=0.0))
        later = tl.where(last, 0.0, widened(tl.load(A + after.to(tl.int64) * a_t, mask=after < T, other=0.0)))
    return a, later, tl.cumsum(a, 0), tl.cumsum(later, 0, reverse=True)


@triton.jit
def row(x, at, C: tl.constexpr):
    """Row `at` of a tile."""
    chosen = (tl.arange(0, C) == at)[:, None]
    return tl.sum(tl.where(chosen, x, 0.0), 0)


@triton.jit
def between(a, C: tl.constexpr):
    """`[i, j]`: the decay from token j to a token i at or after it, 0 before it; `a` is `[i]`."""
    at = tl.arange(0, C)
    gaps = tl.cumsum(tl.where(at[:, None] > at[None, :], a[:, None], 0.0), 0)
    return tl.where(at[:, None] >= at[None, :], tl.exp(gaps), 0.0)


@triton.jit
def from_row(a, j, C: tl.constexpr):
    """`[i, d]`: the decay from token j to token i, 0 before it; `a` is `[i, d]`."""
    at = tl.arange(0, C)
    gaps = tl.cumsum(tl.where((at > j)[:, None], a, 0.0), 0)
    return tl.where((at >= j)[:, None], tl.exp(gaps), 0.0)


@triton.jit
def up_to_row(later, i, C: tl.constexpr):
    """`[j, d]`: the decay from token j to token i, 0 after it; `later` is the log decay of the token after each."""
    at = tl.arange(0, C)
    gaps = tl.cumsum(tl.where((at < i)[:, None], later, 0.0), 0, reverse=True)
    return tl.where((at <= i)[:, None], tl.exp(gaps), 0.0)


@triton.jit
def strengths(W, rows, w_t, T, C: tl.constexpr):
    """`[i]`: what multiplies a token's write, in float32."""
    if W is not None:
        w = widened(tl.load(W + rows.to(tl.int64) * w_t, mask=rows < T, other=0.0))
    else:
        w = tl.full([C], 1.0, tl.float32)
    return w


@triton.jit
def passing(pairs, leaving, C: tl.constexpr):
    """`[t]`: the sum of pairs `[i, j]` with j <= t < i and of `leaving` `[j]` with j <= t, but 0 at the chunk's last t.

    That is what the decay of the token after t stands in. Terms are selected before they are added: those beside them
    may be larger by any factor.
    """
    at = tl.arange(0, C)
    upto = tl.cumsum(tl.where(at[:, None] > at[None, :], pairs, 0.0), 1)
    found = tl.sum(tl.where(at[:, None] > at[None, :], upto, 0.0), 0) + tl.cumsum(leaving, 0)
    return tl.where(at < C - 1, found, 0.0)


@triton.jit
def scores(q, k, a, C: tl.constexpr, VECTOR: tl.constexpr):
    """`[i, j]`: decayed products of the rows of q with the rows of k at or before them, in float32."""
    at = tl.arange(0, C)
    found = tl.zeros([C, C], tl.float32)
    if VECTOR:
        for j in range(C):
            column = tl.sum(widened(q) * row(widened(k), j, C)[None, :] * from_row(a, j, C), 1)
            found = tl.where((at == j)[None, :], column[:, None], found)
    else:
        found = product(q, tl.trans(k), found) * between(a, C)
    return found


@triton.jit
def factors(logs, VECTOR: tl.constexpr):
    """Exponentials of per-token logs `[i]` or `[i, d]`, as `[i, 1]` or `[i, d]`."""
    return tl.exp(logs) if VECTOR else tl.exp(logs)[:, None]


@triton.jit
def advance(state, a, VECTOR: tl.constexpr):
    """The state `[d, e]` decayed over a whole chunk."""
    return state * (tl.exp(tl.sum(a, 0))[:, None] if VECTOR else tl.exp(tl.sum(a, 0)))


@triton.jit(do_not_specialize=SIZES)
def linear_forward_kernel(
    Q, K, V, A, W, S0, O, S1,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, a_d, w_b, w_h, w_t,
    s_b, s_h, s_d, s_e, o_b, o_h, o_t, o_e, scale, H, G, R, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Outputs (where O is given) and, where S1 is (contiguous `[b,h,d,e]` in float32), the state after the last token.
    """
    program = tl.program_id(0)
    block = program % E_BLOCKS
    head = program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g_head = h // G
    d = tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    Q += b * q_b + h // R * q_h
    K += b * k_b + g_head // R * k_h
    V += b * v_b + g_head * v_h
    A += b * a_b + g_head * a_h
    if W is not None:
        W += b * w_b + g_head * w_h
    if O is not None:
        O += b * o_b + h * o_h
    inside = (d < D)[:, None] & (e < E)[None, :]
    state = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + g_head * s_h + d[:, None] * s_d + e[None, :] * s_e
        state += widened(tl.load(at_state, mask=inside, other=0.0))
    for chunk in range(chunks):
        rows = chunk * C + tl.arange(0, C)
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        a, later, before, onward = log_decays(A, rows, d, a_t, a_d, T, C, D, D_PAD, VECTOR)
        w = strengths(W, rows, w_t, T, C)
        if O is not None:
            q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
            seen = narrowed(widened(q) * factors(before, VECTOR), q.dtype)
            weights = narrowed(scores(q, k, a, C, VECTOR) * w[None, :], v.dtype)
            out = product(weights, v, tl.zeros([C, E_BLOCK], tl.float32))
            out = product(seen, narrowed(state, q.dtype), out)
            mask = (rows < T)[:, None] & (e < E)[None, :]
            at_out = O + rows.to(tl.int64)[:, None] * o_t + e[None, :] * o_e
            tl.store(at_out, narrowed(out * scale, O.dtype.element_ty), mask=mask)
        written = narrowed(widened(k) * factors(onward, VECTOR) * w[:, None], k.dtype)
        state = product(tl.trans(written), v, advance(state, a, VECTOR))
    if S1 is not None:
        # The heads of a group share their state: the first one writes it.
        at_state = S1 + ((b * (H // G) + g_head) * D + d[:, None]) * E + e[None, :]
        tl.store(at_state, state, mask=tl.where(inside, head % G, 1) == 0)


@triton.jit(do_not_specialize=SIZES)
def linear_dq_kernel(
    Q, K, V, A, W, S0, DO, DQ, ST, DA,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, a_d, w_b, w_h, w_t,
    s_b, s_h, s_d, s_e, do_b, do_h, do_t, do_e, scale, H, G, R, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, a slice of `DQ` (contiguous `[blocks,b,h,t,d]`, float32) per block of value features.

    The state is computed again along the way. Where DA is given (slices `[blocks,b,h,t]`; decays per head only), it
    gets what queries owe to the decays of their chunk, and ST `[b,h,chunks,d,e]` the state before each chunk.
    """
    program = tl.program_id(0)
    block = program % E_BLOCKS
    head = program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g_head = h // G
    d = tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    K += b * k_b + g_head // R * k_h
    V += b * v_b + g_head * v_h
    A += b * a_b + g_head * a_h
    if W is not None:
        W += b * w_b + g_head * w_h
    DO += b * do_b + h * do_h
    if DA is not None:
        Q += b * q_b + h // R * q_h
        DA += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T
        ST += head.to(tl.int64) * chunks * D * E
    DQ += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T * D
    inside = (d < D)[:, None] & (e < E)[None, :]
    state = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if S0 is not None:
        at_state = S0 + b * s_b + g_head * s_h + d[:, None] * s_d + e[None, :] * s_e
        state += widened(tl.load(at_state, mask=inside, other=0.0))
    at = tl.arange(0, C)
    for chunk in range(chunks):
        rows = chunk * C + at
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
        a, later, before, onward = log_decays(A, rows, d, a_t, a_d, T, C, D, D_PAD, VECTOR)
        w = strengths(W, rows, w_t, T, C)
        pull = product(g, tl.trans(v), tl.zeros([C, C], tl.float32)) * w[None, :]
        dq = product(g, tl.trans(narrowed(state, g.dtype)), tl.zeros([C, D_PAD], tl.float32))
        dq = dq * factors(before, VECTOR)
        if DA is not None:
            # A query reads the state through all decays of the chunk up to its own.
            q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
            reads = tl.cumsum(tl.sum(widened(q) * dq, 1), 0, reverse=True)
            tl.store(DA + rows, reads * scale, mask=rows < T)
            tl.store(ST + d[:, None] * E + e[None, :], state, mask=inside)
            ST += D * E
        if VECTOR:
            for j in range(C):
                weight = tl.sum(tl.where((at == j)[None, :], pull, 0.0), 1)
                dq += weight[:, None] * row(widened(k), j, C)[None, :] * from_row(a, j, C)
        else:
            dq = product(narrowed(pull * between(a, C), k.dtype), k, dq)
        mask = (rows < T)[:, None] & (d < D)[None, :]
        tl.store(DQ + rows.to(tl.int64)[:, None] * D + d[None, :], dq * scale, mask=mask)
        written = narrowed(widened(k) * factors(onward, VECTOR) * w[:, None], k.dtype)
        state = product(tl.trans(written), v, advance(state, a, VECTOR))


@triton.jit(do_not_specialize=SIZES)
def linear_dkv_kernel(
    Q, K, V, A, W, DO, DS1, DK, DV, DW, DS0, ST, DA, DP,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_e, a_b, a_h, a_t, a_d, w_b, w_h, w_t,
    do_b, do_h, do_t, do_e, s_b, s_h, s_d, s_e, o_b, o_h, o_t, o_e, scale, H, G, R, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradients of keys (slices, as in `linear_dq_kernel`), values and the initial state, from the last chunk on.

    DW gets those of the strengths, in slices `[blocks,b,h,t]`. DA and ST are what `linear_dq_kernel` left; the rest of
    the decays' gradients is added to DA or, for the token after, stored in DP. DS1 is the cotangent of the final state
    or None, and counts once for a group; DS0 is contiguous `[b,h,d,e]` in float32 or None.
    """
    program = tl.program_id(0)
    block = program % E_BLOCKS
    head = program // E_BLOCKS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g_head = h // G
    d = tl.arange(0, D_PAD)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    Q += b * q_b + h // R * q_h
    K += b * k_b + g_head // R * k_h
    V += b * v_b + g_head * v_h
    A += b * a_b + g_head * a_h
    if W is not None:
        W += b * w_b + g_head * w_h
    DO += b * do_b + h * do_h
    DV += b * o_b + h * o_h
    if DA is not None:
        DA += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T
        DP += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T
        ST += (head.to(tl.int64) * chunks + chunks - 1) * D * E
    if DW is not None:
        DW += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T
    DK += (block.to(tl.int64) * (tl.num_programs(0) // E_BLOCKS) + head) * T * D
    inside = (d < D)[:, None] & (e < E)[None, :]
    # The gradient of the state at the end of the chunk.
    behind = tl.zeros([D_PAD, E_BLOCK], tl.float32)
    if DS1 is not None:
        at_state = DS1 + b * s_b + g_head * s_h + d[:, None] * s_d + e[None, :] * s_e
        behind += widened(tl.load(at_state, mask=tl.where(inside, head % G, 1) == 0, other=0.0))
    at = tl.arange(0, C)
    for step in range(chunks):
        rows = (chunks - 1 - step) * C + at
        q = tile(Q, rows, d, q_t, q_d, T, D, D_PAD)
        k = tile(K, rows, d, k_t, k_d, T, D, D_PAD)
        v = tile(V, rows, e, v_t, v_e, T, E, E_BLOCK * E_BLOCKS)
        g = tile(DO, rows, e, do_t, do_e, T, E, E_BLOCK * E_BLOCKS)
        a, later, before, onward = log_decays(A, rows, d, a_t, a_d, T, C, D, D_PAD, VECTOR)
        w = strengths(W, rows, w_t, T, C)
        written = narrowed(widened(k) * factors(onward, VECTOR) * w[:, None], k.dtype)
        forwards = tl.trans(scores(q, k, a, C, VECTOR)) * (scale * w)[:, None]
        weights = narrowed(forwards, g.dtype)
        dv = product(weights, g, tl.zeros([C, E_BLOCK], tl.float32))
        dv = product(written, narrowed(behind, k.dtype), dv)
        mask = (rows < T)[:, None] & (e < E)[None, :]
        tl.store(DV + rows.to(tl.int64)[:, None] * o_t + e[None, :] * o_e, narrowed(dv, DV.dtype.element_ty), mask=mask)
        # `[j, i]`: how much query i pulls on key j, through these value features.
        pull = product(v, tl.trans(g), tl.zeros([C, C], tl.float32))
        dk = product(v, tl.trans(narrowed(behind, v.dtype)), tl.zeros([C, D_PAD], tl.float32))
        dk = dk * factors(onward, VECTOR)
        if DA is not None:
            # The chunk's pairs on both sides of a token, what earlier tokens leave behind, and what only passes by.
            leaving = tl.sum(widened(k) * dk, 1) * w
            tl.store(DP + rows, passing(tl.trans(pull * forwards), leaving, C), mask=rows < T)
            entering = tl.load(ST + d[:, None] * E + e[None, :], mask=inside, other=0.0)
            ST -= D * E
            through = tl.sum(entering * advance(behind, a, VECTOR))
            tl.store(DA + rows, tl.load(DA + rows, mask=rows < T, other=0.0) + through, mask=rows < T)
        pull = pull * scale
        if VECTOR:
            for i in range(C):
                weight = tl.sum(tl.where((at == i)[None, :], pull, 0.0), 1)
                dk += weight[:, None] * row(widened(q), i, C)[None, :] * up_to_row(later, i, C)
        else:
            dk = product(narrowed(pull * tl.trans(between(a, C)), q.dtype), q, dk)
        # So far the gradient of the key times its strength.
        if DW is not None:
            tl.store(DW + rows, tl.sum(widened(k) * dk, 1), mask=rows < T)
            dk = dk * w[:, None]
        mask = (rows < T)[:, None] & (d < D)[None, :]
        tl.store(DK + rows.to(tl.int64)[:, None] * D + d[None, :], dk, mask=mask)
        seen = narrowed(widened(q) * factors(before, VECTOR) * scale, q.dtype)
        behind = product(tl.trans(seen), g, advance(behind, a, VECTOR))
    if DS0 is not None:
        tl.store(DS0 + ((b * H + h) * D + d[:, None]) * E + e[None, :], behind, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def linear_read_kernel(
    Q, S, O, q_b, q_h, q_t, q_d, s_b, s_h, s_d, s_e, o_b, o_h, o_t, o_e, H, T, chunks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """O = Q S with one state for all tokens: attention without a mask. One program per chunk of tokens."""
    program = tl.program_id(0)
    block, place = program % E_BLOCKS, program // E_BLOCKS
    chunk, head = place % chunks, place // chunks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    d, rows = tl.arange(0, D_PAD), chunk * C + tl.arange(0, C)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    q = tile(Q + b * q_b + h * q_h, rows, d, q_t, q_d, T, D, D_PAD)
    at_state = S + b * s_b + h * s_h + d[:, None] * s_d + e[None, :] * s_e
    state = widened(tl.load(at_state, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0))
    out = product(q, narrowed(state, q.dtype), tl.zeros([C, E_BLOCK], tl.float32))
    at_out = O + b * o_b + h * o_h + rows.to(tl.int64)[:, None] * o_t + e[None, :] * o_e
    tl.store(at_out, narrowed(out, O.dtype.element_ty), mask=(rows < T)[:, None] & (e < E)[None, :])
