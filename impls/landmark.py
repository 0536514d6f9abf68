"""Landmark attention on Triton: arguments and gradients for torch.autograd; the kernels are in `engines.landmark_*`.

    O = landmark_attention(Q, K, V, landmark)                 # training
    O = landmark_attention(Q, K, V, landmark, topk=4)         # retrieval of cached blocks
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
from attnspec.impls.engines.landmark_launch import Problem, backward, forward
from attnspec.impls.engines.softmax_configs import TileConfig

MOST_FEATURES = 256
SELECT = ("token_and_head", "over_heads", "over_tokens")


class _Landmark(torch.autograd.Function):  # type: ignore[misc]
    """Saves the inputs, O, the sums of the outer softmax and the choice of blocks."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, p: Problem) -> Any:
        O, LSE, blocks, kept = forward(p, runtime.target_of(p.Q))
        # Saved for autograd's check that nobody changed them in between; the problem holds the same tensors.
        ctx.save_for_backward(Q, K, V, p.landmark, O, LSE)
        ctx.problem, ctx.blocks, ctx.kept = p, blocks, kept
        return O

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor) -> Any:
        p, (O, LSE) = ctx.problem, ctx.saved_tensors[-2:]
        found = backward(p, O, LSE, dO, ctx.blocks, ctx.kept, runtime.target_of(p.Q))
        return found["Q"], found["K"], found["V"], None


@candidate(mechanism="landmark_attention", outputs=("O",))
def landmark_attention(
    Q: Tensor, K: Tensor, V: Tensor, landmark: Tensor, *, topk: int | None = None, select: str = "token_and_head",
    scale: float | None = None, config: TileConfig | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention in two levels, over tokens and blocks (Mohtashami, Jaggi, arXiv 2305.16300, section 3.1).

    Args:
        Q: `[b,h,i,d]`, the last positions of the sequence. K: `[b,h,j,d]`. V: `[b,h,j,e]`. One dtype: fp16, bf16, fp32.
        landmark: `[b,j]` bool, True where a token closes its block. Values of landmarks are not read.
        topk: of the blocks that were closed before the first query only the best `topk` are attended to (section 3.2).
        select: whether they are chosen for each "token_and_head", for all heads ("over_heads") or for all queries
            ("over_tokens"), by the largest weight; of equal ones the earlier. The choice is not differentiated.
        scale: of the dot products, default d ** -0.5. config: a tile configuration for all kernels of this call.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype; zeros for a query without a visible key.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("landmark_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.at_most("d e", MOST_FEATURES)
    if not isinstance(landmark, Tensor) or landmark.dtype != torch.bool or tuple(landmark.shape) != call.sizes("b j"):
        came = f"{landmark.dtype} {list(landmark.shape)}" if isinstance(landmark, Tensor) else type(landmark).__name__
        raise call.wrong("landmark", f"a bool tensor of shape {list(call.sizes('b j'))}", came)
    if landmark.device != Q.device:
        raise call.wrong("landmark", f"on Q's device {Q.device}", landmark.device)
    if topk is not None:
        topk = call.count("topk", topk, 0)
    if select not in SELECT:
        raise call.wrong("select", f"one of {', '.join(SELECT)}", repr(select))
    factor = Q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Problem(Q, K, V, landmark, topk, select, factor, config)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (Q, K, V)):
        O: Tensor = _Landmark.apply(Q, K, V, p)
        return O
    return forward(p, runtime.target_of(Q))[0]


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: training, and retrieval of cached blocks."""

    def call(features: int, queries: int, topk: int | None) -> Callable[[], object]:
        def run() -> object:
            landmark = (torch.arange(1024) % 64 == 63).expand(1, -1)
            Q, K, V = (torch.empty((1, 4, n, features), dtype=dtype, requires_grad=True) for n in (queries, 1024, 1024))
            return landmark_attention(Q, K, V, landmark, topk=topk).sum().backward()

        return run

    yield "landmark_attention", "training-64", call(64, 1024, None)
    yield "landmark_attention", "training-256", call(256, 1024, None)
    yield "landmark_attention", "retrieval-128", call(128, 64, 4)
