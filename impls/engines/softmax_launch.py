"""Launching the softmax engines: allocates outputs, chooses tiles and splits, and maps a checked problem to kernel arguments.

Used by `attnspec.impls.softmax`. `forward_arguments` and its siblings are also what the ahead-of-time compiler derives its
variants from, so that what is compiled is what is launched.
"""

from __future__ import annotations

from typing import Any

import torch

from attnspec.impls.engines import runtime
from attnspec.impls.engines.softmax_configs import KINDS, TileConfig, configs, padded
from attnspec.impls.engines.softmax_decode import ROWS, softmax_merge_kernel, split_count
from attnspec.impls.engines.softmax_forward import softmax_forward_kernel
from attnspec.impls.engines.softmax_segments import segment_tables
from attnspec.impls.softmax_arguments import Problem

Tensor = torch.Tensor
DECODE_ROWS = 64  # up to this many query rows per key/value head, the keys are split over programs


def tile_configs(kind: str, D: int, E: int, dtype: torch.dtype, target: Any) -> list[TileConfig]:
    if kind not in KINDS:
        raise ValueError(f"configs: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return configs(kind, D, E, dtype.itemsize, target)  # type: ignore[arg-type]


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _ints(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()


def shared_arguments(p: Problem) -> dict[str, Any]:
    """What all kernels over a problem take: tensors, strides, sizes and the flags of its options."""
    if p.q_segment is not None and p.kv_segment is not None and not p.segments:
        p.segments = segment_tables(
            p.q_segment, p.kv_segment, bottom_right=p.bottom_right, left=p.left, right=p.right, chunk=p.chunk,
            sink_tokens=p.sink_tokens,
        )  # fmt: skip
    return {
        "Q": p.Q, "K": p.K, "V": p.V, "BIAS": p.bias, "MASK": _bytes(p.mask), "DROP": _bytes(p.dropout_mask),
        "Q_LEN": _ints(p.q_length), "K_LEN": _ints(p.kv_length), "PAD": _ints(p.left_pad),
        "Q_SEG": p.segments.get("q_seg"), "K_SEG": p.segments.get("k_seg"), "Q_POS": p.segments.get("q_pos"),
        "K_LOC": p.segments.get("k_loc"),
        **_strides("q", p.Q, "bhid"),
        **_strides("k", p.K, "bjgd" if p.page else "bgjd"), **_strides("v", p.V, "bjge" if p.page else "bgje"),
        **_strides("bias", p.bias, "bhij"), **_strides("mask", p.mask, "bhij"), **_strides("drop", p.dropout_mask, "bhij"),
        "H": p.H, "N": p.N, "M": p.M, "left": p.left or 0, "right": p.right or 0, "chunk": p.chunk or 1,
        "sink_tokens": p.sink_tokens, "scale": p.scale, "softcap": p.softcap or 1.0,
        "drop_scale": 1.0 / (1.0 - p.dropout_p),
        "D": p.D, "E": p.E, "D_PAD": padded(p.D), "E_PAD": padded(p.E), "G": p.G,
        "BOTTOM_RIGHT": p.bottom_right, "HAS_LEFT": p.left is not None, "HAS_RIGHT": p.right is not None,
        "HAS_CHUNK": p.chunk is not None, "HAS_SOFTCAP": p.softcap is not None,
    }  # fmt: skip


def _launch(kernel: Any, programs: int, device: torch.device, arguments: dict[str, Any], config: TileConfig | None) -> None:
    meta: dict[str, Any] = {}
    if config is not None:
        meta = {"num_warps": config.warps, "num_stages": config.stages}
    if programs == 0:
        return
    if programs >= 2**31:
        raise ValueError(f"softmax_attention: {programs} programs; a device launches fewer than 2^31")
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments, **meta)
    else:
        kernel[(programs,)](**arguments, **meta)


def empty_outputs(p: Problem) -> tuple[Tensor, Tensor]:
    """Outputs of a problem without keys: every row is empty."""
    O = p.Q.new_zeros((p.B, p.H, p.N, p.E))
    LSE = torch.full((p.B, p.H, p.N), float("-inf"), dtype=torch.float32, device=p.Q.device)
    if p.sink is not None:
        LSE = LSE.maximum(p.sink.to(torch.float32)[None, :, None])
    return O, LSE


def forward(p: Problem, config: TileConfig | None = None) -> tuple[Tensor, Tensor]:
    """(O, LSE) of a checked problem."""
    if p.M == 0 or p.B * p.H * p.N == 0:
        return empty_outputs(p)
    target = runtime.target_of(p.Q)
    decode = p.N * p.G <= DECODE_ROWS or (config is not None and config.splits > 0)
    kind = "decode" if decode else "forward"
    if config is None:
        config = tile_configs(kind, p.D, p.E, p.Q.dtype, target)[0]
    pack = p.G if decode else 1
    tiles = -(-p.N * pack // config.block_m)
    splits = 1
    if decode:
        programs = tiles * (p.H // pack) * p.B
        splits = config.splits or split_count(programs, -(-p.M // config.block_n), runtime.processors(p.Q))
    O = torch.empty((p.B, p.H, p.N, p.E), dtype=p.Q.dtype, device=p.Q.device)
    LSE = torch.empty((p.B, p.H, p.N), dtype=torch.float32, device=p.Q.device)
    part, part_lse = O[None], LSE[None]
    if splits > 1:
        part = torch.empty((splits, *O.shape), dtype=torch.float32, device=p.Q.device)
        part_lse = torch.empty((splits, *LSE.shape), dtype=torch.float32, device=p.Q.device)
    arguments = shared_arguments(p) | {
        "O": part, "LSE": part_lse, "SINK": p.sink.contiguous() if p.sink is not None and splits == 1 else None,
        "TABLE": None if p.block_table is None else _ints(p.block_table),
        "table_b": 0 if p.block_table is None else p.block_table.shape[1],
        "Q_FIRST": p.segments.get("q_first"), "Q_LAST": p.segments.get("q_last"),
        **_strides("o", part, "sbhie"), **_strides("l", part_lse, "sbhi"),
        "tiles": tiles, "PACK": pack, "PAGE": p.page or 1, "SPLITS": splits,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    _launch(softmax_forward_kernel, tiles * splits * (p.H // pack) * p.B, p.Q.device, arguments, config)
    if splits > 1:
        merge = {
            "PART": part, "PART_LSE": part_lse, "SINK": None if p.sink is None else p.sink.contiguous(), "O": O, "LSE": LSE,
            **_strides("p", part[..., 0], "sbhi"), **_strides("l", part_lse, "sbhi"), **_strides("o", O, "bhie"),
            **_strides("f", LSE, "bhi"), "B": p.B, "H": p.H, "N": p.N, "splits": splits, "E": p.E,
            "E_PAD": padded(p.E), "BLOCK_R": ROWS,
        }  # fmt: skip
        _launch(softmax_merge_kernel, -(-p.N // ROWS) * p.H * p.B, p.Q.device, merge, None)
    return O, LSE


def backward(
    p: Problem, O: Tensor, LSE: Tensor, dO: Tensor | None, dLSE: Tensor | None, wanted: dict[str, bool], bias: Tensor | None,
    config: TileConfig | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    raise NotImplementedError
