"""The gated delta rule on Triton, over the chunked engine `engines.delta_chunks`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.delta_launch import Rule, backward, forward
from attnspec.impls.linear import MOST_FEATURES, RESTART, begins_of

CHUNKS = (16, 32)


class _Delta(torch.autograd.Function):  # type: ignore[misc]
    """(Q, K, V, beta, g, state) to O and the last state; states and writes are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, K: Tensor, V: Tensor, beta: Tensor, g: Tensor, state: Tensor | None,
        scale: float, normalize: bool, chunk: int | None,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(Q, K, V, beta, g, state)
        ctx.options = scale, normalize, chunk
        return forward(_rule((Q, K, V, beta, g, state), ctx.options))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor | None, dS: Tensor | None) -> Any:
        if dO is None and dS is None:
            return (None,) * 9
        Q, K, V, beta, g, state = ctx.saved_tensors
        given = V.new_zeros(1).expand(V.shape) if dO is None else dO
        found = backward(_rule(ctx.saved_tensors, ctx.options), given, dS)
        dQ, dK = found["Q"], found["K"]
        if ctx.options[1]:
            dQ, dK = _through_length(dQ, Q), _through_length(dK, K)
        dstate = None if state is None else found["state"].to(state.dtype)
        near = dQ.to(Q.dtype), dK.to(K.dtype), found["V"].to(V.dtype)
        return *near, found["beta"].to(beta.dtype), found["g"].to(g.dtype), dstate, None, None, None


def _rule(tensors: tuple[Any, ...], options: tuple[float, bool, int | None]) -> Rule:
    Q, K, V, beta, g, state = tensors
    scale, normalize, chunk = options
    if normalize:
        Q, K = (x.float() * _inverse_length(x) for x in (Q, K))
        Q, K = Q.to(V.dtype), K.to(V.dtype)
    return Rule(Q, K, V, g, beta, state, scale, chunk)


def _inverse_length(x: Tensor) -> Tensor:
    wide = x.float()
    return torch.rsqrt((wide * wide).sum(-1, keepdim=True) + 1e-6)


def _through_length(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from that of x divided by its length."""
    inverse = _inverse_length(x)
    unit = x.float() * inverse
    return inverse * (grad - unit * (unit * grad).sum(-1, keepdim=True))


@candidate(mechanism="gated_delta_rule", outputs=("O", "S"), output_dtypes={"S": "fp32"})
def gated_delta_rule(
    Q: Tensor, K: Tensor, V: Tensor, beta: Tensor, g: Tensor, S0: Tensor | None = None,
    segment: Tensor | None = None, *, scale: float | None = None, normalize_qk: bool = False, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule (Yang et al., arXiv 2412.06464, equation 10; chunks as in section 3.3).

    Args:
        Q, K: `[b,k,i,d]`, keys of length 1 unless `normalize_qk`. V: `[b,h,i,e]`; head h uses queries and keys of head
            h // (H / Hk). One dtype: fp16, bf16 or fp32.
        beta: `[b,h,i]`, write strength, 0 to 2. g: `[b,h,i]`, at most 0: logarithm of the decay. Any floating dtype.
        S0: `[b,h,d,e]`, the state before the first token. segment: `[b,i]` sequence ids; a new one starts from zero.
        scale: of the queries, default d ** -0.5. normalize_qk: divide queries and keys by sqrt(sum of squares + 1e-6).
        chunk: tokens taken together where it is 16 or 32; the result does not depend on it.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, and the state after the last token `[b,h,d,e]` in float32.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("gated_delta_rule")
    call.tensor("Q", Q, "b k i d")
    call.tensor("K", K, "b k i d")
    call.tensor("V", V, "b h i e")
    call.tensor("beta", beta, "b h i", real=True)
    call.tensor("g", g, "b h i", real=True)
    call.tensor("S0", S0, "b h d e", real=True, optional=True)
    call.at_most("d e", MOST_FEATURES)
    H, Hk, D = call.sizes("h k d")
    if Hk < 1 or H % Hk:
        raise call.wrong("V", f"of a multiple of {Hk} heads, as K has", H)
    if segment is not None and S0 is not None:
        raise ValueError("gated_delta_rule: packed sequences start from zero: give no S0 with segment")
    call.count("chunk", chunk)
    decay = g if segment is None else torch.where(begins_of(call, segment)[:, None], RESTART, g.float())
    factor = D**-0.5 if scale is None else float(scale)
    O, last = _Delta.apply(
        Q, K, V, beta, decay, S0, factor, bool(normalize_qk), chunk if chunk in CHUNKS else None
    )  # fmt: skip
    return O, last


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call); `call` launches everything that is compiled.

    With 256 features some of these kernels run, but spill registers on CUDA: they are not listed.
    """
    for width in (64, 128):
        for state in (False, True):
            yield "gated_delta_rule", f"D{width}{' state' if state else ''}", _call(dtype, width, state)


def _call(dtype: torch.dtype, width: int, state: bool) -> Callable[[], object]:
    def call() -> None:
        Q, K = (torch.zeros(2, 2, 512, width, dtype=dtype, requires_grad=True) for _ in range(2))
        V = torch.zeros(2, 4, 512, width, dtype=dtype, requires_grad=True)
        beta, g = (torch.zeros(2, 4, 512, requires_grad=True) for _ in range(2))
        S0 = torch.zeros(2, 4, width, width, requires_grad=True) if state else None
        O, last = gated_delta_rule(Q, K, V, beta, g, S0)
        (O.float().sum() + (last.sum() if state else 0.0)).backward()

    return call
