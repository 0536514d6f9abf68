"""Linear attention with decaying states on Triton: thin mechanisms over the engine `engines.linear_chunks`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.linear_launch import Recurrence, backward, forward

MOST_FEATURES = 256


class _Recurrence(torch.autograd.Function):  # type: ignore[misc]
    """The engine for torch.autograd; the states are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, a: Tensor, state: Tensor | None, r: Recurrence) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(Q, K, V, a, state)
        ctx.recurrence = r
        return forward(r)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor | None, dS: Tensor | None) -> Any:
        r = ctx.recurrence
        if dO is None and dS is None:
            return (None,) * 6
        given = r.V.new_zeros(1).expand(r.V.shape) if dO is None else dO
        found = backward(r, given, dS)
        grads = [found["Q"].to(r.Q.dtype), found["K"].to(r.K.dtype), found["V"].to(r.V.dtype)]
        decay = None
        if ctx.needs_input_grad[3]:
            decay = _decay_gradient(r, found, forward(r)[1], dS).to(r.a.dtype)
        return *grads, decay, found["state"].to(r.state.dtype) if r.state is not None else None, None


def _decay_gradient(r: Recurrence, found: dict[str, Tensor], last: Tensor | None, dS: Tensor | None) -> Tensor:
    """Gradient of the log decay from those of Q and K (Yang et al., arXiv 2312.06635, section 4.3).

    A log decay multiplies all that stands between a key and a query of its sequence, so that its gradient is a sum,
    over the tokens from it on, of q dq - k dk, and of what reaches the final state. The sums are taken in float64, so
    that what belongs to later sequences leaves no trace when it is taken off again.
    """
    pulled = (r.Q.float() * found["Q"]).unflatten(1, (-1, r.group)).sum(2)
    each = (pulled - r.K.float() * found["K"]).double()
    total = each.flip(2).cumsum(2).flip(2)
    reaching = 0.0 if dS is None or last is None else (last * dS.float()).sum(-1).double()[:, :, None]
    if r.begins is not None:
        tokens = r.tokens
        at = torch.where(r.begins, torch.arange(tokens, device=r.begins.device), tokens)
        following = torch.nn.functional.pad(at, (0, 1), value=tokens)[:, 1:].flip(1).cummin(1).values.flip(1)
        beyond = torch.nn.functional.pad(total, (0, 0, 0, 1))
        total = total - beyond.gather(2, following[:, None, :, None].expand_as(total))
        reaching = reaching * (following == tokens)[:, None, :, None]
    total = (total + reaching).float()
    return total if r.vector else total.sum(-1)


@candidate(mechanism="lightning_attention", outputs=("O", "kv"), output_dtypes={"kv": "fp32"})
def lightning_attention(
    Q: Tensor, K: Tensor, V: Tensor, s: Tensor, kv0: Tensor | None = None, *, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with a fixed decay per head (Qin et al., arXiv 2405.17381, Algorithms 1 and 2).

    Args:
        Q, K: `[b,h,i,d]`, feature map already applied. V: `[b,h,i,e]`. All of one dtype: fp16, bf16 or fp32.
        s: `[h]`, at least 0: the factor from one token to the next is exp(-s). Not differentiated.
        kv0: `[b,h,d,e]`, the state before the first token.
        block: tokens per block, a power of two of at least 16 to have an effect; the result does not depend on it.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, and the state after the last token `[b,h,d,e]` in float32.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("lightning_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h i d")
    call.tensor("V", V, "b h i e")
    call.tensor("s", s, "h", real=True)
    call.tensor("kv0", kv0, "b h d e", real=True, optional=True)
    call.at_most("d e", MOST_FEATURES)
    block = call.count("block", block)
    a = -s.detach().float()[None, :, None].expand(Q.shape[:3])
    chunk = block if block in (16, 32, 64, 128) else None
    return _run(Recurrence(Q, K, V, a, kv0, 1.0, chunk))


@candidate(mechanism="gla", outputs=("O", "S"), output_dtypes={"S": "fp32"})
def gla(
    Q: Tensor, K: Tensor, V: Tensor, a: Tensor, av: Tensor | None = None, S0: Tensor | None = None,
    segment: Tensor | None = None, *, scale: float | None = None, a_min: float | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated linear attention (Yang et al., arXiv 2312.06635, section 4): a data-dependent decay per key channel.

    Args:
        Q: `[b,h,i,d]`. K: `[b,g,i,d]`, V: `[b,g,i,e]`; head h reads head h // (H / Hk). One dtype: fp16, bf16 or fp32.
        a: `[b,g,i,d]`, at most 0: logarithm of the decay before a token's write; `[b,g,i,1]` for one decay per head.
        av: no kernel decays value channels: refused.
        S0: `[b,g,d,e]`, the state before the first token. segment: `[b,i]` sequence ids; a new one starts from zero.
        scale: of the queries, default d ** -0.5. a_min: lower clamp of `a`. chunk: the result does not depend on it.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, and the state after the last token `[b,g,d,e]` in float32.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256 and value decays.
    """
    call = Arguments("gla")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b g i d")
    call.tensor("V", V, "b g i e")
    call.tensor("a", a, "b g i f", real=True)
    call.tensor("S0", S0, "b g d e", real=True, optional=True)
    call.at_most("d e", MOST_FEATURES)
    H, Hk, d, f = call.sizes("h g d f")
    if Hk < 1 or H % Hk:
        raise call.wrong("Q", f"of a multiple of {Hk} heads, as K has", H)
    if f not in (1, d):
        raise call.wrong("a", f"of length {d} or 1 along d", f)
    if av is not None:
        raise Unsupported("gla: no kernel decays value channels")
    if segment is not None and S0 is not None:
        raise ValueError("gla: packed sequences start from zero: give no S0 with segment")
    call.count("chunk", chunk)
    decay = a.float() if a_min is None else a.float().clamp(min=a_min)
    begins = None if segment is None else begins_of(call, segment)
    if begins is not None:
        decay = torch.where(begins[:, None, :, None], RESTART, decay)
    decay = decay.squeeze(-1) if f == 1 and d != 1 else decay
    factor = d**-0.5 if scale is None else float(scale)
    return _run(Recurrence(Q, K, V, decay, S0, factor, begins=begins))


RESTART = -1.0e4
"""A log decay that leaves nothing of a state in float32, and of which a chunk's worth can be added."""


def begins_of(call: Arguments, segment: Tensor) -> Tensor:
    """`[b,i]`: where a sequence begins that is not the row's first."""
    if not isinstance(segment, Tensor) or segment.is_floating_point() or tuple(segment.shape) != call.sizes("b i"):
        raise call.wrong("segment", f"an integer tensor of shape {list(call.sizes('b i'))}", segment)
    begins = torch.zeros_like(segment, dtype=torch.bool)
    begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
    return begins


def _run(r: Recurrence) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r.Q, r.K, r.V, r.a, r.state)):
        O, last = _Recurrence.apply(r.Q, r.K, r.V, r.a, r.state, r)
        return O, last
    O, last = forward(r)
    assert last is not None
    return O, last


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call); `call` launches everything that is compiled.

    With 256 features some of these kernels run, but spill registers on CUDA: they are not listed.
    """
    for width in (64, 128):
        yield "lightning_attention", f"D{width}", _lightning(dtype, width, 64, False)
        yield "lightning_attention", f"D{width} state", _lightning(dtype, width, 16, True)
        yield "gla", f"D{width}", _gla(dtype, width, width, False)
        yield "gla", f"D{width} one decay, state", _gla(dtype, width, 1, True)


def _lightning(dtype: torch.dtype, width: int, block: int, state: bool) -> Callable[[], object]:
    def call() -> None:
        Q, K, V = (torch.zeros(2, 4, 512, width, dtype=dtype, requires_grad=True) for _ in range(3))
        kv0 = torch.zeros(2, 4, width, width, requires_grad=True) if state else None
        O, last = lightning_attention(Q, K, V, torch.ones(4), kv0, block=block)
        (O.float().sum() + (last.sum() if state else 0.0)).backward()

    return call


def _gla(dtype: torch.dtype, width: int, decays: int, state: bool) -> Callable[[], object]:
    def call() -> None:
        Q = torch.zeros(2, 4, 512, width, dtype=dtype, requires_grad=True)
        K, V = (torch.zeros(2, 2, 512, width, dtype=dtype, requires_grad=True) for _ in range(2))
        a = torch.zeros(2, 2, 512, decays, requires_grad=True)
        S0 = torch.zeros(2, 2, width, width, requires_grad=True) if state else None
        O, last = gla(Q, K, V, a, S0=S0)
        (O.float().sum() + (last.sum() if state else 0.0)).backward()

    return call
