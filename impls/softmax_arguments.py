"""Argument checks of `softmax_attention`: from the caller's tensors to one checked problem.

Every error names the argument, what was expected and what came. Values of length and index tensors are checked where
they are free to look at (on the CPU); on a GPU looking would wait for the device, so that only shapes and dtypes are
checked. Refuses (with `Unsupported`) dtypes other than fp16, bf16 and fp32, and head sizes above 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.types import Unsupported

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD = 256
ALIGNMENTS = ("bottom_right", "top_left")


@dataclass
class Problem:
    """Checked inputs, all on one device. What is absent is None; bias, mask and dropout_mask are expanded."""

    Q: Tensor
    K: Tensor
    V: Tensor
    bias: Tensor | None
    mask: Tensor | None
    sink: Tensor | None
    dropout_mask: Tensor | None
    q_segment: Tensor | None
    kv_segment: Tensor | None
    q_length: Tensor | None
    kv_length: Tensor | None
    left_pad: Tensor | None
    block_table: Tensor | None
    left: int | None
    right: int | None
    chunk: int | None
    sink_tokens: int
    bottom_right: bool
    softcap: float | None
    scale: float
    dropout_p: float
    B: int = 0
    H: int = 0
    Hk: int = 0
    N: int = 0
    M: int = 0
    D: int = 0
    E: int = 0
    page: int = 0
    segments: dict[str, Tensor] = field(default_factory=dict)

    @property
    def G(self) -> int:
        return self.H // self.Hk


def _fail(name: str, expected: str, came: object) -> ValueError:
    return ValueError(f"softmax_attention: {name} must be {expected}, got {came}")


def _floating(name: str, value: Any, like: Tensor | None, axes: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"softmax_attention: {name} must be a torch tensor, got {type(value).__name__}")
    if value.ndim != 4:
        raise _fail(name, f"of four axes {axes}", f"shape {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise Unsupported(f"softmax_attention: {name} of dtype {value.dtype}; supported are float16, bfloat16, float32")
    if like is not None and value.dtype != like.dtype:
        raise _fail(name, f"of Q's dtype {like.dtype}", value.dtype)
    if like is not None and value.device != like.device:
        raise _fail(name, f"on Q's device {like.device}", value.device)
    return value


def _pairs(name: str, value: Any, boolean: bool, exact: bool, shape: tuple[int, ...], Q: Tensor) -> Tensor | None:
    """A tensor over [b, h, i, j]; its first three axes may be 1 (unless exact) and come back expanded."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"softmax_attention: {name} must be a torch tensor, got {type(value).__name__}")
    if boolean and value.dtype != torch.bool:
        raise _fail(name, "of dtype torch.bool", value.dtype)
    if not boolean and value.dtype not in DTYPES:
        raise _fail(name, "of dtype float16, bfloat16 or float32", value.dtype)
    wide = value.ndim == 4 and all(
        got == want or (got == 1 and axis < 3 and not exact) for axis, (got, want) in enumerate(zip(value.shape, shape))
    )
    if not wide:
        kind = "of shape" if exact else "of a shape whose first three axes may be 1 in"
        raise _fail(name, f"{kind} [b, h, i, j] = {list(shape)}", f"shape {list(value.shape)}")
    if value.device != Q.device:
        raise _fail(name, f"on Q's device {Q.device}", value.device)
    return value.expand(shape)


def _integers(
    name: str, value: Any, shape: tuple[int, ...], Q: Tensor, low: int | None, high: int | None
) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"softmax_attention: {name} must be a torch tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
        raise _fail(name, "an integer tensor", value.dtype)
    if tuple(value.shape) != shape:
        raise _fail(name, f"of shape {list(shape)}", f"shape {list(value.shape)}")
    if value.device != Q.device:
        raise _fail(name, f"on Q's device {Q.device}", value.device)
    if value.device.type == "cpu" and low is not None and high is not None and value.numel():
        least, most = int(value.min()), int(value.max())
        if least < low or most > high:
            raise _fail(name, f"within {low}..{high}", least if least < low else most)
    return value


def _option(name: str, value: Any, least: int, nullable: bool) -> int | None:
    if value is None and nullable:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise _fail(name, "an int" + (" or None" if nullable else ""), repr(value))
    number = int(value)
    if number < least:
        raise _fail(name, f"at least {least}", number)
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _fail(name, "a finite number", repr(value))
    return float(value)


def check(
    Q: Any, K: Any, V: Any, *, bias: Any = None, mask: Any = None, sink: Any = None, dropout_mask: Any = None,
    q_segment: Any = None, kv_segment: Any = None, q_length: Any = None, kv_length: Any = None, left_pad: Any = None,
    k_pages: Any = None, v_pages: Any = None, block_table: Any = None, causal: Any = False,
    causal_alignment: Any = "bottom_right", window_left: Any = None, window_right: Any = None, softcap: Any = None,
    scale: Any = None, dropout_p: Any = 0.0, chunk: Any = None, sink_tokens: Any = 0,
) -> Problem:  # fmt: skip
    """Check every argument and combination. Shapes: see `softmax_attention`.

    Raises ValueError or TypeError for what is wrong, Unsupported for what is right but not offered.
    """
    Q = _floating("Q", Q, None, "[b, h, i, d]")
    paged = [x is not None for x in (k_pages, v_pages, block_table)]
    if any(paged):
        if not all(paged) or K is not None or V is not None:
            raise ValueError("softmax_attention: give either K and V, or k_pages, v_pages and block_table together")
        K = _floating("k_pages", k_pages, Q, "[page, slot, g, d]")
        V = _floating("v_pages", v_pages, Q, "[page, slot, g, e]")
    elif K is None or V is None:
        raise ValueError("softmax_attention: give either K and V, or k_pages, v_pages and block_table together")
    else:
        K = _floating("K", K, Q, "[b, g, j, d]")
        V = _floating("V", V, Q, "[b, g, j, e]")
    B, H, N, D = Q.shape
    E = V.shape[3]
    if K.shape[3] != D:
        raise _fail("k_pages" if any(paged) else "K", f"of Q's head size {D}", K.shape[3])
    if K.shape[:3] != V.shape[:3]:
        raise _fail("v_pages" if any(paged) else "V", f"of K's leading shape {list(K.shape[:3])}", list(V.shape[:3]))
    if any(paged):
        page, Hk = K.shape[1], K.shape[2]
        if page < 1:
            raise _fail("k_pages", "of at least one slot per page", f"shape {list(K.shape)}")
        if not isinstance(block_table, Tensor) or block_table.ndim != 2:
            raise _fail("block_table", "an integer tensor of shape [b, k]", getattr(block_table, "shape", block_table))
        M = block_table.shape[1] * page
        block_table = _integers("block_table", block_table, (B, block_table.shape[1]), Q, None, None)
    else:
        page = 0
        if K.shape[0] != B:
            raise _fail("K", f"of Q's batch size {B}", K.shape[0])
        Hk, M = K.shape[1], K.shape[2]
    if Hk < 1 or H < 1 or H % Hk:
        raise ValueError(
            f"softmax_attention: the number of query heads must be a multiple of the number of key/value heads, "
            f"got {H} and {Hk}"
        )
    if D < 1 or E < 1:
        raise _fail("the head size", "at least 1", min(D, E))
    if max(D, E) > MAX_HEAD:
        raise Unsupported(f"softmax_attention: head size {max(D, E)}; supported are 1..{MAX_HEAD}")
    if (q_segment is None) != (kv_segment is None):
        raise ValueError("softmax_attention: q_segment and kv_segment go together")
    if q_segment is not None:
        for name, value in (("q_length", q_length), ("kv_length", kv_length), ("left_pad", left_pad)):
            if value is not None:
                raise ValueError(
                    f"softmax_attention: packed sequences state their lengths by segment ids: give no {name}"
                )
        if any(paged):
            raise ValueError("softmax_attention: packed sequences have no block_table")
    if left_pad is not None and any(paged):
        raise ValueError("softmax_attention: a paged cache has no left padding: give no left_pad")
    p = _number("dropout_p", dropout_p)
    if not 0.0 <= p < 1.0:
        raise _fail("dropout_p", "in [0, 1)", p)
    if p != 0.0 and dropout_mask is None:
        raise ValueError("softmax_attention: dropout_p needs an explicit dropout_mask")
    if sink is not None:
        if not isinstance(sink, Tensor) or sink.dtype not in DTYPES or tuple(sink.shape) != (H,):
            came = f"{sink.dtype} {list(sink.shape)}" if isinstance(sink, Tensor) else type(sink).__name__
            raise _fail("sink", f"a float tensor of shape [{H}]", came)
        if sink.device != Q.device:
            raise _fail("sink", f"on Q's device {Q.device}", sink.device)
    if not isinstance(causal, bool):
        raise _fail("causal", "True or False", repr(causal))
    if causal_alignment not in ALIGNMENTS:
        raise _fail("causal_alignment", "bottom_right or top_left", repr(causal_alignment))
    left = _option("window_left", window_left, 0, True)
    right = _option("window_right", window_right, 0, True)
    exempt = _option("sink_tokens", sink_tokens, 0, False)
    chunk = _option("chunk", chunk, 1, True)
    assert exempt is not None
    if exempt and left is None:
        raise ValueError(
            "softmax_attention: sink_tokens are exempt from the left window bound: window_left must be given"
        )
    if softcap is not None:
        softcap = _number("softcap", softcap)
        if softcap <= 0.0:
            raise _fail("softcap", "positive, or None", softcap)
    if N + M >= 2**30:
        raise Unsupported(f"softmax_attention: {N} queries and {M} keys; supported are fewer than {2**30} together")
    reach = N + M + 1  # no two positions are further apart; keeps the kernels' 32-bit sums of positions exact
    return Problem(
        Q=Q, K=K, V=V,
        bias=_pairs("bias", bias, False, False, (B, H, N, M), Q),
        mask=_pairs("mask", mask, True, False, (B, H, N, M), Q),
        sink=sink,
        dropout_mask=_pairs("dropout_mask", dropout_mask, True, True, (B, H, N, M), Q),
        q_segment=_integers("q_segment", q_segment, (B, N), Q, None, None),
        kv_segment=_integers("kv_segment", kv_segment, (B, M), Q, None, None),
        q_length=_integers("q_length", q_length, (B,), Q, 0, N),
        kv_length=_integers("kv_length", kv_length, (B,), Q, 0, M),
        left_pad=_integers("left_pad", left_pad, (B,), Q, 0, M),
        block_table=block_table if any(paged) else None,
        left=None if left is None else min(left, reach),
        # Causal is a right bound of zero, and bounds are inclusive.
        right=0 if causal else (None if right is None else min(right, reach)),
        chunk=None if chunk is None else min(chunk, reach),
        sink_tokens=min(exempt, reach),
        bottom_right=causal_alignment == "bottom_right",
        softcap=softcap,
        scale=D**-0.5 if scale is None else _number("scale", scale),
        dropout_p=p,
        B=B, H=H, Hk=Hk, N=N, M=M, D=D, E=E, page=page,
    )  # fmt: skip


def check_as(function: str, Q: Any, K: Any, V: Any, **given: Any) -> Problem:
    """`check` for another mechanism that hands its tensors on: errors name that function."""
    try:
        return check(Q, K, V, **given)
    except (ValueError, TypeError, Unsupported) as error:
        raise type(error)(str(error).replace("softmax_attention", function, 1)) from None
