"""Softmax attention with mapped logits and mapped probabilities: the device functions that its kernels share.

    P[i,j] = softmax over the kept j of T(scale[i] * sum_d q[i,d] k[j,d]),    O[i] = gate[i] * sum_j W(P[i,j]) V[j]

T (ACTIVATION) is the identity, or the logarithm of softplus or of the sigmoid, so that the weights are those positive
scores over their sum, without underflow however negative a row's scores are. W (MAP) is the identity, a stretch that
is clipped to [0, 1] (Bondarenko et al., arXiv 2306.12929, Eq. 4), or a power of what exceeds the average, normalised
again (Gao and Spratling, arXiv 2501.13428, LSSAR). Used by `mapped_forward` and `mapped_backward`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from attnspec.impls.engines.softmax_tiles import LOG2E, narrowed, not_finite, product, widened

IDENTITY = tl.constexpr(0)
SOFTPLUS = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
CLIPPED = tl.constexpr(1)
SHARPENED = tl.constexpr(2)

# Below this, softplus(s) is exp(s) (1 - exp(s) / 2) to float32.
DEEP = tl.constexpr(-10.0)

# More than the rows of a tile, and exact in every dtype.
MANY = tl.constexpr(4096.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], with all digits of a small x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def activated(s, ACTIVATION: tl.constexpr):
    """The logarithm T(s) of the positive score."""
    if ACTIVATION == SOFTPLUS:
        far = log1p(tl.exp2(-tl.abs(s) * LOG2E))
        plus = tl.where(s > 0.0, s, 0.0) + far
        t = tl.where(s < DEEP, s - 0.5 * tl.exp2(s * LOG2E), tl.log(plus))
    elif ACTIVATION == SIGMOID:
        t = tl.where(s < 0.0, s, 0.0) - log1p(tl.exp2(-tl.abs(s) * LOG2E))
    else:
        t = s
    # Comparisons drop NaN, and a visible one must show.
    return tl.where(s == s, t, s)


@triton.jit
def rise(s, ACTIVATION: tl.constexpr):
    """The derivative of T."""
    if ACTIVATION == SOFTPLUS:
        small = tl.exp2(-tl.abs(s) * LOG2E)
        sigmoid = tl.where(s < 0.0, small, 1.0) / (1.0 + small)
        plus = tl.where(s > 0.0, s, 0.0) + log1p(small)
        slope = tl.where(s < DEEP, 1.0 - 0.5 * small, sigmoid / plus)
    elif ACTIVATION == SIGMOID:
        slope = 1.0 / (1.0 + tl.exp2(s * LOG2E))
    else:
        slope = tl.full(s.shape, 1.0, tl.float32)
    return slope


@triton.jit
def probabilities(s, keep, top, rest, ACTIVATION: tl.constexpr):
    """P of a tile from its logits, the largest T of each row and the logarithm of the row's sum beside that.

    The two are not added up: their sum would lose the digits of `rest` beside a large `top`.
    """
    return tl.where(keep, tl.exp2(((activated(s, ACTIVATION) - top) - rest) * LOG2E), 0.0)


@triton.jit
def weights(p, count, offset, peak, total, low, high, power, MAP: tl.constexpr):
    """The weight W(P), and its derivative up to what MAP == SHARPENED subtracts; row values broadcast.

    `peak` is the row's largest excess over the average, positive, and `total` the sum of the powers of all, infinite in
    a row of zeros.
    """
    if MAP == CLIPPED:
        wide = (high - low) * p + low
        w = tl.where(wide < 0.0, 0.0, tl.where(wide > 1.0, 1.0, wide))
        slope = tl.where((wide <= 0.0) | (wide >= 1.0), 0.0, high - low)
    elif MAP == SHARPENED:
        r, x = sharpened(p, count, offset, peak, power)
        w = r / total
        slope = tl.where(x > 0.0, count * power * (r / tl.where(x > 0.0, x, 1.0)) / (peak * total), 0.0)
    else:
        w = p
        slope = tl.full(p.shape, 1.0, tl.float32)
    return w, slope


@triton.jit
def sharpened(p, count, offset, peak, power):
    """The power of a probability's excess relative to the row's largest, and that excess."""
    x = (count * p - offset) / peak
    x = tl.where(x <= 0.0, 0.0, tl.where(x > 1.0, 1.0, x))
    return tl.where(x == 0.0, 0.0, tl.exp2(power * tl.log2(tl.where(x == 0.0, 1.0, x)))), x


@triton.jit
def rows_of(X, at, x_i, d, x_d, inside, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows `at` of `[i, d]`, zeros outside."""
    mask = inside[:, None]
    if D != D_PAD:
        mask = mask & (d < D)[None, :]
    return tl.load((X + at.to(tl.int64) * x_i)[:, None] + (d.to(tl.int64) * x_d)[None, :], mask=mask, other=0.0)


@triton.jit
def unit_rows(X, LENGTH, at, x_i, d, x_d, inside, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of `[i, d]`, divided by LENGTH `[i]` (contiguous, float32) where it is given."""
    x = rows_of(X, at, x_i, d, x_d, inside, D, D_PAD)
    if LENGTH is not None:
        length = tl.load(LENGTH + at, mask=inside, other=1.0)
        x = narrowed(widened(x) / length[:, None], x.dtype)
    return x


@triton.jit
def products(
    x, X, X_LENGTH, i, x_i, x_d, i_inside, y, Y, Y_LENGTH, j, y_j, y_d, j_inside,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Dot products of the rows i and j, which are there as tiles x and y.

    With CHUNK they are read again, so many features at a time: products over long rows need too many registers.
    """
    acc = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if CHUNK == 0:
        acc = product(x, tl.trans(y), acc)
    else:
        for start in range(0, D, CHUNK):  # unrolled, what does not change outside would stay in registers
            d = start + tl.arange(0, CHUNK)
            left = unit_rows(X, X_LENGTH, i, x_i, d, x_d, i_inside, D, 0)
            right = unit_rows(Y, Y_LENGTH, j, y_j, d, y_d, j_inside, D, 0)
            acc = product(left, tl.trans(right), acc)
    return acc


@triton.jit
def pairs(i, j, N, M, MASK, mask_i, mask_j, CAUSAL: tl.constexpr):
    """Which pairs of a tile are kept; i and j broadcast, and so does what comes back."""
    keep = (i < N) & (j < M)
    inside = keep
    if CAUSAL:
        keep = keep & (j <= i + M - N)
    if MASK is not None:
        allowed = tl.load(MASK + i.to(tl.int64) * mask_i + j.to(tl.int64) * mask_j, mask=inside, other=0)
        keep = keep & (allowed != 0)
    return keep


@triton.jit
def guarded_product(acc, w, keep, x, GUARD: tl.constexpr):
    """acc + w @ x, where rows of x that a row does not keep add nothing to it, even if they are infinite or NaN.

    Weights of kept pairs are not negative, or the sign of an infinite result does not matter.
    """
    if GUARD:
        wide = widened(x)
        if not_finite(wide) == 0:
            acc = product(narrowed(w, x.dtype), x, acc)
        else:
            finite = tl.abs(wide) < float("inf")
            acc = product(narrowed(w, x.dtype), narrowed(tl.where(finite, wide, 0.0), x.dtype), acc)
            # One product counts what a row keeps of both signs; NaN is both, and comes back as infinity less infinity.
            code = tl.where(finite | (wide < 0.0), 0.0, 1.0) + tl.where(finite | (wide > 0.0), 0.0, MANY)
            seen = narrowed(tl.where(keep, 1.0, 0.0), x.dtype)
            count = product(seen, narrowed(code, x.dtype), tl.zeros(acc.shape, tl.float32))
            below = tl.floor(count / MANY)
            acc += tl.where(count - MANY * below > 0.0, float("inf"), 0.0)
            acc -= tl.where(below > 0.0, float("inf"), 0.0)
    else:
        acc = product(narrowed(w, x.dtype), x, acc)
    return acc
