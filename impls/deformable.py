"""Multi-scale deformable attention on Triton, over the sampling kernel of `engines.sampling`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.sampling import bilinear_kernel
from attnspec.impls.engines.softmax_configs import padded

BLOCKS = (16, 4, 32)
"""Queries of a tile; the first is taken by default on a device."""
INTERPRETED = 256
"""Queries of a tile in the interpreter."""
WIDEST = 64
"""Value features of a program."""


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


@candidate(mechanism="deformable_attention", outputs=("O",), differentiable=False)
def deformable_attention(
    V: Tensor, height: Tensor, width: Tensor, ref: Tensor, off: Tensor, logits: Tensor, box: Tensor | None = None,
    mask: Tensor | None = None, *, block: int | None = None,
) -> Tensor:  # fmt: skip
    """Samples of feature maps around each query's reference point (Zhu et al., arXiv 2010.04159, Eq. 2-3).

    Args:
        V: `[b,h,l,y,x,e]`, fp16, bf16 or fp32; of level l the first height[l] rows and width[l] columns are the map,
            the rest is not read. height, width: `[l]`, integers.
        ref: `[b,i,l|1,2]`, points as (x, y); 0 and 1 are the outer edges of a map. off: `[b,h,i,l,k,2]`, in pixels, or
            with boxes in units of half a box over the number of points. logits: `[b,h,i,l,k]`.
        box: `[b,i,l|1,2]`, widths and heights of reference boxes in units of the map.
        mask: bool `[b,l,y,x]`, True = the cell is real; another one's value is zero.
        block: queries of a tile, one of BLOCKS (in the interpreter INTERPRETED, too); the result does not depend on it.

    Returns:
        O `[b,h,i,e]` in V's dtype. Not differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for dtypes without a kernel.
    """
    call = Arguments("deformable_attention")
    call.tensor("V", V, "b h l y x e")
    call.lengths["z"] = 2
    call.tensor("off", off, "b h i l k z", real=True)
    call.tensor("logits", logits, "b h i l k", real=True)
    call.tensor("ref", ref, "b i r z", real=True)
    call.tensor("box", box, "b i s z", real=True, optional=True)
    B, H, L, Sy, Sx, E, N, P = call.sizes("b h l y x e i k")
    for name, value in (("ref", ref), ("box", box)):
        if value is not None and value.shape[2] not in (1, L):
            raise call.wrong(name, f"of {L} levels or 1", value.shape[2])
    if L < 1 or P < 1:
        raise call.wrong("logits", "of at least one level and point", list(logits.shape))
    rows = call.integers("height", height, "l", 1, Sy)
    columns = call.integers("width", width, "l", 1, Sx)
    if rows is None or columns is None:
        raise call.wrong("height and width", "given", "None")
    cells = call.boolean("mask", mask, "b l y x")
    block = call.block(block, BLOCKS, INTERPRETED, V)
    call.no_gradients(V, ref, off, logits, box)
    ref = ref.expand(B, N, L, 2)
    frames = None if box is None else box.expand(B, N, L, 2)
    O = torch.empty((B, H, N, E), dtype=V.dtype, device=V.device)
    wide = min(padded(E), WIDEST)
    tiles, blocks = -(-N // block), -(-E // wide)
    seen = None if cells is None else cells.view(torch.uint8)
    arguments: dict[str, Any] = {
        "V": V, "HEIGHT": rows.to(torch.int32).contiguous(), "WIDTH": columns.to(torch.int32).contiguous(), "REF": ref,
        "OFF": off, "LOGITS": logits, "BOX": frames, "MASK": seen, "O": O, **_strides("v", V, "bhlyxe"),
        **_strides("ref", ref, "bilz"), **_strides("off", off, "bhilkz"), **_strides("g", logits, "bhilk"),
        **_strides("box", frames, "bilz"), **_strides("mask", seen, "blyx"), **_strides("o", O, "bhie"),
        "H": H, "N": N, "L": L, "P": P, "Sy": Sy, "Sx": Sx, "tiles": tiles, "E": E, "E_BLOCK": wide, "E_BLOCKS": blocks,
        "BLOCK": block,
    }  # fmt: skip
    Launch("bilinear", bilinear_kernel, B * H * tiles * blocks, arguments).run(V.device)
    return O


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler."""
    for label, full in (("points", False), ("boxes-mask", True)):

        def call(full: bool = full) -> object:
            V = torch.zeros(1, 8, 4, 16, 16, 64 if full else 32, dtype=dtype)
            sides = torch.tensor([16, 8, 4, 2])
            ref = torch.zeros(1, 300, 1, 2, dtype=dtype)
            off = torch.zeros(1, 8, 300, 4, 4, 2, dtype=dtype)
            logits = torch.zeros(1, 8, 300, 4, 4, dtype=dtype)
            box = torch.ones(1, 300, 4, 2, dtype=dtype) if full else None
            mask = torch.ones(1, 4, 16, 16, dtype=torch.bool) if full else None
            return deformable_attention(V, sides, sides, ref, off, logits, box, mask=mask)

        yield "deformable_attention", label, call
