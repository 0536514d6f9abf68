"""`jax.nn.dot_product_attention`: JAX's own attention, computed by XLA (`jax-dense`) or by cuDNN (`jax-cudnn`).

Layout [b, i, h, d]; it takes bias, mask, is_causal, scale, sequence lengths, a local window and grouped heads, and
returns the LSE in the dtype of the inputs, without a gradient.
"""

from __future__ import annotations

from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    # Query, key and value must share one feature size.
    ValueError: ("value shape should be", "query shape should be"),
}


@candidate(
    mechanism=MECHANISM,
    framework="jax",
    dtypes=("fp32", "fp16", "bf16"),
    declares={"causal_alignment": "top_left", "empty_rows": "mean"},
    differentiable=("Q", "K", "V", "bias"),
    outputs=("O", "LSE"),
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
    lengths = [None if given is None else jnp.asarray(given, jnp.int32) for given in (q_length, kv_length)]
    if N == 0 or M == 0:
        raise Unsupported("XLA's softmax has no identity for an empty axis")
    with refusals(REFUSALS):
        O, LSE = jax.nn.dot_product_attention(
            *(jnp.swapaxes(array, 1, 2) for array in (Q, K, V)),
            bias=bias,
            mask=mask,
            scale=scale,
            is_causal=causal,
            query_seq_lengths=lengths[0],
            key_value_seq_lengths=lengths[1],
            local_window_size=window,
            return_residual=True,
        )
    return jnp.swapaxes(O, 1, 2), jnp.swapaxes(LSE, 1, 2)
