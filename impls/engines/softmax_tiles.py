"""Device functions that the softmax engines share: which pairs of a tile are kept, their logits, and exact products.

Used by the forward, backward and split kernels, so that every option has one definition on the device. A tile is
described by the positions of its queries and keys; the functions broadcast, so that the same code serves tiles
[queries, keys] and, in the key-major backward kernel, [keys, queries].

Order of operations: scale, softcap, bias, mask (FlashAttention 2 and ONNX Attention agree on it).
"""


# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter keeps bfloat16 as bits and neither multiplies nor rounds it rightly: there it is converted by hand.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def widened(x):
    """x in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 x in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        narrow = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def product(a, b, acc):
    """acc + a @ b in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        total = tl.dot(widened(a), widened(b), acc, input_precision="ieee")
    else:
        total = tl.dot(a, b, acc, input_precision="ieee")
    return total


@triton.jit
def tanh(x):
    """tanh to about two units in the last place: a polynomial near 0, where 1 - 2/(exp(2x)+1) would cancel.

    Written out because no math library is common to CUDA, AMD and the interpreter. Coefficients: Cephes, tanhf.
    """
    z = x * x
    small = -5.70498872745e-3
    small = small * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    small = small * z * x + x
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(tl.minimum(size, 44.0) * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def key_range(
    first, last, off, nk, left, right, chunk, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr
):
    """Local key positions [lo, hi) that some query of first..last may see, and [full_lo, full_hi) that all of them see.

    The tokens exempt from the left bound are not included.
    """
    lo = 0
    hi = nk
    full_lo = 0
    full_hi = nk
    if HAS_RIGHT:
        hi = tl.minimum(hi, last + off + right + 1)
        full_hi = tl.minimum(full_hi, first + off + right + 1)
    if HAS_LEFT:
        lo = tl.maximum(lo, first + off - left)
        full_lo = tl.maximum(full_lo, last + off - left)
    if HAS_CHUNK:
        first_chunk = tl.maximum(first + off, 0) // chunk * chunk
        last_chunk = tl.maximum(last + off, 0) // chunk * chunk
        lo = tl.maximum(lo, first_chunk)
        hi = tl.minimum(hi, last_chunk + chunk)
        full_lo = tl.maximum(full_lo, last_chunk)
        full_hi = tl.where(first + off < 0, 0, tl.minimum(full_hi, first_chunk + chunk))
    return lo, hi, full_lo, full_hi


@triton.jit
def query_range(
    first, last, off, nq, left, right, chunk, sink_tokens,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
):  # fmt: skip
    """The queries [lo, hi) that may see one of the local key positions first..last, [full_lo, full_hi) that see all."""
    lo = 0
    hi = nq
    full_lo = 0
    full_hi = nq
    if HAS_RIGHT:
        lo = tl.maximum(lo, first - off - right)
        full_lo = tl.maximum(full_lo, last - off - right)
    if HAS_LEFT:
        hi = tl.where(first < sink_tokens, hi, tl.minimum(hi, last - off + left + 1))
        full_hi = tl.minimum(full_hi, first - off + left + 1)
    if HAS_CHUNK:
        first_chunk = first // chunk * chunk
        last_chunk = last // chunk * chunk
        lo = tl.maximum(lo, first_chunk - off)
        hi = tl.minimum(hi, last_chunk + chunk - off)
        full_lo = tl.maximum(full_lo, last_chunk - off)
        full_hi = tl.minimum(full_hi, first_chunk + chunk - off)
    return lo, hi, full_lo, full_hi


@triton.jit
def kept(
    pos, local, real_q, real_k, left, right, chunk, sink_tokens,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
):  # fmt: skip
    """Which pairs the rules on positions keep. All window bounds are inclusive; causal is right = 0."""
    keep = real_q & real_k
    if HAS_RIGHT:
        keep = keep & (local <= pos + right)
    if HAS_LEFT:
        keep = keep & ((local >= pos - left) | (local < sink_tokens))
    if HAS_CHUNK:
        # Division truncates: a query before position 0 would fall into chunk 0 although its chunk is -1.
        keep = keep & (pos >= 0) & (local // chunk == pos // chunk)
    return keep


@triton.jit
def logits(
    raw, keep, full, scale, softcap, bias_ptrs, mask_ptrs, inside,
    HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    """Masked logits of a tile in float32 (-inf where not kept), and tanh(s / c), of which the slope is made.

    `keep` is only looked at where `full` is false (or always, when ALWAYS); `inside` guards the reads of bias and mask.
    """
    s = raw * scale
    t = s
    if HAS_SOFTCAP:
        t = tanh(s / softcap)
        s = softcap * t
    if HAS_BIAS:
        bias = widened(tl.load(bias_ptrs, mask=inside, other=0.0))
        s = tl.where(bias > float("-inf"), s + bias, float("-inf"))
    if HAS_MASK:
        allowed = tl.load(mask_ptrs, mask=inside, other=0)
        s = tl.where(allowed != 0, s, float("-inf"))
    if ALWAYS:
        s = tl.where(keep, s, float("-inf"))
    else:
        if not full:
            s = tl.where(keep, s, float("-inf"))
    return s, t


@triton.jit
def not_finite(x):
    """1 if an element of the tile is infinite or NaN, else 0."""
    wrong = tl.where(tl.abs(x) < float("inf"), 0, 1)
    return tl.max(wrong)


@triton.jit
def exact_product(acc, weights, keep, values, COUNT: tl.constexpr):
    """acc + weights @ values, where a pair that is not kept adds nothing even if its value is infinite or NaN.

    A matrix product computes 0 * NaN for such a pair. Here it gets the finite values only, and the others are added
    one key at a time; kernels call this only after a plain product came out infinite or NaN.
    """
    wide = widened(values)
    finite = tl.abs(wide) < float("inf")
    acc = product(narrowed(weights, values.dtype), narrowed(tl.where(finite, wide, 0.0), values.dtype), acc)
    if not_finite(wide) != 0:
        rest = tl.where(finite, 0.0, wide)
        columns = tl.arange(0, COUNT)[None, :]
        rows = tl.arange(0, COUNT)[:, None]
        for c in range(COUNT):
            weight = tl.sum(tl.where(columns == c, weights, 0.0), axis=1)
            take = tl.max(tl.where(columns == c, keep.to(tl.int32), 0), axis=1)
            value = tl.sum(tl.where(rows == c, rest, 0.0), axis=0)
            # A kept weight that has underflowed to 0 would make NaN of an infinite value, as any product does.
            acc += tl.where((take != 0)[:, None] & (value != 0.0)[None, :], weight[:, None] * value[None, :], 0.0)
    return acc
