"""Flow attention on tiles of tokens: flows of sources and sinks, what competition gathers, and what sinks read.

    flow[i] = sum_d (x[i] + eps)(other + eps) + outer_eps,    o[i] = gain[i] * x[i] @ sum_j outer(y[j] c[j], v[j])

x and y are feature maps of queries and keys (Wu et al., arXiv 2202.06258, section 3.2). Bidirectional sums run over
spans of tokens and are added up by the caller; the causal kernels walk the tokens of a head with running sums in
registers. Long rows are taken in blocks of features, as registers hold no state of them all. Launched by
`attnspec.impls.flow`.
"""

# ruff: noqa: E741 (O is the field's name of the output)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.mapped_tiles import guarded_product, rows_of
from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed, product, widened

SIZES = ["H", "N", "spans", "steps"]


@triton.jit
def features(X, at, x_i, d, x_d, inside, RELU: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """The feature map of rows `at`, in float32; zeros outside."""
    x = widened(rows_of(X, at, x_i, d, x_d, inside, D, D_PAD))
    if RELU:
        # A comparison, as a maximum would drop NaN.
        x = tl.where(x < 0.0, 0.0, x) + 1e-6
    else:
        x = 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    return tl.where(inside[:, None] & (d < D)[None, :], x, 0.0)


@triton.jit
def exchanged(x, other, eps, outer_eps, d, D: tl.constexpr):
    """The flow between each row of x and `other` (`[d]` or `[i, d]`)."""
    each = (x + eps) * (other + eps)
    return tl.sum(tl.where((d < D)[None, :], each, 0.0), 1) + outer_eps


@triton.jit
def accurate_product(x, state, acc, dtype: tl.constexpr):
    """acc + x @ state, where x is rounded to `dtype` and the float32 state is not (its rest is multiplied as well)."""
    high = narrowed(state, dtype)
    acc = product(narrowed(x, dtype), high, acc)
    if dtype != tl.float32:
        acc = product(narrowed(x, dtype), narrowed(state - widened(high), dtype), acc)
    return acc


@triton.jit(do_not_specialize=SIZES)
def flow_sums_kernel(
    X, LENGTH, OTHER, FLOW, PARTIAL, x_b, x_h, x_i, x_d, H, N, spans, steps, eps, outer_eps,
    D: tl.constexpr, D_PAD: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a span of tokens: flows to OTHER `[b,h,d]` where given, and the sum of features, divided by their flows.

    FLOW is `[b,h,i]`, PARTIAL `[b,h,spans,d]` or None, all contiguous in float32.
    """
    program = tl.program_id(0)
    span = program % spans
    head = program // spans
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    X += b * x_b + h * x_h
    length = N
    if LENGTH is not None:
        length = tl.minimum(tl.load(LENGTH + b), N).to(tl.int32)
    d = tl.arange(0, D_PAD)
    if OTHER is not None:
        other = tl.load(OTHER + head.to(tl.int64) * D + d, mask=d < D, other=0.0)[None, :]
    acc = tl.zeros([D_PAD], tl.float32)
    for step in range(steps):
        i = (span * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = features(X, i, x_i, d, x_d, i < length, RELU, D, D_PAD)
        if OTHER is not None:
            flow = exchanged(x, other, eps, outer_eps, d, D)
            tl.store(FLOW + head.to(tl.int64) * N + i, flow, mask=i < N)
            x = tl.where((i < length)[:, None], x / flow[:, None], 0.0)
        acc += tl.sum(x, 0)
    if PARTIAL is not None:
        tl.store(PARTIAL + program.to(tl.int64) * D + d, acc, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def flow_gather_kernel(
    K, V, LENGTH, WEIGHT, PARTIAL, k_b, k_h, k_i, k_d, v_b, v_h, v_i, v_e, H, N, spans, steps,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, D_BLOCKS: tl.constexpr, E_BLOCK: tl.constexpr,
    E_BLOCKS: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a span of tokens: the sum of outer(k weight, v), `[b,h,spans,d,e]` (contiguous, float32)."""
    block = tl.program_id(0) % (D_BLOCKS * E_BLOCKS)
    program = tl.program_id(0) // (D_BLOCKS * E_BLOCKS)
    span = program % spans
    head = program // spans
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    length = N
    if LENGTH is not None:
        length = tl.minimum(tl.load(LENGTH + b), N).to(tl.int32)
    d = block // E_BLOCKS * D_BLOCK + tl.arange(0, D_BLOCK)
    e = block % E_BLOCKS * E_BLOCK + tl.arange(0, E_BLOCK)
    acc = tl.zeros([D_BLOCK, E_BLOCK], tl.float32)
    for step in range(steps):
        i = (span * steps + step) * BLOCK + tl.arange(0, BLOCK)
        k = features(K, i, k_i, d, k_d, i < length, RELU, D, D_BLOCK * D_BLOCKS)
        v = rows_of(V, i, v_i, e, v_e, i < length, E, E_BLOCK * E_BLOCKS)
        weight = tl.load(WEIGHT + head.to(tl.int64) * N + i, mask=i < length, other=0.0)
        acc = product(tl.trans(narrowed(k * weight[:, None], v.dtype)), v, acc)
    at = PARTIAL + program.to(tl.int64) * (D * E) + d[:, None] * E + e[None, :]
    tl.store(at, acc, mask=(d < D)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=SIZES)
def flow_output_kernel(
    Q, LENGTH, GAIN, STATE, O, q_b, q_h, q_i, q_d, o_b, o_h, o_i, o_e, H, N, spans,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, D_BLOCKS: tl.constexpr, E_BLOCK: tl.constexpr,
    E_BLOCKS: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the output: gain * q @ STATE `[b,h,d,e]`; zeros beyond the length. A program owns a tile of queries."""
    program = tl.program_id(0)
    block = program % E_BLOCKS
    span = program // E_BLOCKS % spans
    head = program // E_BLOCKS // spans
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    length = N
    if LENGTH is not None:
        length = tl.minimum(tl.load(LENGTH + b), N).to(tl.int32)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    i = span * BLOCK + tl.arange(0, BLOCK)
    gain = tl.load(GAIN + head.to(tl.int64) * N + i, mask=i < length, other=0.0)
    acc = tl.zeros([BLOCK, E_BLOCK], tl.float32)
    for part in range(D_BLOCKS):
        d = part * D_BLOCK + tl.arange(0, D_BLOCK)
        at = STATE + head.to(tl.int64) * (D * E) + d[:, None] * E + e[None, :]
        state = tl.load(at, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
        q = features(Q + b * q_b + h * q_h, i, q_i, d, q_d, i < length, RELU, D, D_BLOCK * D_BLOCKS)
        acc = accurate_product(q, state, acc, Q.dtype.element_ty)
    acc = tl.where((i < length)[:, None], acc * gain[:, None], 0.0)
    at = (O + b * o_b + h * o_h + i.to(tl.int64) * o_i)[:, None] + (e.to(tl.int64) * o_e)[None, :]
    tl.store(at, narrowed(acc, O.dtype.element_ty), mask=(i < N)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=SIZES)
def flow_causal_kernel(
    Q, K, GAIN, WEIGHT, q_b, q_h, q_i, q_d, k_b, k_h, k_i, k_d, H, N, steps, eps, outer_eps, clip_at,
    D: tl.constexpr, D_PAD: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Flows of the causal form, for the tokens of a head: each query's gain and each key's weight.

    Both are `[b,h,i]`, contiguous in float32. A gain is the allocation over the incoming flow, a weight the number of
    tokens so far times the key's share in the softmax over the keys so far.
    """
    head = tl.program_id(0)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    d = tl.arange(0, D_PAD)
    at = tl.arange(0, BLOCK)
    keys = tl.zeros([D_PAD], tl.float32)
    queries = tl.zeros([D_PAD], tl.float32)
    released = tl.zeros([D_PAD], tl.float32)
    received = tl.zeros([D_PAD], tl.float32)
    carried = tl.full([BLOCK], float("-inf"), tl.float32)
    for step in range(steps):
        i = step * BLOCK + at
        q = features(Q, i, q_i, d, q_d, i < N, RELU, D, D_PAD)
        k = features(K, i, k_i, d, k_d, i < N, RELU, D, D_PAD)
        seen = (i + 1).to(tl.float32)
        incoming = exchanged(q, keys[None, :] + tl.cumsum(k, 0), eps, outer_eps, d, D)
        outgoing = exchanged(k, queries[None, :] + tl.cumsum(q, 0), eps, outer_eps, d, D)
        share_k = tl.where((i < N)[:, None], k * (seen / outgoing)[:, None], 0.0)
        share_q = tl.where((i < N)[:, None], q * (seen / incoming)[:, None], 0.0)
        sink = exchanged(q, released[None, :] + tl.cumsum(share_k, 0), eps, 0.0, d, D) / seen + outer_eps
        rival = exchanged(k, received[None, :] + tl.cumsum(share_q, 0), eps, 0.0, d, D) / seen + outer_eps
        rival = tl.where(rival > clip_at, clip_at, tl.where(rival < -clip_at, -clip_at, rival))
        # The logarithm of the sum of exponentials up to each row, relative to the largest up to there.
        upto = tl.where((at[:, None] >= at[None, :]) & (i < N)[None, :], rival[None, :], float("-inf"))
        top = tl.maximum(tl.max(upto, 1), carried)
        total = tl.sum(tl.exp2((upto - top[:, None]) * LOG2E), 1) + tl.exp2((carried - top) * LOG2E)
        log_total = top + tl.log(total)
        row = head.to(tl.int64) * N + i
        tl.store(WEIGHT + row, seen * tl.exp2(((rival - top) - tl.log(total)) * LOG2E), mask=i < N)
        tl.store(GAIN + row, 1.0 / (1.0 + tl.exp2(-sink * LOG2E)) / incoming, mask=i < N)
        keys += tl.sum(k, 0)
        queries += tl.sum(q, 0)
        released += tl.sum(share_k, 0)
        received += tl.sum(share_q, 0)
        carried = tl.zeros([BLOCK], tl.float32) + tl.sum(tl.where(at == BLOCK - 1, log_total, 0.0))


@triton.jit(do_not_specialize=SIZES)
def flow_stream_kernel(
    Q, K, V, GAIN, WEIGHT, O, q_b, q_h, q_i, q_d, k_b, k_h, k_i, k_d, v_b, v_h, v_i, v_e, o_d, o_b, o_h, o_i, o_e,
    H, N, steps,
    D: tl.constexpr, E: tl.constexpr, D_BLOCK: tl.constexpr, D_BLOCKS: tl.constexpr, E_BLOCK: tl.constexpr,
    E_BLOCKS: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Outputs of the causal form: gain * q @ state, the state being the sum of outer(k weight, v) up to the row.

    Of one block of features only, with O `[d / D_BLOCK, b,h,i,e]`, of which the first stride is o_d: they add up.
    """
    program = tl.program_id(0)
    block = program % E_BLOCKS
    part = program // E_BLOCKS % D_BLOCKS
    head = program // (E_BLOCKS * D_BLOCKS)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    O += part.to(tl.int64) * o_d + b * o_b + h * o_h
    d = part * D_BLOCK + tl.arange(0, D_BLOCK)
    e = block * E_BLOCK + tl.arange(0, E_BLOCK)
    at = tl.arange(0, BLOCK)
    state = tl.zeros([D_BLOCK, E_BLOCK], tl.float32)
    for step in range(steps):
        i = step * BLOCK + at
        q = features(Q, i, q_i, d, q_d, i < N, RELU, D, D_BLOCK * D_BLOCKS)
        k = features(K, i, k_i, d, k_d, i < N, RELU, D, D_BLOCK * D_BLOCKS)
        v = rows_of(V, i, v_i, e, v_e, i < N, E, E_BLOCK * E_BLOCKS)
        weight = tl.load(WEIGHT + head.to(tl.int64) * N + i, mask=i < N, other=0.0)
        gain = tl.load(GAIN + head.to(tl.int64) * N + i, mask=i < N, other=0.0)
        short_q = narrowed(q, v.dtype)
        scores = product(short_q, tl.trans(narrowed(k, v.dtype)), tl.zeros([BLOCK, BLOCK], tl.float32))
        keep = at[:, None] >= at[None, :]
        scores = tl.where(keep, scores * weight[None, :], 0.0)
        acc = guarded_product(tl.zeros([BLOCK, E_BLOCK], tl.float32), scores, keep, v, True)
        acc = accurate_product(q, state, acc, V.dtype.element_ty)
        mask = (i < N)[:, None] & (e < E)[None, :]
        at_out = (O + i.to(tl.int64) * o_i)[:, None] + (e.to(tl.int64) * o_e)[None, :]
        tl.store(at_out, narrowed(acc * gain[:, None], O.dtype.element_ty), mask=mask)
        state = product(tl.trans(narrowed(k * weight[:, None], v.dtype)), v, state)
