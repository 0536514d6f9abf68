"""Launching the kernels of `relative` and `relative_backward`: a checked problem, its tiles, outputs and gradients."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines import runtime
from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.relative import relative_forward_kernel
from attnspec.impls.engines.relative_backward import relative_dkv_kernel, relative_dq_kernel, relative_table_kernel
from attnspec.impls.engines.softmax_backward import row_term_kernel
from attnspec.impls.engines.softmax_configs import LARGE, MANY_PAIRS, padded

TERM_ROWS = 32


@dataclass(frozen=True)
class RelativeTile:
    """`block` queries by `block` keys; a square, so that the band of their distances is a power of two, 2 * block."""

    block: int
    warps: int = 4
    stages: int = 1
    registers: int = 0

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"RelativeTile: block must be a power of two of at least 16, got {self.block}")

    def options(self) -> dict[str, int]:
        """Compile options in Triton's names."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


INTERPRETED = [RelativeTile(32, 1), RelativeTile(16, 1)]


def configs(head: int, itemsize: int, target: runtime.Target | None) -> list[RelativeTile]:
    """Configurations for the larger of the two head sizes, the preferred one first. `target`: None if interpreted."""
    if target is None:
        return INTERPRETED
    size = padded(head)
    if target[0] == "hip":  # with more than four warps a thread has half as many registers
        return [RelativeTile(16, 4)]
    if itemsize == 4:
        return [RelativeTile(16, 8, 1, 255)]
    return [RelativeTile(32, 4 if size <= 64 else 8, 1, 255)] if size <= 128 else [RelativeTile(16, 8, 1, 255)]


@dataclass(frozen=True)
class Relative:
    """A checked problem; tensors of any strides.

    Q `[b,h,i,d]`, K `[b,h,j,d]`, V `[b,h,j,e]` of one dtype. rel `[h|1,p,d]` of the same dtype, whose row `zero` is
    distance 0; clamp: distances beyond it share its outermost row, otherwise they have none. beta, gam `[h,i+j-1]` of
    any real dtype, entry j - i + N - 1 for the pair (i, j). mask: bool `[b,h,i,j]`. local: length of a block.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    scale: float
    causal: bool
    rel: Tensor | None = None
    zero: int = 0
    clamp: bool = False
    beta: Tensor | None = None
    gam: Tensor | None = None
    mask: Tensor | None = None
    local: int | None = None
    tile: RelativeTile | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, H, N, M, D, E."""
        B, H, N, D = self.Q.shape
        return B, H, N, self.K.shape[2], D, self.V.shape[3]

    @property
    def empty(self) -> bool:
        B, _, N, M, _, _ = self.sizes
        return B * N * M == 0

    def rows_differ(self) -> bool:
        """Whether some query may be barred from a key that another one of its tile sees."""
        return self.causal or self.mask is not None


def _strides(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, steps)}


def _table(prefix: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """Strides of a table; one that all heads share stands still from head to head."""
    found = _strides(prefix, tensor, axes)
    return found | ({f"{prefix}_h": 0} if tensor is not None and tensor.shape[0] == 1 else {})


def _arguments(p: Relative, tile: RelativeTile) -> dict[str, Any]:
    B, H, N, M, D, E = p.sizes
    mask = None if p.mask is None else p.mask.view(torch.uint8)
    reach = N + M + 1  # no two positions are further apart; keeps sums of positions in 32 bits
    return {
        "Q": p.Q, "K": p.K, "V": p.V, "REL": p.rel, "BETA": p.beta, "GAM": p.gam, "MASK": mask,
        **_strides("q", p.Q, "bhid"), **_strides("k", p.K, "bhjd"), **_strides("v", p.V, "bhje"),
        **_table("rel", p.rel, "hmd"), **_table("beta", p.beta, "ho"), **_table("gam", p.gam, "ho"),
        **_strides("mask", mask, "bhij"), "B": B, "H": H, "N": N, "M": M,
        "P": 0 if p.rel is None else p.rel.shape[1], "zero": p.zero, "block": min(p.local or 1, reach),
        "scale": p.scale, "D": D, "E": E, "D_PAD": padded(D), "E_PAD": padded(E), "CAUSAL": p.causal,
        "LOCAL": p.local is not None, "CLAMP": p.clamp, "BLOCK": tile.block,
    }  # fmt: skip


def _twice(name: str, kernel: Any, size: int, p: Relative, tile: RelativeTile, given: dict[str, Any]) -> list[Launch]:
    """One launch over `size` rows of all heads, and where queries see different keys another for what is not finite.

    The second one holds more in registers, and takes the smallest tile on a device.
    """
    heads = p.sizes[0] * p.sizes[1]
    flag_tiles = -(-size // tile.block)
    flags = torch.empty(flag_tiles * heads, dtype=torch.int32, device=p.Q.device) if p.rows_differ() else None
    target = runtime.target_of(p.Q)
    smallest = tile if target is None else RelativeTile(16, 8 if target[0] == "cuda" else 4, 1, tile.registers)
    out = []
    for repair, own in ((False, tile), (True, smallest))[: 1 if flags is None else 2]:
        tiles = -(-size // own.block)
        taken = given | {
            "FLAG": flags, "tiles": tiles, "flag_tiles": flag_tiles, "FLAG_BLOCK": tile.block, "BLOCK": own.block,
            "REPAIR": repair,
        }  # fmt: skip
        label = name + ("_repair" if repair else "")
        out.append(Launch(label, kernel, tiles * heads, {n: taken[n] for n in kernel.arg_names}, own))
    return out


def _tile(p: Relative) -> RelativeTile:
    target = runtime.target_of(p.Q)
    known = configs(max(p.sizes[4:]), p.Q.dtype.itemsize, target)
    many = target is None and p.sizes[2] * p.sizes[3] >= MANY_PAIRS
    return p.tile or (replace(known[0], block=LARGE) if many else known[0])


def forward(p: Relative) -> tuple[Tensor, Tensor]:
    """O `[b,h,i,e]` in the inputs' dtype and LSE `[b,h,i]` in float32."""
    B, H, N, _, _, E = p.sizes
    O = torch.zeros((B, H, N, E), dtype=p.Q.dtype, device=p.Q.device)
    LSE = torch.full((B, H, N), float("-inf"), dtype=torch.float32, device=p.Q.device)
    if p.empty:
        return O, LSE
    tile = _tile(p)
    given = _arguments(p, tile) | {"O": O, "LSE": LSE, **_strides("o", O, "bhie"), **_strides("l", LSE, "bhi")}
    for launch in _twice("relative", relative_forward_kernel, N, p, tile, given):
        launch.run(p.Q.device)
    return O, LSE


def backward(p: Relative, O: Tensor, LSE: Tensor, dO: Tensor, wanted: dict[str, bool]) -> dict[str, Tensor]:
    """Gradients of the wanted ones of Q, K, V (in their dtype), rel, beta and gam (in float32, shaped as they are)."""
    tensors = {"Q": p.Q, "K": p.K, "V": p.V, "rel": p.rel, "beta": p.beta, "gam": p.gam}
    if p.empty:
        return {name: torch.zeros_like(x) for name, x in tensors.items() if x is not None and wanted.get(name)}
    B, H, N, M, _, _ = p.sizes
    tile, device = _tile(p), p.Q.device
    T = torch.empty_like(LSE)
    given = _arguments(p, tile) | {
        "O": O, "DO": dO, "LSE": LSE, "T": T, "DLSE": None, "Q_LEN": None, "Q_SEG": None, **_strides("o", O, "bhie"),
        **_strides("do", dO, "bhie"), **_strides("l", LSE, "bhi"), **_strides("dl", None, "bhi"),
    }  # fmt: skip
    rows = -(-N // TERM_ROWS)
    term = given | {"tiles": rows, "BLOCK_M": TERM_ROWS}
    launches = [
        Launch("row_term", row_term_kernel, rows * H * B, {n: term[n] for n in row_term_kernel.arg_names}, None)
    ]
    out: dict[str, Tensor] = {}
    beyond: tuple[Tensor, Tensor] | None = None
    if wanted.get("Q") or (p.clamp and wanted.get("rel")):
        out["Q"] = torch.empty(p.Q.shape, dtype=p.Q.dtype, device=device)
        if p.clamp:
            beyond = torch.empty_like(LSE), torch.empty_like(LSE)
        before, after = beyond or (None, None)
        more = {"DQ": out["Q"], **_strides("dq", out["Q"], "bhid"), "BEFORE": before, "AFTER": after}
        launches += _twice("relative_dq", relative_dq_kernel, N, p, tile, given | more)
    if wanted.get("K") or wanted.get("V"):
        for name, x in (("K", p.K), ("V", p.V)):
            out[name] = torch.empty(x.shape, dtype=x.dtype, device=device)
        more = {
            "DK": out["K"], "DV": out["V"], **_strides("dk", out["K"], "bhjd"), **_strides("dv", out["V"], "bhje")
        }  # fmt: skip
        launches += _twice("relative_dkv", relative_dkv_kernel, M, p, tile, given | more)
    if p.rel is not None and wanted.get("rel"):
        out["rel"] = torch.empty(p.rel.shape, dtype=torch.float32, device=device)
        launches.append(_table_launch(p, tile, given, {"DREL": out["rel"]}, p.rel.shape[1], p.zero, p.rel.shape[0]))
    tables = {name: x for name, x in (("beta", p.beta), ("gam", p.gam)) if x is not None and wanted.get(name)}
    if tables:
        for name, x in tables.items():
            out[name] = torch.empty(x.shape, dtype=torch.float32, device=device)
        more = {"DBETA": out.get("beta"), "DGAM": out.get("gam")}
        launches.append(_table_launch(p, tile, given, more, N + M - 1, M - 1, H))
    for launch in launches:
        launch.run(device)
    if "rel" in out and beyond is not None:
        # What lies beyond the table reads its first row, or its last one.
        for row, sums in ((0, beyond[0]), (-1, beyond[1])):
            each = p.scale * torch.einsum("bhi,bhid->hd", sums, torch.where((sums != 0)[..., None], p.Q.float(), 0.0))
            out["rel"][:, row] += each if out["rel"].shape[0] == H else each.sum(0, keepdim=True)
    return {name: grad for name, grad in out.items() if wanted.get(name)}


def _table_launch(
    p: Relative, tile: RelativeTile, given: dict[str, Any], outputs: dict[str, Tensor | None], count: int, zero: int,
    groups: int,
) -> Launch:  # fmt: skip
    kernel = relative_table_kernel
    tiles = -(-count // tile.block)
    taken: dict[str, Any] = {"DREL": None, "DBETA": None, "DGAM": None, **given, **outputs}
    if tile.registers:  # a tile of CUDA: two products and their shifted copies are alive at once
        tile = replace(tile, warps=8)
    step = 256 if p.Q.dtype.itemsize == 2 else 32
    taken |= {"STEP_D": min(taken["D_PAD"], step), "STEP_E": min(taken["E_PAD"], step)}
    taken |= {"tiles": tiles, "count": count, "zero": zero, "heads": p.sizes[1] // groups}
    name = "relative_table" if p.rel is None else "relative_vectors"
    return Launch(name, kernel, tiles * groups, {n: taken[n] for n in kernel.arg_names}, tile)
