"""Mamba-2's state space duality on Triton, over the chunked linear recurrence `engines.linear_chunks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.linear_launch import Recurrence, backward, forward
from attnspec.impls.linear import MOST_FEATURES, RESTART, begins_of

CHUNKS = (16, 32, 64)


class _Scan(torch.autograd.Function):  # type: ignore[misc]
    """(C, B, x, step, log decay, state) to the mixed channels `[b,h,i,p]` and the last state `[b,h,n,p]`."""

    @staticmethod
    def forward(
        ctx: Any, C: Tensor, B: Tensor, x: Tensor, step: Tensor, a: Tensor, state: Tensor | None,
        chunk: int | None, output: torch.dtype,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(C, B, x, step, a, state)
        ctx.chunk = chunk
        return forward(Recurrence(C, B, x, a, state, 1.0, chunk, weight=step, output=output))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor | None, dS: Tensor | None) -> Any:
        if dO is None and dS is None:
            return (None,) * 8
        C, B, x, step, a, state = ctx.saved_tensors
        given = x.new_zeros(1).expand(x.shape) if dO is None else dO.to(x.dtype)
        r = Recurrence(C, B, x, a, state, 1.0, ctx.chunk, weight=step)
        found = backward(r, given, dS, decays=True)
        dstate = None if state is None else found["state"].to(state.dtype)
        shared = found["Q"].to(C.dtype), found["K"].to(B.dtype), found["V"].to(x.dtype)
        return *shared, found["weight"], found["a"], dstate, None, None


@candidate(mechanism="mamba2_ssd", outputs=("y", "H_last"), output_dtypes={"H_last": "fp32"})
def mamba2_ssd(
    C: Tensor, B: Tensor, x: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor | None = None, Dskip: Tensor | None = None,
    z: Tensor | None = None, H0: Tensor | None = None, segment: Tensor | None = None, *, dt_softplus: bool = True,
    dt_min: float = 0.0, dt_max: float | None = None, chunk: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2's selective state space model (Dao and Gu, arXiv 2405.21060, section 6), as linear attention in chunks.

    Args:
        C, B: `[b,g,i,n]`, what reads and what writes the state; head h uses group h // (H / Hk). x: `[b,h,i,p]`.
        dt: `[b,h,i]`, raw step: step = clip(softplus(dt + dt_bias), dt_min, dt_max); any floating dtype.
        A: `[h]`, at most 0: the state is multiplied by exp(step A) before each write. dt_bias: `[h]`.
        Dskip: `[h,p]` or `[h,1]`, multiple of x that is added to the output. z: `[b,h,i,p]`: output times silu(z).
        H0: `[b,h,p,n]`, the state before the first token. segment: `[b,i]` sequence ids; a new one starts from zero.
        dt_softplus: False leaves the softplus out. chunk: tokens taken together where it is 16, 32 or 64; the result
            does not depend on it.

    C, B, x and z are of one dtype: fp16, bf16 or fp32. Steps, decays and states are float32.

    Returns:
        y `[b,h,i,p]` in the inputs' dtype, and the state after the last token `[b,h,p,n]` in float32.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for more than 256 channels or state features.
    """
    call = Arguments("mamba2_ssd")
    call.tensor("x", x, "b h i p")
    call.tensor("C", C, "b g i n")
    call.tensor("B", B, "b g i n")
    call.tensor("dt", dt, "b h i", real=True)
    call.tensor("A", A, "h", real=True)
    call.tensor("dt_bias", dt_bias, "h", real=True, optional=True)
    call.tensor("Dskip", Dskip, "h q", real=True, optional=True)
    call.tensor("z", z, "b h i p", optional=True)
    call.tensor("H0", H0, "b h p n", real=True, optional=True)
    call.at_most("n p", MOST_FEATURES)
    H, Hk, P = call.sizes("h g p")
    if Hk < 1 or H % Hk:
        raise call.wrong("x", f"of a multiple of {Hk} heads, the groups of B", H)
    if Dskip is not None and Dskip.shape[1] not in (1, P):
        raise call.wrong("Dskip", f"of length {P} or 1 along p", list(Dskip.shape))
    if segment is not None and H0 is not None:
        raise ValueError("mamba2_ssd: packed sequences start from zero: give no H0 with segment")
    if not dt_min >= 0.0 or (dt_max is not None and not dt_max >= 0.0):
        raise call.wrong("dt_min and dt_max", "at least 0", f"{dt_min} and {dt_max}")
    call.count("chunk", chunk)
    step = _steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    a = step * A.float()[:, None]
    if segment is not None:
        a = torch.where(begins_of(call, segment)[:, None], RESTART, a)
    plain = z is None and Dskip is None
    mixed, last = _Scan.apply(
        C, B, x, step, a, None if H0 is None else H0.transpose(-1, -2), chunk if chunk in CHUNKS else None,
        x.dtype if plain else torch.float32,
    )  # fmt: skip
    y = mixed if Dskip is None else mixed + Dskip.float()[:, None, :] * x.float()
    y = y if z is None else y * torch.nn.functional.silu(z.float())
    return y.to(x.dtype), last.transpose(-1, -2)


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float | None) -> Tensor:
    """Steps in float32. Raw values of any size: torch's own softplus is linear above 20, which costs digits there."""
    raw = dt.float() if bias is None else dt.float() + bias.float()[:, None]
    step = torch.logaddexp(raw, torch.zeros_like(raw)) if softplus else raw
    return step.clamp(min=low, max=high)


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call); `call` launches everything that is compiled.

    With 256 features some of these kernels run, but spill registers on CUDA: they are not listed.
    """
    for state, channels in ((64, 64), (128, 64), (128, 128)):
        for extra in ("", "state", "gate"):
            yield "mamba2_ssd", f"N{state} P{channels} {extra}".strip(), _call(dtype, state, channels, extra)


def _call(dtype: torch.dtype, state: int, channels: int, extra: str) -> Callable[[], object]:
    def call() -> None:
        heads, groups, tokens = 8, 2, 512
        given: dict[str, Tensor] = {
            "C": torch.zeros(2, groups, tokens, state, dtype=dtype, requires_grad=True),
            "B": torch.zeros(2, groups, tokens, state, dtype=dtype, requires_grad=True),
            "x": torch.zeros(2, heads, tokens, channels, dtype=dtype, requires_grad=True),
            "dt": torch.zeros(2, heads, tokens, requires_grad=True),
            "A": torch.zeros(heads, requires_grad=True),
        }
        if extra == "state":
            given["H0"] = torch.zeros(2, heads, channels, state, requires_grad=True)
        if extra == "gate":
            given["z"] = torch.zeros(2, heads, tokens, channels, dtype=dtype, requires_grad=True)
        y, last = mamba2_ssd(**given)
        (y.float().sum() + (last.sum() if extra == "state" else 0.0)).backward()

    return call
