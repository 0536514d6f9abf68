"""This project's own Triton kernels, judged like anybody's: on a GPU, or on the CPU in Triton's interpreter."""

from __future__ import annotations

from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, versions
from attnspec.conformance.candidate import candidate


@candidate(
    mechanism=MECHANISM,
    framework="torch",
    dtypes=("fp32", "fp16", "bf16"),
    devices=("cpu", "cuda"),
    outputs=("O", "LSE"),
    short_name="triton-softmax",
    version=versions("triton", "torch"),
)
def attention(
    Q: Any,
    K: Any = None,
    V: Any = None,
    *,
    bias: Any = None,
    mask: Any = None,
    sink: Any = None,
    dropout_mask: Any = None,
    q_segment: Any = None,
    kv_segment: Any = None,
    q_length: Any = None,
    kv_length: Any = None,
    left_pad: Any = None,
    k_pages: Any = None,
    v_pages: Any = None,
    block_table: Any = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    chunk: int | None = None,
    sink_tokens: int = 0,
) -> Any:
    """`attnspec.impls.softmax.softmax_attention` with its own choice of tiles."""
    arguments = dict(locals())
    kernels = library("attnspec.impls.softmax", "triton")  # before Triton itself: it decides whether to interpret
    return kernels.softmax_attention(arguments.pop("Q"), arguments.pop("K"), arguments.pop("V"), **arguments)
