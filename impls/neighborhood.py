"""Neighborhood attention on Triton: arguments and torch.autograd; the kernels are in `engines.neighborhood_*`.

    O, LSE = fused_neighborhood_attention(Q, K, V, rows=56, window_y=7, window_x=7)
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime  # first: it decides how Triton is imported
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.neighborhood_launch import Problem, plan_backward, plan_forward
from attnspec.impls.engines.softmax_configs import TileConfig

MOST_FEATURES = 256


def _forward(p: Problem) -> tuple[Tensor, Tensor]:
    launches, O, LSE = plan_forward(p, runtime.target_of(p.Q))
    for launch in launches:
        launch.run(p.Q.device)
    return O, LSE


class _Neighborhood(torch.autograd.Function):  # type: ignore[misc]
    """Saves the inputs, O and LSE; the weights are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, Kx: Any, Vx: Any, p: Problem) -> Any:
        ctx.set_materialize_grads(False)
        O, LSE = _forward(p)
        # Saved for autograd's check that nobody changed them in between; the problem holds the same tensors.
        ctx.save_for_backward(Q, K, V, Kx, Vx, O, LSE)
        ctx.problem = p
        return O, LSE

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor | None, dLSE: Tensor | None) -> Any:
        p, (O, LSE) = ctx.problem, ctx.saved_tensors[-2:]
        if dO is None and dLSE is None:
            return (None,) * 6
        given = O.new_zeros(1).expand(O.shape) if dO is None else dO
        launches, found = plan_backward(p, O, LSE, given, dLSE, runtime.target_of(p.Q))
        for launch in launches:
            launch.run(p.Q.device)
        extra = [found[name].sum(0).to(p.Q.dtype) if name in found else None for name in ("Kx", "Vx")]
        return found["Q"], found["K"], found["V"], *extra, None


@candidate(mechanism="fused_neighborhood_attention", outputs=("O", "LSE"), output_dtypes={"LSE": "fp32"})
def fused_neighborhood_attention(
    Q: Tensor, K: Tensor, V: Tensor, Kx: Tensor | None = None, Vx: Tensor | None = None, *, rows: int = 1,
    window_y: int | None = None, window_x: int | None = None, dilation_y: int = 1, dilation_x: int = 1,
    stride_y: int = 1, stride_x: int = 1, causal_y: bool = False, causal_x: bool = False, scale: float | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of a query on a grid to the nearest keys along each axis (Hassani, Hwu, Shi, arXiv 2403.04690).

    Args:
        Q: `[b,h,i,d]`. K: `[b,g,i,d]`, V: `[b,g,i,e]`, tokens of the grid row after row; head h reads head
            h // (H / Hk). All of one dtype: fp16, bf16 or fp32.
        Kx, Vx: `[b,g,m,d]`, `[b,g,m,e]`: extra keys that every query sees.
        rows: of the grid; 1: the tokens are a line, along which the options in x count.
        window: keys along the column (y) and the row (x), default as many as fit. dilation: the distance between
            neighbours. stride: so many consecutive queries share a window. causal: no key after the query.
        scale: of the dot products, default d ** -0.5. config: a tile configuration for all kernels of this call.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, LSE `[b,h,i]` in float32. Windows slide inward at borders.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("fused_neighborhood_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b g i d")
    call.tensor("V", V, "b g i e")
    call.tensor("Kx", Kx, "b g m d", optional=True)
    call.tensor("Vx", Vx, "b g m e", optional=True)
    call.at_most("d e", MOST_FEATURES)
    H, Hk, N = call.sizes("h g i")
    if Hk < 1 or H % Hk:
        raise call.wrong("Q", f"of a multiple of {Hk} heads, as K has", H)
    if (Kx is None) != (Vx is None):
        raise ValueError("fused_neighborhood_attention: Kx and Vx go together, got one of them")
    rows = call.count("rows", rows)
    if N % rows:
        raise call.wrong("rows", f"a divisor of the {N} tokens", rows)
    axes = (
        _axis(call, "y", rows if N else 0, window_y, dilation_y, stride_y),
        _axis(call, "x", N // rows, window_x, dilation_x, stride_x),
    )
    windows, dilations, strides = ((axes[0][n], axes[1][n]) for n in range(3))
    factor = Q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Problem(Q, K, V, Kx, Vx, rows, windows, dilations, strides, (bool(causal_y), bool(causal_x)), factor, config)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (Q, K, V, Kx, Vx)):
        O, LSE = _Neighborhood.apply(Q, K, V, Kx, Vx, p)
        return O, LSE
    return _forward(p)


def _axis(call: Arguments, name: str, length: int, window: Any, dilation: Any, stride: Any) -> tuple[int, int, int]:
    """Window, dilation and stride of an axis of the grid."""
    dilation = call.count(f"dilation_{name}", dilation)
    stride = call.count(f"stride_{name}", stride)
    fits = length // dilation
    width = fits if window is None else call.count(f"window_{name}", window)
    if length and not 1 <= width <= fits:
        raise call.wrong(f"window_{name}", f"1..{fits} on an axis of {length} with dilation {dilation}", width)
    if length and stride > width:
        raise call.wrong(f"stride_{name}", f"at most the window, {width}", stride)
    return width, dilation, stride


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: a line and a map, with all that gives different kernels."""

    def call(features: int, extra: int, **options: Any) -> Callable[[], object]:
        def run() -> object:
            shapes = [(1, 4, 1024, features), (1, 2, 1024, features), (1, 2, 1024, features)]
            shapes += [(1, 2, extra, features)] * 2 if extra else []
            given = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            O, LSE = fused_neighborhood_attention(*given, **options)
            return torch.autograd.backward([O, LSE], [torch.empty_like(O), torch.empty_like(LSE)])

        return run

    for features in (64, 128):
        plane = call(features, 16, rows=32, window_y=7, window_x=7, stride_x=2)
        yield "fused_neighborhood_attention", f"plane-{features}", plane
    line = call(256, 0, window_x=63, dilation_x=2, causal_x=True)
    yield "fused_neighborhood_attention", "line-256", line
