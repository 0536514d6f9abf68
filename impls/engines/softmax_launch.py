"""Launching the softmax engines: allocates outputs, chooses tiles and splits, and maps a checked problem to kernel
arguments.

`plan_forward` and `plan_backward` return the launches without running them. `attnspec.impls.softmax` runs them; the
ahead-of-time compiler plans on tensors without storage and compiles the very same launches.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.softmax_backward import row_term_kernel, softmax_dq_kernel
from attnspec.impls.engines.softmax_backward_bias import softmax_dbias_kernel
from attnspec.impls.engines.softmax_backward_keys import softmax_dkv_kernel
from attnspec.impls.engines.softmax_configs import Kind, Target, TileConfig, configs, interpreted_tile, padded
from attnspec.impls.engines.softmax_decode import ROWS, softmax_merge_kernel, split_count
from attnspec.impls.engines.softmax_forward import softmax_forward_kernel
from attnspec.impls.engines.softmax_segments import segment_tables
from attnspec.impls.softmax_arguments import Problem

# With few query rows per key/value head, its heads share a tile and the keys are split over programs: up to FEW_ROWS
# always (they fit the smallest tile), up to DECODE_ROWS where there are keys enough to split.
FEW_ROWS = 16
DECODE_ROWS = 64
DECODE_KEYS = 128
TERM_ROWS = 32


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _ints(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()


def _arguments(p: Problem) -> dict[str, Any]:
    """What all kernels over a problem take: tensors, strides, sizes and the flags of its options."""
    if p.q_segment is not None and p.kv_segment is not None and not p.segments:
        p.segments = segment_tables(
            p.q_segment, p.kv_segment, bottom_right=p.bottom_right, left=p.left, right=p.right, chunk=p.chunk,
            sink_tokens=p.sink_tokens,
        )  # fmt: skip
    tables = {
        "Q_SEG": "q_seg", "K_SEG": "k_seg", "Q_POS": "q_pos", "K_LOC": "k_loc", "Q_FIRST": "q_first",
        "Q_LAST": "q_last",
        "K_FIRST": "k_first", "K_LAST": "k_last",
    }  # fmt: skip
    return {
        "Q": p.Q, "K": p.K, "V": p.V, "BIAS": p.bias, "MASK": _bytes(p.mask), "DROP": _bytes(p.dropout_mask),
        "Q_LEN": _ints(p.q_length), "K_LEN": _ints(p.kv_length), "PAD": _ints(p.left_pad),
        "TABLE": _ints(p.block_table),
        **{name: p.segments.get(key) for name, key in tables.items()},
        **_strides("q", p.Q, "bhid"),
        # With pages the first two axes are page and slot: they take the place of batch and position.
        **_strides("k", p.K, "bjgd" if p.page else "bgjd"), **_strides("v", p.V, "bjge" if p.page else "bgje"),
        **_strides("bias", p.bias, "bhij"), **_strides("mask", p.mask, "bhij"),
        **_strides("drop", p.dropout_mask, "bhij"),
        "table_b": 0 if p.block_table is None else p.block_table.shape[1], "PAGE": p.page or 1,
        "B": p.B, "H": p.H, "N": p.N, "M": p.M, "left": p.left or 0, "right": p.right or 0, "chunk": p.chunk or 1,
        "sink_tokens": p.sink_tokens, "scale": p.scale, "softcap": p.softcap or 1.0,
        "drop_scale": 1.0 / (1.0 - p.dropout_p),
        "D": p.D, "E": p.E, "D_PAD": padded(p.D), "E_PAD": padded(p.E), "G": p.G,
        "BOTTOM_RIGHT": p.bottom_right, "HAS_LEFT": p.left is not None, "HAS_RIGHT": p.right is not None,
        "HAS_CHUNK": p.chunk is not None, "HAS_SOFTCAP": p.softcap is not None,
    }  # fmt: skip


def _rows_differ(p: Problem) -> bool:
    """Whether some row may be barred from a key that another row of its tile sees."""
    return any(x is not None for x in (p.left, p.right, p.chunk, p.bias, p.mask, p.q_segment))


def _launches(
    name: str, kernel: Any, tile: TileConfig, size: int, others: int, p: Problem, arguments: dict[str, Any],
    repair_tile: TileConfig | None, axis: str = "block_m",
) -> list[Launch]:  # fmt: skip
    """One launch; where rows of a tile may see different keys, a second one for the tiles that came out not finite.

    Programs own tiles of `axis` of an axis of `size` rows, times `others`. The repair takes `repair_tile`, whose rows
    must divide the tile's: its loop holds more in registers.
    """
    rows = getattr(tile, axis)
    tiles = -(-size // rows)
    flags = None
    if (_rows_differ(p) or arguments.get("SPLIT_AT") is not None) and "FLAG" in kernel.arg_names:
        flags = torch.empty(tiles * others, dtype=torch.int32, device=p.Q.device)
    out = []
    for repair, own in ((False, tile), (True, repair_tile or tile)):
        if repair and flags is None:
            continue
        count = -(-size // getattr(own, axis))
        given = arguments | {
            "BLOCK_M": own.block_m, "BLOCK_N": own.block_n, "tiles": count, "flag_tiles": tiles, "FLAG": flags,
            "FLAG_BLOCK": rows, "REPAIR": repair, "SPLIT_AT": arguments.get("SPLIT_AT"),
        }  # fmt: skip
        taken = {name: given[name] for name in kernel.arg_names}
        out.append(Launch(name + ("_repair" if repair else ""), kernel, count * others, taken, own))
    return out


def _repair_tile(p: Problem, tile: TileConfig, target: Target | None) -> TileConfig:
    """The tile of a repair on a device: the smallest. In the interpreter, which has room, the tile itself."""
    if target is None:
        return tile
    return TileConfig(16, 16, 4 if max(p.D, p.E) <= 64 else 8, 1, registers=255 if target[0] == "cuda" else 0)


def has_pair_data(p: Problem) -> bool:
    """Whether pairs carry data of their own, for which the kernels take smaller tiles."""
    return any(x is not None for x in (p.bias, p.mask, p.dropout_mask, p.q_segment, p.softcap))


def _tile(kind: Kind, p: Problem, config: TileConfig | None, target: Target | None) -> TileConfig:
    known = configs(kind, p.D, p.E, p.Q.dtype.itemsize, target, has_pair_data(p))
    return config or (known[0] if target else interpreted_tile(known, p.N, p.M))


def empty_outputs(p: Problem) -> tuple[Tensor, Tensor]:
    """Outputs of a problem without keys or without queries: every row is empty."""
    O = p.Q.new_zeros((p.B, p.H, p.N, p.E))
    LSE = torch.full((p.B, p.H, p.N), float("-inf"), dtype=torch.float32, device=p.Q.device)
    if p.sink is not None:
        LSE = LSE.maximum(p.sink.to(torch.float32)[None, :, None])
    return O, LSE


def is_decode(p: Problem) -> bool:
    """Whether the problem takes the split-KV path by itself."""
    rows = p.N * p.G
    return rows <= FEW_ROWS or (rows <= DECODE_ROWS and p.M >= DECODE_KEYS)


def plan_forward(
    p: Problem, config: TileConfig | None, target: Target | None, processors: int
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that compute O and LSE, and the two tensors, not yet written. Needs a query and a key at least."""
    decode = is_decode(p) or (config is not None and config.splits > 0)
    tile = _tile("decode" if decode else "forward", p, config, target)
    pack = p.G if decode else 1
    tiles = -(-p.N * pack // tile.block_m)
    programs = tiles * (p.H // pack) * p.B
    splits = 1
    if decode:
        splits = tile.splits or split_count(programs, -(-p.M // tile.block_n), processors)
    O = torch.empty((p.B, p.H, p.N, p.E), dtype=p.Q.dtype, device=p.Q.device)
    LSE = torch.empty((p.B, p.H, p.N), dtype=torch.float32, device=p.Q.device)
    sink = None if p.sink is None else p.sink.contiguous()
    part, part_lse = O[None], LSE[None]
    if splits > 1:
        part = torch.empty((splits, *O.shape), dtype=torch.float32, device=p.Q.device)
        part_lse = torch.empty((splits, *LSE.shape), dtype=torch.float32, device=p.Q.device)
    arguments = _arguments(p) | {
        "O": part, "LSE": part_lse, "SINK": sink if splits == 1 else None,
        **_strides("o", part, "sbhie"), **_strides("l", part_lse, "sbhi"), "PACK": pack, "SPLITS": splits,
    }  # fmt: skip
    name = "decode" if decode else "forward"
    # Splits share out the keys of a whole tile: a repair in other tiles would share them out differently.
    repair = _repair_tile(p, tile, target)
    if splits > 1:
        repair = replace(repair, block_m=tile.block_m, block_n=tile.block_n, warps=8)
    others = splits * (p.H // pack) * p.B
    launches = _launches(name, softmax_forward_kernel, tile, p.N * pack, others, p, arguments, repair)
    if splits > 1:
        launches.append(_merge(p, part, part_lse, O, LSE))
    return launches, O, LSE


def _merge(p: Problem, part: Tensor, part_lse: Tensor, O: Tensor, LSE: Tensor) -> Launch:
    """Partial results `[split,b,h,i,e]` and `[split,b,h,i]` to O and LSE; the sink joins."""
    arguments = {
        "PART": part, "PART_LSE": part_lse, "SINK": None if p.sink is None else p.sink.contiguous(), "O": O, "LSE": LSE,
        **_strides("p", part[..., 0], "sbhi"), **_strides("l", part_lse, "sbhi"), **_strides("o", O, "bhie"),
        **_strides("f", LSE, "bhi"), "H": p.H, "N": p.N, "splits": part.shape[0], "E": p.E, "E_PAD": padded(p.E),
        "BLOCK_R": ROWS,
    }  # fmt: skip
    return Launch("merge", softmax_merge_kernel, -(-p.N // ROWS) * p.H * p.B, arguments, None)


def plan_splits(
    p: Problem, at: Tensor, config: TileConfig | None, target: Target | None
) -> tuple[list[Launch], dict[str, Tensor]]:
    """Attention over stated splits of the keys, and the merge; needs a query and a key at least.

    Args:
        at: int32 `[b,splits+1]`, where each split begins and, at the next entry, ends; not descending.

    Returns:
        The launches, and the tensors that they write: O `[b,h,i,e]` in the inputs' dtype, LSE `[b,h,i]`, and of every
        split Op `[b,u,h,i,e]` and Lp `[b,u,h,i]`, in float32.
    """
    splits = at.shape[1] - 1
    tile = _tile("decode", p, config, target)
    where: dict[str, Any] = {"dtype": torch.float32, "device": p.Q.device}
    Op = torch.empty((p.B, splits, p.H, p.N, p.E), **where)
    Lp = torch.empty((p.B, splits, p.H, p.N), **where)
    O = torch.empty((p.B, p.H, p.N, p.E), dtype=p.Q.dtype, device=p.Q.device)
    LSE = torch.empty((p.B, p.H, p.N), **where)
    part, part_lse = Op.transpose(0, 1), Lp.transpose(0, 1)
    arguments = _arguments(p) | {
        "O": part, "LSE": part_lse, "SINK": None, **_strides("o", part, "sbhie"), **_strides("l", part_lse, "sbhi"),
        "PACK": p.G, "SPLITS": splits, "SPLIT_AT": at.contiguous(),
    }  # fmt: skip
    repair = _repair_tile(p, tile, target)
    launches = _launches(
        "split", softmax_forward_kernel, tile, p.N * p.G, splits * p.Hk * p.B, p, arguments, repair
    )  # fmt: skip
    launches.append(_merge(p, part, part_lse, O, LSE))
    return launches, {"O": O, "LSE": LSE, "Op": Op, "Lp": Lp}


def plan_backward(
    p: Problem, O: Tensor, LSE: Tensor, dO: Tensor, dLSE: Tensor | None, wanted: dict[str, bool],
    bias_shape: tuple[int, ...] | None, config: TileConfig | None, target: Target | None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Launch], dict[str, Tensor]]:  # fmt: skip
    """The launches of the gradients, and the (not yet written) tensors: Q, K, V in their dtype (or in `dtype`), bias
    in float32, T.
    """
    device, dtype = p.Q.device, dtype or p.Q.dtype
    T = torch.empty_like(LSE)
    out = {"T": T}
    arguments = _arguments(p) | {
        "O": O, "DO": dO, "LSE": LSE, "DLSE": dLSE, "T": T, **_strides("o", O, "bhie"), **_strides("do", dO, "bhie"),
        **_strides("l", LSE, "bhi"), **_strides("dl", dLSE, "bhi"),
    }  # fmt: skip
    tiles = -(-p.N // TERM_ROWS)
    term = arguments | {"tiles": tiles, "BLOCK_M": TERM_ROWS}
    launches = [
        Launch("row_term", row_term_kernel, tiles * p.H * p.B, {n: term[n] for n in row_term_kernel.arg_names}, None)
    ]
    if wanted.get("Q"):
        tile = _tile("dq", p, config, target)
        out["Q"] = torch.empty(p.Q.shape, dtype=dtype, device=device)
        extra = {"DQ": out["Q"], **_strides("dq", out["Q"], "bhid")}
        repair = _repair_tile(p, tile, target)
        launches += _launches("dq", softmax_dq_kernel, tile, p.N, p.H * p.B, p, arguments | extra, repair)
    if wanted.get("K") or wanted.get("V"):
        tile = _tile("dkv", p, config, target)
        out["K"] = torch.empty(p.K.shape, dtype=dtype, device=device)
        out["V"] = torch.empty(p.V.shape, dtype=dtype, device=device)
        extra = {
            "DK": out["K"], "DV": out["V"], **_strides("dk", out["K"], "bgjd"), **_strides("dv", out["V"], "bgje"),
        }  # fmt: skip
        repair = _repair_tile(p, tile, target)
        launches += _launches("dkv", softmax_dkv_kernel, tile, p.M, p.Hk * p.B, p, arguments | extra, repair, "block_n")
    if wanted.get("bias") and bias_shape is not None:
        tile = _tile("dbias", p, config, target)
        out["bias"] = torch.empty(bias_shape, dtype=torch.float32, device=device)
        programs = -(-p.M // tile.block_n) * -(-bias_shape[2] // tile.block_m) * bias_shape[0] * bias_shape[1]
        extra = {
            "DBIAS": out["bias"], **_strides("db", out["bias"], "bhij"), "bias_B": bias_shape[0],
            "bias_H": bias_shape[1], "bias_N": bias_shape[2], "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        }  # fmt: skip
        given = arguments | extra
        launches.append(
            Launch("dbias", softmax_dbias_kernel, programs, {n: given[n] for n in softmax_dbias_kernel.arg_names}, tile)
        )
    return launches, out
