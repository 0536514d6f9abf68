"""Auto-correlation on Triton: correlations by fast Fourier transforms, rolls by a kernel of `engines.sampling`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.sampling import delays_kernel
from attnspec.impls.engines.softmax_configs import padded

MODES = ("inference", "training", "full")
BLOCKS = (32, 16, 64)
"""Time steps of a tile; the first is taken by default on a device."""
INTERPRETED = 256
"""Time steps of a tile in the interpreter."""
WIDEST = 64
"""Features of a program."""


def _strides(prefix: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, tensor.stride())}


@candidate(mechanism="auto_correlation", outputs=("O",), differentiable=False)
def auto_correlation(
    Q: Tensor, K: Tensor, V: Tensor, *, mode: str = "inference", factor: float = 1.0, top_k: int | None = None,
    block: int | None = None,
) -> Tensor:  # fmt: skip
    """Values rolled by the delays at which queries and keys correlate most (Wu et al., arXiv 2106.13008, Eq. 5-8).

    Args:
        Q: `[b,h,t,d]`. K, V: `[b,h,s,d]`, cut to the length of Q or continued with zeros. One dtype: fp16, bf16, fp32.
        mode: "inference" chooses delays per batch entry, "training" once for the batch, "full" per entry, head and
            feature.
        factor: floor(factor * ln N) delays, at least 1 and at most N. top_k: their number instead.
        block: time steps of a tile, one of BLOCKS (in the interpreter INTERPRETED, too); the result does not
            depend on it.

    Returns:
        O `[b,h,t,d]` in the inputs' dtype. Of equal correlations the shorter delay is taken. Not differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for dtypes without a kernel.
    """
    call = Arguments("auto_correlation")
    call.tensor("Q", Q, "b h t d")
    call.tensor("K", K, "b h s d")
    call.tensor("V", V, "b h s d")
    B, H, N, M, D = call.sizes("b h t s d")
    if mode not in MODES:
        raise call.wrong("mode", f"one of {', '.join(MODES)}", repr(mode))
    if call.number("factor", factor) < 0.0:
        raise call.wrong("factor", "at least 0", factor)
    if min(B, H, N, M, D) < 1:
        raise call.wrong("Q, K and V", "without empty axes", [list(x.shape) for x in (Q, K, V)])
    count = max(1, math.floor(factor * math.log(N))) if top_k is None else call.count("top_k", top_k)
    call.no_gradients(Q, K, V)
    block = call.block(block, BLOCKS, INTERPRETED, Q)
    delay, score = _chosen(Q, K, mode, min(N, count))
    O = torch.empty((B, H, N, D), dtype=Q.dtype, device=Q.device)
    wide = min(padded(D), WIDEST)
    tiles, blocks = -(-N // block), -(-D // wide)
    arguments: dict[str, Any] = {
        "V": V, "DELAY": delay, "SCORE": score, "O": O, **_strides("v", V, "bhtd"), **_strides("a", delay, "bhdk"),
        **_strides("s", score, "bhdk"), **_strides("o", O, "bhtd"), "H": H, "N": N, "M": min(N, M), "D": D,
        "delays": delay.shape[-1], "tiles": tiles, "blocks": blocks, "BLOCK": block, "D_BLOCK": wide,
    }  # fmt: skip
    Launch("delays", delays_kernel, B * H * tiles * blocks, arguments).run(Q.device)
    return O


def _chosen(Q: Tensor, K: Tensor, mode: str, count: int) -> tuple[Tensor, Tensor]:
    """Delays (int32) and their scores (float32), both expanded to `[b,h,d,k]`."""
    B, H, N, D = Q.shape
    spectrum = torch.fft.rfft(Q.float(), dim=2) * torch.fft.rfft(K.float(), n=N, dim=2).conj()
    if mode == "full":
        score = torch.fft.irfft(spectrum, n=N, dim=2).transpose(2, 3)
        rated = score
    else:
        # The transform is linear: the mean over heads and features is taken before it.
        score = torch.fft.irfft(spectrum.mean((1, 3)), n=N, dim=1)[:, None, None]
        rated = score.mean(0, keepdim=True) if mode == "training" else score
    # A stable sort, so that of equal correlations the shorter delay comes first.
    best = torch.sort(rated, dim=-1, descending=True, stable=True).indices[..., :count].expand(*score.shape[:3], count)
    shape = (B, H, D, count)
    return best.to(torch.int32).expand(shape), score.gather(-1, best).expand(shape)


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler."""
    for mode in ("inference", "full"):

        def call(mode: str = mode) -> object:
            Q, K, V = (torch.zeros(1, 8, 96, 64, dtype=dtype) for _ in range(3))
            return auto_correlation(Q, K, V, mode=mode)

        yield "auto_correlation", mode, call
