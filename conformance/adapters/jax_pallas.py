"""JAX's Pallas attention for GPUs, `jax.experimental.pallas.ops.gpu.attention.mha`, in Pallas's interpret mode.

Layout [b, i, h, d]. The kernel wants one feature size, one number of heads, lengths that its blocks divide, and one row
of segment ids for queries and keys alike. Grouped heads are repeated before a forward call; the adapter chooses blocks
so that lengths with a divisor run over several tiles; the interpreter also takes block sizes that a GPU would not.
"""

from __future__ import annotations

import functools
from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

SMALLEST_TILE = 16
LARGEST_TILE = 64
REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    ValueError: (
        "to have the same head dimension",
        "must be a multiple of",
        "divided into the same",
    )
}


def _tiles(length: int) -> int:
    """Rows of a tile: the largest power of two up to LARGEST_TILE that divides the length, else the whole length."""
    tile = LARGEST_TILE
    while tile >= SMALLEST_TILE:
        if length % tile == 0:
            return tile
        tile //= 2
    return length


def _common_tiles(N: int, M: int) -> tuple[int, int]:
    """Tiles of the backward pass, which wants as many tiles of queries as of keys."""
    count = max(1, min(N, M) // SMALLEST_TILE)
    while count > 1 and (N % count or M % count):
        count -= 1
    return N // count, M // count


@functools.cache
def _compiled(N: int, M: int, scale: float, causal: bool, differentiated: bool) -> Any:
    """The kernel with the tiles for these lengths, in the suite's layout; compiled once for a shape."""
    jax = library("jax", "jax")
    jnp = library("jax.numpy", "jax")
    kernel = library("jax.experimental.pallas.ops.gpu.attention", "jax")
    backward_q, backward_k = _common_tiles(N, M)
    sizes = kernel.BlockSizes(
        block_q=_tiles(N),
        block_k=_tiles(M),
        block_q_dkv=backward_q,
        block_kv_dkv=backward_k,
        block_q_dq=backward_q,
        block_kv_dq=backward_k,
    )

    def attend(Q: Any, K: Any, V: Any, segments: Any) -> Any:
        heads = Q.shape[1]
        result = kernel.mha(
            *(jnp.repeat(jnp.swapaxes(array, 1, 2), heads // array.shape[1], axis=2) for array in (Q, K, V)),
            segments,
            scale,
            causal,
            sizes,
            interpret=True,
            return_residuals=not differentiated,
        )
        return jnp.swapaxes(result, 1, 2) if differentiated else (jnp.swapaxes(result[0], 1, 2), result[1])

    return jax.jit(attend)


@candidate(
    mechanism=MECHANISM,
    framework="jax",
    dtypes=("fp32", "fp16", "bf16"),
    devices=("cpu",),
    declares={
        "causal_alignment": "top_left",
        "lse_base": "2",
        "unseen_values": "multiplied",
        "kv_lengths": "unchecked",
    },
    differentiable=("Q", "K", "V"),
    output_dtypes={"LSE": "fp32"},
    short_name="jax-pallas",
    for_function="jax.experimental.pallas.ops.gpu.attention:mha",
    version=versions("jax", "jaxlib"),
)
def jax_pallas(
    Q: Any,
    K: Any,
    V: Any,
    *,
    q_segment: Any = None,
    kv_segment: Any = None,
    causal: bool = False,
    scale: float | None = None,
) -> Any:
    """The Pallas kernel for GPUs, interpreted. O and LSE; under differentiation O alone, as the kernel demands."""
    jax = library("jax", "jax")
    jnp = library("jax.numpy", "jax")
    (B, H, N, D), M = Q.shape, K.shape[2]
    if H % K.shape[1]:
        raise Unsupported(f"{H} query heads do not divide into {K.shape[1]} groups")
    if K.shape[0] != B or V.shape[0] != B:
        raise Unsupported("the kernel does not compare batch sizes")
    if not B or not N or not M:
        raise Unsupported("Pallas has no grid for an empty axis")
    if causal and N > M:
        raise Unsupported("the kernel's causal loop reads past the last key when there are more queries than keys")
    segments = None
    if q_segment is not None:
        if q_segment.shape != kv_segment.shape or not bool(jnp.array_equal(q_segment, kv_segment)):
            raise Unsupported("the kernel takes one row of segment ids, for queries and keys alike")
        if bool(jnp.any(q_segment < 0)):
            raise Unsupported("the kernel has no id for padding")
        segments = jnp.asarray(q_segment, jnp.int32)
    differentiated = any(isinstance(array, jax.core.Tracer) for array in (Q, K, V))
    if differentiated and K.shape[1] != H:
        raise Unsupported("the kernel rounds dK and dV of every head, before those of a group could be added")
    with refusals(REFUSALS):
        return _compiled(N, M, D**-0.5 if scale is None else float(scale), causal, differentiated)(Q, K, V, segments)
