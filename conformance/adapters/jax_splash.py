"""JAX's Splash attention for TPUs, `jax.experimental.pallas.ops.tpu.splash_attention`, in Pallas's interpret mode.

The kernel knows no batch and no scale: the adapter calls it per batch entry (one mask, one row of segment ids each) and
multiplies Q beforehand. It works in tiles of 128, so lengths are padded to a multiple of 128 with keys that the mask
removes and with queries that are cut off again. A query that may attend to nothing is undefined by the kernel's
documentation and refused here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance.adapters._library import MECHANISM, library, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

TILE = 128
PADDING = -1
PACKAGE = "jax.experimental.pallas.ops.tpu.splash_attention"


def _is_exact(scale: float) -> bool:
    """Whether a factor changes nothing but the exponent of what it multiplies."""
    return scale != 0 and math.frexp(scale)[0] in (0.5, -0.5) and abs(math.log2(abs(scale))) < 8


def _segments(q_segment: Any, kv_segment: Any, *, positional: Any) -> tuple[Any, Any] | None:
    if q_segment is None:
        return None
    q_ids, kv_ids = np.asarray(q_segment, np.int32), np.asarray(kv_segment, np.int32)
    if (q_ids < 0).any():
        raise Unsupported("the kernel has no id for padding queries")
    if positional and not np.array_equal(q_ids, kv_ids):
        raise Unsupported("the kernel counts positions over the whole row, so queries and keys must be packed alike")
    return q_ids, kv_ids


def _padded_ids(segments: tuple[Any, Any], b: int) -> tuple[Any, Any]:
    """Ids of the padded row: padding keys have an id of their own, padding queries see the padding or the last key."""
    q_ids, kv_ids = segments[0][b], segments[1][b]
    keys = np.pad(kv_ids, (0, -kv_ids.size % TILE), constant_values=PADDING)
    return np.pad(q_ids, (0, -q_ids.size % TILE), constant_values=keys[-1]), keys


@dataclass(frozen=True)
class _Pattern:
    """The positional rules of a case, as the library's mask objects and as a dense array."""

    N: int
    M: int
    offset: int
    causal: bool
    window: tuple[int | None, int | None]
    chunk: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.N + -self.N % TILE, self.M + -self.M % TILE

    def rules(self) -> list[Any]:
        masks = library(f"{PACKAGE}.splash_attention_mask", "jax")
        found: list[Any] = []
        if self.chunk is not None:
            found.append(masks.ChunkedCausalMask(self.shape, chunk_size=self.chunk))
        elif self.causal:
            found.append(masks.CausalMask(self.shape, offset=self.offset))
        if self.window != (None, None):
            found.append(masks.LocalMask(self.shape, window_size=self.window, offset=self.offset))
        return found

    def masks(self, heads: int, mask: Any) -> Any:
        """One mask per head. Padding keys are removed from real rows; padding rows see everything that is allowed."""
        masks = library(f"{PACKAGE}.splash_attention_mask", "jax")
        result = []
        for h in range(heads):
            parts = self.rules()
            row = None if mask is None else mask[h if mask.shape[0] > 1 else 0]
            if row is not None or self.shape != (self.N, self.M):
                parts = [self._dense(parts, row)]
            whole = parts[0] if parts else masks.FullMask(self.shape)
            for part in parts[1:]:
                whole = whole & part
            result.append(whole)
        return masks.MultiHeadMask(result)

    def _dense(self, parts: list[Any], mask: Any) -> Any:
        masks = library(f"{PACKAGE}.splash_attention_mask", "jax")
        dense = np.ones(self.shape, bool)
        everything = (slice(0, self.shape[0]), slice(0, self.shape[1]))
        for part in parts:
            dense &= part[everything]
        dense[: self.N, self.M :] = False
        dense[self.N :] = True
        if mask is not None:
            dense[: self.N, : self.M] &= np.broadcast_to(mask, (self.N, self.M))
        return masks.NumpyMask(dense)

    def refuse_empty_rows(self, mask: Any, segments: tuple[Any, Any] | None) -> None:
        keep = np.ones((1, 1, self.N, self.M), bool)
        for part in self.rules():
            keep &= part[slice(0, self.N), slice(0, self.M)]
        if mask is not None:
            keep = keep & np.asarray(mask)
        if segments is not None:
            keep = keep & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
        if not keep.any(-1).all():
            raise Unsupported("the kernel is undefined for a query that may attend to nothing")


@functools.lru_cache(maxsize=256)
def _kernel(
    pattern: _Pattern,
    heads: int,
    single: bool,
    softcap: float | None,
    with_lse: bool,
    mask: tuple[bytes, tuple[int, ...]] | None,
) -> tuple[Any, Any]:
    """The kernel for a pattern and the mask of one batch entry (its bytes and shape): its mask's tables, its program.

    `single`: one key head, the kernel's MQA form.
    """
    kernel = library(f"{PACKAGE}.splash_attention_kernel", "jax")
    make = kernel.make_splash_mqa if single else kernel.make_splash_mha
    made = make(
        mask=pattern.masks(heads, None if mask is None else np.frombuffer(mask[0], bool).reshape(mask[1])),
        head_shards=1,
        q_seq_shards=1,
        interpret=True,
        save_residuals=with_lse,
        attn_logits_soft_cap=softcap,
    )
    tables, options = made.tree_flatten()
    return tables, _program(tuple(sorted(options.items())))


@functools.lru_cache(maxsize=256)
def _program(options: tuple[tuple[str, Any], ...]) -> Any:
    """The compiled kernel for one batch entry. The tables of the mask are arguments: other masks, the same program."""
    jax = library("jax", "jax")
    kernel = library(f"{PACKAGE}.splash_attention_kernel", "jax")

    def attend(tables: Any, q: Any, k: Any, v: Any, ids: Any, sink: Any) -> Any:
        return kernel.SplashAttentionKernel.tree_unflatten(dict(options), tables)(q, k, v, ids, sink)

    return jax.jit(attend)


@functools.cache
def _entries(exact: bool, single: bool) -> Any:
    """Q, K and V of a batch as the arrays of its entries, Q scaled: in its own dtype if that is exact, else in float32,
    which the kernel takes too. Lengths are padded to tiles."""
    jax = library("jax", "jax")
    jnp = library("jax.numpy", "jax")

    def tiles(array: Any) -> Any:
        return jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % TILE), (0, 0)))

    def split(Q: Any, K: Any, V: Any, scale: Any) -> list[tuple[Any, Any, Any]]:
        scaled = Q * scale.astype(Q.dtype) if exact else Q.astype(jnp.float32) * scale
        queries, keys, values = (tiles(array) for array in (scaled, K, V))
        return [
            (queries[b], *(array[b, 0] if single else array[b] for array in (keys, values))) for b in range(Q.shape[0])
        ]

    return jax.jit(split)


@functools.cache
def _whole(N: int, dtype: str) -> Any:
    """The entries' outputs, and their LSE if there is one, as arrays of the batch without the padding."""
    jax = library("jax", "jax")
    jnp = library("jax.numpy", "jax")

    def join(results: list[Any]) -> Any:
        if not isinstance(results[0], tuple):
            return jnp.stack([out[:, :N] for out in results]).astype(dtype)
        outputs = jnp.stack([out[:, :N] for out, _ in results]).astype(dtype)
        return outputs, jnp.stack([lse[:, :N] for _, (lse,) in results])

    return jax.jit(join)


@candidate(
    mechanism=MECHANISM,
    framework="jax",
    dtypes=("fp32", "fp16", "bf16"),
    devices=("cpu",),
    declares={"unseen_values": "multiplied"},
    differentiable=("Q", "K", "V", "sink"),
    output_dtypes={"LSE": "fp32"},
    short_name="jax-splash",
    version=versions("jax", "jaxlib"),
)
def jax_splash(
    Q: Any,
    K: Any,
    V: Any,
    *,
    mask: Any = None,
    sink: Any = None,
    q_segment: Any = None,
    kv_segment: Any = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    chunk: int | None = None,
) -> Any:
    """The Splash kernel, interpreted. O and LSE; under differentiation O alone, as the kernel demands."""
    jax = library("jax", "jax")
    kernel = library(f"{PACKAGE}.splash_attention_kernel", "jax")
    (B, H, N, D), (Hk, M) = Q.shape, K.shape[1:3]
    if not B or not N or not M:
        raise Unsupported("Pallas has no grid for an empty axis")
    if K.shape[0] != B or V.shape[:3] != K.shape[:3] or K.shape[3] != D or H % Hk:
        # Padding to tiles must not hide shapes that the kernel would refuse.
        raise Unsupported(f"Q {Q.shape}, K {K.shape} and V {V.shape} do not fit together")
    positional = causal or chunk is not None or window_left is not None or window_right is not None
    segments = _segments(q_segment, kv_segment, positional=positional)
    offset = M - N if causal_alignment == "bottom_right" and segments is None else 0
    if chunk is not None and (not causal or offset):
        raise Unsupported("ChunkedCausalMask is causal and aligned at the start")
    pattern = _Pattern(N, M, offset, causal, (window_left, window_right), chunk)
    pattern.refuse_empty_rows(mask, segments)
    differentiated = any(isinstance(array, jax.core.Tracer) for array in (Q, K, V, sink))
    factor = D**-0.5 if scale is None else float(scale)
    single = Hk == 1
    results = []
    for b, entry in enumerate(_entries(_is_exact(factor), single)(Q, K, V, np.float32(factor))):
        packed = None
        if mask is not None:
            own = np.ascontiguousarray(np.asarray(mask)[b if mask.shape[0] > 1 else 0])
            packed = own.tobytes(), own.shape
        tables, program = _kernel(pattern, H, single, softcap, not differentiated, packed)
        ids = None if segments is None else kernel.SegmentIds(*_padded_ids(segments, b))
        results.append(program(tables, *entry, ids, sink))
    return _whole(N, str(Q.dtype))(results)
