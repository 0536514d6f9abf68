"""`jax.nn.dot_product_attention`: JAX's own attention, computed by XLA.

Layout [b, i, h, d]; it takes bias, mask, is_causal, scale, sequence lengths, a local window and grouped heads, and
returns the LSE in the dtype of the inputs, without a gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from attnspec.conformance.adapters._library import MECHANISM, library, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    # Query, key and value must share one feature size.
    ValueError: ("value shape should be", "query shape should be"),
}

NO_ALGORITHM = "Algorithm not supported"


def _refuse_rows_without_weights(
    jnp: Any,
    bias: Any,
    mask: Any,
    Q: Any,
    K: Any,
    q_length: Any,
    kv_length: Any,
    causal: bool,
    window: tuple[int, int] | None,
) -> None:
    """Refuse a row that is emptied with the help of a bias of -inf.

    The library's own masks replace a logit by a finite number, so that an empty row is the mean of all values; a bias
    of -inf stays -inf. A row without any other logit is NaN, and one with both kinds gives its weight to masked keys.
    """
    if bias is None:
        return
    removed = np.asarray(jnp.isneginf(bias))
    if not removed.any():
        return
    i, j = np.arange(Q.shape[2])[:, None], np.arange(K.shape[2])
    keep = ~removed
    if mask is not None:
        keep = keep & np.asarray(mask)
    if causal:
        keep = keep & (j <= i)
    if window is not None:
        keep = keep & (j >= i - window[0]) & (j <= i + window[1])
    if kv_length is not None:
        keep = keep & (j < np.asarray(kv_length)[:, None, None, None])
    if q_length is not None:
        keep = keep | (i >= np.asarray(q_length)[:, None, None, None])
    if not keep.any(-1).all():
        raise Unsupported("a query whose keys are removed by a bias of -inf gets NaN or weights of masked keys")


@functools.cache
def _compiled(scale: float | None, causal: bool, window: tuple[int, int] | None) -> Any:
    """The library's function compiled as a whole: once for a shape, not once for an operation."""
    return library("jax", "jax").jit(_plain(scale, causal, window))


def _plain(scale: float | None, causal: bool, window: tuple[int, int] | None) -> Any:
    """The library's function in the suite's layout."""
    jax = library("jax", "jax")
    jnp = library("jax.numpy", "jax")

    def attend(Q: Any, K: Any, V: Any, bias: Any, mask: Any, q_length: Any, kv_length: Any) -> tuple[Any, Any]:
        out, LSE = jax.nn.dot_product_attention(
            *(jnp.swapaxes(array, 1, 2) for array in (Q, K, V)),
            bias=bias,
            mask=mask,
            scale=scale,
            is_causal=causal,
            query_seq_lengths=q_length,
            key_value_seq_lengths=kv_length,
            local_window_size=window,
            return_residual=True,
        )
        return jnp.swapaxes(out, 1, 2), jnp.swapaxes(LSE, 1, 2)

    return attend


def _attend(jax: Any, scale: float | None, causal: bool, window: tuple[int, int] | None, *, half: bool) -> Any:
    """The library's function, compiled as a whole where that works.

    In float16 the library asks for a dot product that XLA does not have on the CPU; in bfloat16 for one that XLA has,
    but not of single numbers. The library falls back on the plain one when that raises, which it does operation by
    operation but not when compiled as a whole.
    """
    plain, compiled = _plain(scale, causal, window), _compiled(scale, causal, window)
    if half:
        return plain

    def attend(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except jax.errors.JaxRuntimeError as error:
            if NO_ALGORITHM not in str(error):
                raise
            return plain(*arguments)

    return attend


@candidate(
    mechanism=MECHANISM,
    framework="jax",
    dtypes=("fp32", "fp16", "bf16"),
    declares={
        "causal_alignment": "top_left",
        "empty_rows": "mean",
        "lse_empty": "undefined",
        "unseen_values": "multiplied",
    },
    differentiable=("Q", "K", "V", "bias"),
    outputs=("O", "LSE"),
    rounding="autodiff",
    short_name="jax-dense",
    for_function="jax.nn:dot_product_attention",
    version=versions("jax", "jaxlib"),
)
def jax_dense(
    Q: Any,
    K: Any,
    V: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    q_length: Any = None,
    kv_length: Any = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """JAX's attention through XLA. A one-sided window gets the other side as wide as the sequences."""
    jax = library("jax", "jax")
    jnp = library("jax.numpy", "jax")
    N, M = Q.shape[2], K.shape[2]
    window = None
    if window_left is not None or window_right is not None:
        far = N + M
        window = (far if window_left is None else window_left, far if window_right is None else window_right)
    _refuse_rows_without_weights(jnp, bias, mask, Q, K, q_length, kv_length, causal, window)
    lengths = [None if given is None else jnp.asarray(given, jnp.int32) for given in (q_length, kv_length)]
    if N == 0 or M == 0:
        raise Unsupported("XLA's softmax has no identity for an empty axis")
    attend = _attend(jax, scale, causal, window, half=Q.dtype == jnp.float16)
    with refusals(REFUSALS):
        out, LSE = attend(Q, K, V, bias, mask, *lengths)
    return out, _without_gradient(jax, jnp, LSE, out)


def _without_gradient(jax: Any, jnp: Any, LSE: Any, out: Any) -> Any:
    """The library stops the gradient of its LSE; a case that asks for it is refused instead of answered with zeros.

    O only ties the LSE to the differentiated computation, which the library has cut it off from.
    """

    def cut(value: Any, tie: Any) -> Any:
        return value

    def forward(value: Any, tie: Any) -> tuple[Any, Any]:
        return value, tie

    def backward(tie: Any, cotangent: Any) -> tuple[Any, Any]:
        if bool(jnp.any(cotangent != 0)):
            raise Unsupported("return_residual stops the gradient: the LSE is not differentiable")
        return cotangent, jnp.zeros_like(tie)

    passed = jax.custom_vjp(cut)
    passed.defvjp(forward, backward)
    return passed(LSE, out)
