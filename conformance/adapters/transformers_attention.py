"""The attention functions of Hugging Face `transformers`, with the masks that the library builds for its models.

`transformers-eager` calls the function of the model whose options the case asks for: Llama's, Gemma 2's (softcap),
gpt-oss's (sinks). `transformers-sdpa` calls `sdpa_attention_forward`. No model is built: the functions only read a few
attributes of the module that they are given. Patterns come from `transformers.masking_utils`, so positions count cache
slots: a row's length does not move its causal diagonal, and cases in which it should are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported


def _pattern(
    masking: Any,
    *,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    chunk: int | None,
    left_pad: Any,
    batch: int,
    device: Any,
) -> Callable[..., Any] | None:
    """The library's mask function for the case, over absolute positions; None: everything is seen."""
    torch = library("torch", "torch")
    parts: list[Callable[..., Any]] = []
    if causal:
        parts.append(masking.causal_mask_function)
    if window_right == 0 and not causal:
        parts.append(masking.causal_mask_function)
    elif window_right is not None and not causal:
        if window_left != window_right:
            raise Unsupported("the library's bidirectional window is as wide to the left as to the right")
        parts.append(masking.sliding_window_bidirectional_overlay(window_right))
    if window_left is not None and not (window_right and not causal):
        parts.append(masking.sliding_window_overlay(window_left + 1))
    if chunk is not None:
        pad = left_pad if left_pad is not None else torch.zeros(batch, dtype=torch.int64, device=device)
        parts.append(masking.chunked_overlay(chunk, pad))
    return masking.and_masks(*parts) if parts else None


def _keep(
    Q: Any,
    K: Any,
    *,
    mask: Any,
    q_segment: Any,
    kv_segment: Any,
    kv_length: Any,
    left_pad: Any,
    causal: bool,
    causal_alignment: str,
    window_left: int | None,
    window_right: int | None,
    chunk: int | None,
) -> tuple[Any, bool]:
    """The boolean mask [b, h|1, i, j] as the library builds it, and whether it left a causal mask to SDPA's flag."""
    torch = library("torch", "torch")
    masking = library("transformers.masking_utils", "adapters")
    (B, _, N, _), M = Q.shape, K.shape[2]
    positional = causal or window_left is not None or window_right is not None or chunk is not None
    at_end = causal_alignment == "bottom_right"
    if positional and kv_length is not None and at_end:
        raise Unsupported("padding on the right does not move the library's causal diagonal")
    if positional and left_pad is not None and not at_end:
        raise Unsupported("with padding on the left the library aligns at the end")
    if left_pad is not None and kv_length is not None:
        raise Unsupported("the library has padding on one side")
    function = _pattern(
        masking,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        chunk=chunk,
        left_pad=left_pad,
        batch=B,
        device=Q.device,
    )
    if q_segment is not None:
        if not torch.equal(q_segment, kv_segment):
            raise Unsupported("the library packs queries and keys alike")
        if bool((q_segment < 0).any()):
            raise Unsupported("the library has no id for padding in a packed row")
        function = masking.packed_sequence_compatibility_function(
            function or masking.bidirectional_mask_function, _places(torch, q_segment), q_segment
        )
    padding = None
    slots = torch.arange(M, device=Q.device)
    if kv_length is not None:
        padding = slots < kv_length[:, None]
    if left_pad is not None:
        padding = slots >= left_pad[:, None]
    if function is None and padding is None:
        return mask, False
    offset = M - N if positional and at_end and q_segment is None else 0
    plain = causal and window_left is None and window_right is None and chunk is None and q_segment is None
    built = masking.sdpa_mask(
        batch_size=B,
        q_length=N,
        kv_length=M,
        q_offset=offset,
        mask_function=function or masking.bidirectional_mask_function,
        attention_mask=padding,
        # As in `create_causal_mask`: with a static cache the mask of a single query is always built.
        allow_is_causal_skip=plain and mask is None and not (N == 1 and not at_end),
        device=Q.device,
    )
    if built is None:
        return None, True
    return (built if mask is None else built & mask), False


def _places(torch: Any, segment: Any) -> Any:
    """Position of each token in its sequence: how many earlier tokens have its id."""
    same = segment[:, :, None] == segment[:, None, :]
    return torch.tril(same, -1).sum(-1)


def _refuse_overflow(torch: Any, Q: Any, K: Any) -> None:
    """Refuse logits that the eager functions cannot hold: they store Q K^T before they multiply it by the scale."""
    if Q.dtype != torch.float16 or not Q.numel() or not K.numel():
        return
    with torch.no_grad():
        grouped = Q.float().unflatten(1, (K.shape[1], -1))
        largest = (grouped @ K.float().mT.unsqueeze(2)).nan_to_num(0.0, torch.inf, -torch.inf).abs().amax()
    if torch.isfinite(largest) and largest > torch.finfo(torch.float16).max:
        raise Unsupported("Q K^T is stored in float16 before it is scaled, and does not fit")


def _module(Q: Any, K: Any, sink: Any) -> Any:
    """What the functions read of a module: group and head size, the sinks, and that it does not train."""
    return SimpleNamespace(
        num_key_value_groups=Q.shape[1] // K.shape[1],
        head_dim=Q.shape[3],
        sinks=sink,
        training=False,
        is_causal=False,
    )


@candidate(
    mechanism=MECHANISM,
    framework="torch",
    dtypes=("fp32", "fp16", "bf16"),
    declares={"empty_rows": "undefined", "unseen_values": "multiplied"},
    rounding="materialized",
    outputs=("O",),
    short_name="transformers-eager",
    version=versions("transformers", "torch"),
)
def transformers_eager(
    Q: Any,
    K: Any,
    V: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    sink: Any = None,
    q_segment: Any = None,
    kv_segment: Any = None,
    kv_length: Any = None,
    left_pad: Any = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    chunk: int | None = None,
) -> Any:
    """The eager function of Llama, Gemma 2 or gpt-oss, with an additive mask of finfo.min as `eager_mask` makes it."""
    torch = library("torch", "torch")
    if sink is not None and softcap is not None:
        raise Unsupported("no model has both sinks and a softcap")
    model = "gpt_oss" if sink is not None else "gemma2" if softcap is not None else "llama"
    modeling = library(f"transformers.models.{model}.modeling_{model}", "adapters")
    _refuse_overflow(torch, Q, K)
    keep, by_flag = _keep(
        Q,
        K,
        mask=mask,
        q_segment=q_segment,
        kv_segment=kv_segment,
        kv_length=kv_length,
        left_pad=left_pad,
        causal=causal,
        causal_alignment=causal_alignment,
        window_left=window_left,
        window_right=window_right,
        chunk=chunk,
    )
    if by_flag:
        keep = torch.ones(Q.shape[2], K.shape[2], dtype=torch.bool, device=Q.device)
        keep = keep.tril(K.shape[2] - Q.shape[2] if causal_alignment == "bottom_right" else 0)
    additive = bias
    if bias is not None and bool(torch.isneginf(bias).any()):
        # The library's additive masks remove a pair with finfo.min; -inf is not among their values.
        keep = ~torch.isneginf(bias) if keep is None else keep & ~torch.isneginf(bias)
    if keep is not None:
        zero = torch.zeros((), dtype=Q.dtype, device=Q.device)
        additive = torch.where(keep, zero if bias is None else bias, torch.finfo(Q.dtype).min)
    extra = {} if softcap is None else {"softcap": softcap}
    scaling = Q.shape[3] ** -0.5 if scale is None else scale
    out, _ = modeling.eager_attention_forward(_module(Q, K, sink), Q, K, V, additive, scaling=scaling, **extra)
    return out.transpose(1, 2)


@candidate(
    mechanism=MECHANISM,
    framework="torch",
    dtypes=("fp32", "fp16", "bf16"),
    declares={"unseen_values": "multiplied", "kv_lengths": "unchecked"},
    outputs=("O",),
    short_name="transformers-sdpa",
    for_function="transformers.integrations.sdpa_attention:sdpa_attention_forward",
    version=versions("transformers", "torch"),
)
def transformers_sdpa(
    Q: Any,
    K: Any,
    V: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    q_segment: Any = None,
    kv_segment: Any = None,
    kv_length: Any = None,
    left_pad: Any = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    scale: float | None = None,
    chunk: int | None = None,
) -> Any:
    """`sdpa_attention_forward`, with a boolean mask and, for a bias, its `position_bias`."""
    torch = library("torch", "torch")
    modeling = library("transformers.integrations.sdpa_attention", "adapters")
    keep, by_flag = _keep(
        Q,
        K,
        mask=mask,
        q_segment=q_segment,
        kv_segment=kv_segment,
        kv_length=kv_length,
        left_pad=left_pad,
        causal=causal,
        causal_alignment=causal_alignment,
        window_left=window_left,
        window_right=window_right,
        chunk=chunk,
    )
    if bias is not None and keep is not None and not bool((keep & ~torch.isneginf(bias)).any(-1).all()):
        raise Unsupported("with a position_bias a query that may attend to nothing gets the mean, without one zeros")
    with refusals({RuntimeError: ("cannot reshape tensor of 0 elements",)}):
        out, _ = modeling.sdpa_attention_forward(
            _module(Q, K, None), Q, K, V, keep, scaling=scale, is_causal=by_flag, position_bias=bias
        )
    return out.transpose(1, 2)
