"""Attention with learned data of the distance on Triton: thin mechanisms over the engine `engines.relative`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.relative_launch import Relative, RelativeTile, backward, forward

MOST_FEATURES = 256
INPUTS = ("Q", "K", "V", "rel", "beta", "gam")


class _Relative(torch.autograd.Function):  # type: ignore[misc]
    """The engine for torch.autograd; the weights are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Relative, *inputs: Any) -> Any:
        p = replace(p, **dict(zip(INPUTS, inputs)))
        O, LSE = forward(p)
        ctx.save_for_backward(*inputs, O, LSE)
        ctx.problem = p
        return O

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor) -> Any:
        *inputs, O, LSE = ctx.saved_tensors
        wanted = dict(zip(INPUTS, ctx.needs_input_grad[1:]))
        grads = backward(ctx.problem, O, LSE, dO, wanted)
        return None, *(
            None if x is None or name not in grads else grads[name].to(x.dtype) for name, x in zip(INPUTS, inputs)
        )


def _run(p: Relative) -> Tensor:
    inputs = [getattr(p, name) for name in INPUTS]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        O: Tensor = _Relative.apply(p, *inputs)
        return O
    return forward(p)[0]


@candidate(mechanism="music_relative_attention", outputs=("O",))
def music_relative_attention(
    Q: Tensor, K: Tensor, V: Tensor, rel: Tensor, mask: Tensor | None = None, *, causal: bool = True,
    block: int | None = None, far: str = "zero", scale: float | None = None, config: RelativeTile | None = None,
) -> Tensor:  # fmt: skip
    """Relative attention of the Music Transformer (Huang et al., arXiv 1809.04281, Eq. 3, sections 3.4.1 and 3.5).

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. rel: `[h|1,p,d]`, row m stands for the distance m - (p - 1) from
            query back to key, without `causal` for m - (p - 1) / 2. All of one dtype: fp16, bf16 or fp32. Any strides.
        mask: bool `[b|1,h|1,i|1,j]`, True = attend. causal: query i sees the keys up to its own position.
        block: local form, a query sees its own block of this length and the one before. far: "zero" or "clamp", for
            distances beyond the table. scale: of both logits, default d ** -0.5. config: in place of the default tile.

    Returns:
        O `[b,h,i,e]`; a query that may attend to nothing yields zeros.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for head sizes beyond 256.
    """
    call = Arguments("music_relative_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.tensor("rel", rel, "tables p d")
    call.at_most("d e", MOST_FEATURES)
    H, P, tables = call.sizes("h p tables")
    if tables not in (1, H):
        raise call.wrong("rel", f"of {H} tables, one per head, or of one for all", tables)
    if P < 1:
        raise call.wrong("rel", "of at least one row", P)
    if not call.flag("causal", causal) and (P % 2 == 0 or block is not None):
        raise ValueError(
            "music_relative_attention: without causal there is no block, and rel has an odd number of rows, "
            f"got block={block} and {P} rows"
        )
    if far not in ("zero", "clamp"):
        raise call.wrong("far", "'zero' or 'clamp'", repr(far))
    problem = Relative(
        Q, K, V, scale=call.number("scale", scale, Q.shape[3] ** -0.5), causal=causal, rel=rel,
        zero=P - 1 if causal else (P - 1) // 2, clamp=far == "clamp",
        mask=call.boolean("mask", mask, "b h i j", "b h i"),
        local=None if block is None else call.count("block", block), tile=config,
    )  # fmt: skip
    return _run(problem)


@candidate(mechanism="urpe_attention", outputs=("O",))
def urpe_attention(
    Q: Tensor, K: Tensor, V: Tensor, beta: Tensor | None = None, gam: Tensor | None = None,
    beta_table: Tensor | None = None, gam_table: Tensor | None = None, bucket: Tensor | None = None,
    mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None,
    config: RelativeTile | None = None,
) -> Tensor:  # fmt: skip
    """Attention with a relative bias and, after the softmax, factors by offset (Luo et al., arXiv 2205.13401, sec. 4).

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. All of one dtype: fp16, bf16 or fp32. Any strides.
        beta, gam: `[h,i+j-1]`, bias of the logits and factor of the weights; entry o belongs to the key o - (j - 1)
            positions ahead of the query. Or beta_table, gam_table `[h,t]` with bucket `[i+j-1]`, the offsets' rows.
        mask: bool `[b|1,h|1,i|1,j]`, True = attend. causal: query i sees the keys up to its own position.
        scale: default d ** -0.5. config: in place of the default tile.

    Returns:
        O `[b,h,i,e]`, not renormalised after the factor; a query that may attend to nothing yields zeros.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for head sizes beyond 256.
    """
    call = Arguments("urpe_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.at_most("d e", MOST_FEATURES)
    N, M = call.sizes("i j")
    call.lengths["o"] = max(N + M - 1, 0)
    call.tensor("beta", beta, "h o", real=True, optional=True)
    call.tensor("gam", gam, "h o", real=True, optional=True)
    call.tensor("beta_table", beta_table, "h t", real=True, optional=True)
    call.tensor("gam_table", gam_table, "h t", real=True, optional=True)
    if (beta is not None and beta_table is not None) or (gam is not None and gam_table is not None):
        raise ValueError("urpe_attention: give beta or beta_table, and gam or gam_table, not both")
    if (bucket is None) != (beta_table is None and gam_table is None):
        raise ValueError("urpe_attention: bucket goes together with beta_table or gam_table")
    rows = call.integers("bucket", bucket, "o", 0, call.lengths.get("t", 1) - 1)
    if rows is not None:
        beta = beta if beta_table is None else _ByOffset.apply(beta_table, rows)
        gam = gam if gam_table is None else _ByOffset.apply(gam_table, rows)
    problem = Relative(
        Q, K, V, scale=call.number("scale", scale, Q.shape[3] ** -0.5), causal=call.flag("causal", causal),
        beta=beta, gam=gam, mask=call.boolean("mask", mask, "b h i j", "b h i"), tile=config,
    )  # fmt: skip
    return _run(problem)


class _ByOffset(torch.autograd.Function):  # type: ignore[misc]
    """A table by bucket `[h,t]` read out by offset `[h,o]`, in float32."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, bucket: Tensor) -> Tensor:
        ctx.save_for_backward(bucket)
        ctx.rows, ctx.dtype = table.shape[1], table.dtype
        return table.float()[:, bucket.long()]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        # A product with the indicator of the buckets: unlike a scattered sum, in the same order every time.
        (bucket,) = ctx.saved_tensors
        belongs = bucket.long()[:, None] == torch.arange(ctx.rows, device=grad.device)
        return torch.matmul(grad, belongs.to(grad.dtype)).to(ctx.dtype), None


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call)."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def music(D: int, **options: Any) -> None:
        Q, K, V = (zeros(1, 4, 512, D) for _ in range(3))
        O = music_relative_attention(Q, K, V, zeros(4, 257, D), **options)
        O.backward(torch.zeros_like(O))

    def urpe(D: int, **options: Any) -> None:
        Q, K, V = (zeros(1, 4, 512, D) for _ in range(3))
        O = urpe_attention(Q, K, V, zeros(4, 1023), zeros(4, 1023), **options)
        O.backward(torch.zeros_like(O))

    for D in (64, 128):
        yield "music_relative_attention", f"causal-{D}", lambda D=D: music(D)  # type: ignore[misc]
        yield "urpe_attention", f"both-{D}", lambda D=D: urpe(D, causal=True)  # type: ignore[misc]
    mask = {"mask": torch.empty(1, 1, 512, 512, dtype=torch.bool)}
    yield "music_relative_attention", "local-64", lambda: music(64, block=64, far="clamp", **mask)
