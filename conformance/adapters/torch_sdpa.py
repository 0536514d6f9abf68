"""`torch.nn.functional.scaled_dot_product_attention`, chosen freely by PyTorch or pinned to one backend.

`torch-sdpa` is what a user calls; `torch-sdpa-math`, `-flash`, `-efficient` and `-cudnn` pin a backend with
`torch.nn.attention.sdpa_kernel`, and what that backend does not have is refused. `torch-sdpa-lower-right` is the same
function with the causal mask that PyTorch offers for caches, `torch.nn.attention.bias.causal_lower_right`.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, one_of, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

FUNCTION = "torch.nn.functional:scaled_dot_product_attention"
DTYPES = ("fp32", "fp16", "bf16", "fp64")
REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    RuntimeError: (
        "No available kernel",
        "No viable backend",
        "Explicit attn_mask should not be set when is_causal=True",
    )
}


def _call(backend: str | None, Q: Any, K: Any, V: Any, **arguments: Any) -> Any:
    torch = library("torch", "torch")
    attention = library("torch.nn.attention", "torch")
    pinned: Any = nullcontext()
    if backend is not None:
        pinned = attention.sdpa_kernel(getattr(attention.SDPBackend, backend))
    with pinned, refusals(REFUSALS), warnings.catch_warnings():
        # A pinned backend that cannot run says why in warnings before it raises.
        warnings.simplefilter("ignore", UserWarning)
        return torch.nn.functional.scaled_dot_product_attention(
            Q, K, V, enable_gqa=Q.shape[1] != K.shape[1], **arguments
        )


def _pinned(short_name: str, backend: str | None, devices: tuple[str, ...], for_function: str | None = None) -> Any:
    # The CPU's flash kernel takes the number of keys from V and does not compare it with K's; the others do.
    unchecked = {} if backend in ("MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION") else {"kv_lengths": "unchecked"}

    @candidate(
        mechanism=MECHANISM,
        framework="torch",
        dtypes=DTYPES,
        devices=devices,
        declares={"causal_alignment": "top_left", "unseen_values": "multiplied", **unchecked},
        outputs=("O",),
        short_name=short_name,
        for_function=for_function,
        version=versions("torch"),
    )
    def attention(
        Q: Any, K: Any, V: Any, *, bias: Any = None, mask: Any = None, causal: bool = False, scale: float | None = None
    ) -> Any:
        one_of("attn_mask", bias=bias, mask=mask)
        attn_mask = bias if mask is None else mask
        return _call(backend, Q, K, V, attn_mask=attn_mask, is_causal=causal, scale=scale)

    return attention


torch_sdpa = _pinned("torch-sdpa", None, ("cpu", "cuda"), FUNCTION)
torch_sdpa_math = _pinned("torch-sdpa-math", "MATH", ("cpu", "cuda"))
torch_sdpa_flash = _pinned("torch-sdpa-flash", "FLASH_ATTENTION", ("cpu", "cuda"))
torch_sdpa_efficient = _pinned("torch-sdpa-efficient", "EFFICIENT_ATTENTION", ("cuda",))
torch_sdpa_cudnn = _pinned("torch-sdpa-cudnn", "CUDNN_ATTENTION", ("cuda",))


@candidate(
    mechanism=MECHANISM,
    framework="torch",
    dtypes=DTYPES,
    declares={"unseen_values": "multiplied", "kv_lengths": "unchecked"},
    outputs=("O",),
    short_name="torch-sdpa-lower-right",
    version=versions("torch"),
)
def torch_sdpa_lower_right(
    Q: Any, K: Any, V: Any, *, bias: Any = None, mask: Any = None, causal: bool = False, scale: float | None = None
) -> Any:
    """SDPA with its bottom-right causal mask; the mask fills the slot that a bias or a boolean mask would need."""
    one_of("attn_mask", bias=bias, mask=mask, causal=causal)
    if not causal:
        return _call(None, Q, K, V, attn_mask=bias if mask is None else mask, scale=scale)
    if K.shape[2] < Q.shape[2]:
        raise Unsupported("causal_lower_right warns that it gives NaN for more queries than keys")
    biases = library("torch.nn.attention.bias", "torch")
    return _call(None, Q, K, V, attn_mask=biases.causal_lower_right(Q.shape[2], K.shape[2]), scale=scale)
