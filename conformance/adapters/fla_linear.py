"""Linear attention of flash-linear-attention: its naive functions on the CPU, its Triton kernels on a GPU.

`fla-gla` (gated linear attention), `fla-gated-delta-rule` and `fla-lightning-attention` (the library's "simple" gated
linear attention with the fixed decay of lightning attention) in their recurrent forms, and the chunked forms of the
last two, `fla-gated-delta-rule-chunk` and `fla-lightning-attention-chunk`.
The library's layout is [b,i,h,d] and its decays are natural logarithms. Its naive functions have one key head per query
head and no packed sequences; grouped heads are repeated here, as its layers do. Without tokens some of them return the
initial state itself, the caller's memory: such calls are refused here.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnspec.conformance.adapters._library import library, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

VERSION = versions("fla-core", "torch")


def _of(operation: str, naive: str, kernel: str) -> Callable[[Any], Callable[..., Any]]:
    """The library's function for a device: `fla.ops.OPERATION.naive.NAIVE`, or `fla.ops.OPERATION.KERNEL` on a GPU."""

    def find(tensor: Any) -> Callable[..., Any]:
        on_gpu = tensor.device.type == "cuda"
        module = library(f"fla.ops.{operation}" if on_gpu else f"fla.ops.{operation}.naive", "adapters")
        function: Callable[..., Any] = getattr(module, kernel if on_gpu else naive)
        return function

    return find


GLA = _of("gla", "naive_recurrent_gla", "chunk_gla")
DELTA = _of("gated_delta_rule", "naive_recurrent_gated_delta_rule", "fused_recurrent_gated_delta_rule")
DELTA_CHUNK = _of("gated_delta_rule", "naive_chunk_gated_delta_rule", "chunk_gated_delta_rule")
SIMPLE = _of("simple_gla", "naive_recurrent_simple_gla", "fused_recurrent_simple_gla")
SIMPLE_CHUNK = _of("simple_gla", "naive_chunk_simple_gla", "chunk_simple_gla")


def _turned(tensor: Any) -> Any:
    """[b,h,i,...] and [b,i,h,...] into each other."""
    return tensor.transpose(1, 2)


def _some_tokens(tensor: Any) -> None:
    if tensor.shape[2] == 0:
        raise Unsupported("without tokens the library returns the memory of its initial state")


def _grouped(tensor: Any, heads: int) -> Any:
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


@candidate(
    mechanism="gla", short_name="fla-gla", outputs=("O", "S"), output_dtypes={"S": "fp32"}, version=VERSION,
    input_dtypes={"a": "fp32", "S0": "fp32"},
)  # fmt: skip
def fla_gla(Q: Any, K: Any, V: Any, a: Any, S0: Any = None) -> tuple[Any, Any]:
    """`naive_recurrent_gla`, `chunk_gla`; one decay per key channel."""
    H, groups = Q.shape[1], Q.shape[1] // K.shape[1]
    if a.shape[-1] != K.shape[-1]:
        raise Unsupported("the library's gla has a decay per key channel")
    state = None if S0 is None else _grouped(S0, H)
    K, V, a = (_grouped(tensor, H) for tensor in (K, V, a))
    O, S = GLA(Q)(
        *map(_turned, (Q, K, V, a)), initial_state=state, output_final_state=True
    )  # fmt: skip
    return _turned(O), S[:, ::groups]


def _delta(
    find: Callable[[Any], Callable[..., Any]], Q: Any, K: Any, V: Any, beta: Any, g: Any, S0: Any, scale: float | None,
    **more: Any,
) -> tuple[Any, Any]:  # fmt: skip
    _some_tokens(V)
    H = V.shape[1]
    Q, K = _grouped(Q, H), _grouped(K, H)
    q, k, v, b, decay = map(_turned, (Q, K, V, beta, g))
    O, S = find(Q)(
        q=q, k=k, v=v, beta=b, g=decay, scale=scale, initial_state=S0, output_final_state=True, **more
    )  # fmt: skip
    return _turned(O).to(V.dtype), S


@candidate(
    mechanism="gated_delta_rule", short_name="fla-gated-delta-rule", outputs=("O", "S"), output_dtypes={"S": "fp32"},
    input_dtypes={"beta": "fp32", "g": "fp32", "S0": "fp32"}, version=VERSION,
)  # fmt: skip
def fla_gated_delta_rule(
    Q: Any, K: Any, V: Any, beta: Any, g: Any, S0: Any = None, *, scale: float | None = None
) -> tuple[Any, Any]:
    """`naive_recurrent_gated_delta_rule`, `fused_recurrent_gated_delta_rule`."""
    return _delta(DELTA, Q, K, V, beta, g, S0, scale)


@candidate(
    mechanism="gated_delta_rule", short_name="fla-gated-delta-rule-chunk", outputs=("O", "S"),
    output_dtypes={"S": "fp32"}, input_dtypes={"beta": "fp32", "g": "fp32", "S0": "fp32"}, form="chunks",
    version=VERSION,
)  # fmt: skip
def fla_gated_delta_rule_chunk(
    Q: Any, K: Any, V: Any, beta: Any, g: Any, S0: Any = None, *, scale: float | None = None, chunk: int = 64
) -> tuple[Any, Any]:
    """`naive_chunk_gated_delta_rule`, `chunk_gated_delta_rule` (whose chunk is the library's own)."""
    more = {} if Q.device.type == "cuda" else {"chunk_size": chunk}
    return _delta(DELTA_CHUNK, Q, K, V, beta, g, S0, scale, **more)


def _simple(
    find: Callable[[Any], Callable[..., Any]], Q: Any, K: Any, V: Any, s: Any, kv0: Any, **more: Any
) -> tuple[Any, Any]:  # fmt: skip
    _some_tokens(Q)
    decay = -s[None, None, :].expand(Q.shape[0], Q.shape[2], -1)
    O, S = find(Q)(*map(_turned, (Q, K, V)), decay, scale=1.0, initial_state=kv0, output_final_state=True, **more)
    return _turned(O).to(V.dtype), S


@candidate(
    mechanism="lightning_attention", short_name="fla-lightning-attention", outputs=("O", "kv"),
    output_dtypes={"kv": "fp32"}, input_dtypes={"s": "fp32", "kv0": "fp32"}, version=VERSION,
)  # fmt: skip
def fla_lightning_attention(Q: Any, K: Any, V: Any, s: Any, kv0: Any = None) -> tuple[Any, Any]:
    """`naive_recurrent_simple_gla`, `fused_recurrent_simple_gla`, with the decay -s of every token."""
    return _simple(SIMPLE, Q, K, V, s, kv0)


@candidate(
    mechanism="lightning_attention", short_name="fla-lightning-attention-chunk", outputs=("O", "kv"),
    output_dtypes={"kv": "fp32"}, input_dtypes={"s": "fp32", "kv0": "fp32"}, form="blocks_of_summed_decays",
    version=VERSION,
)  # fmt: skip
def fla_lightning_attention_chunk(
    Q: Any, K: Any, V: Any, s: Any, kv0: Any = None, *, block: int = 64
) -> tuple[Any, Any]:
    """`naive_chunk_simple_gla`, `chunk_simple_gla` (whose chunk is the library's own)."""
    more = {} if Q.device.type == "cuda" else {"chunk_size": block}
    return _simple(SIMPLE_CHUNK, Q, K, V, s, kv0, **more)
