"""The documented list of kernel variants that are compiled ahead of time: option sets, dtypes, head sizes and tile
configurations.

A variant is a launch of `plan_forward` or `plan_backward` on tensors without storage (torch's meta device), so that
what is compiled is what would be launched. Read by `attnspec.impls.aot`.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.softmax_configs import Kind, Target, TileConfig, configs
from attnspec.impls.engines.softmax_launch import has_pair_data, plan_backward, plan_forward
from attnspec.impls.softmax_arguments import Problem, check

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
B, H, HK, N, M, PAGE = 2, 8, 2, 4096, 4096, 16
PROCESSORS = 132

# What the options add to a plain call. The names stand in the table.
FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "causal": (),
    "window": (),
    "sink_tokens": (),
    "chunk": (),
    "softcap": (),
    "bias": ("bias",),
    "mask": ("mask",),
    "sink": ("sink",),
    "dropout": ("dropout_mask",),
    "lengths": ("q_length", "kv_length"),
    "left_pad": ("left_pad", "kv_length"),
    "segments": ("q_segment", "kv_segment"),
    "everything": ("bias", "mask", "sink", "dropout_mask", "q_length", "kv_length", "left_pad"),
    "paged": ("kv_length",),
    "paged_everything": ("bias", "mask", "sink", "q_length", "kv_length"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_left": 128, "window_right": 128},
    "sink_tokens": {"causal": True, "window_left": 128, "sink_tokens": 4},
    "chunk": {"causal": True, "chunk": 512},
    "softcap": {"softcap": 50.0},
    "dropout": {"dropout_p": 0.1},
    "lengths": {"causal": True},
    "left_pad": {"causal": True},
    "segments": {"causal": True, "window_left": 128},
    "everything": {
        "causal": True, "window_left": 128, "sink_tokens": 4, "chunk": 512, "softcap": 50.0, "dropout_p": 0.1
    },
    "paged": {"causal": True},
    "paged_everything": {"causal": True, "window_left": 128, "sink_tokens": 4, "chunk": 512, "softcap": 50.0},
}  # fmt: skip
HEADS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
FP32_HEADS = ((64, 64), (128, 128), (256, 256))
FEATURE_HEAD = (128, 128)
DEFAULTS: dict[str, Any] = {
    "bias": None, "mask": None, "sink": None, "dropout_mask": None, "q_segment": None, "kv_segment": None,
    "q_length": None,
    "kv_length": None, "left_pad": None, "k_pages": None, "v_pages": None, "block_table": None, "causal": False,
    "causal_alignment": "bottom_right", "window_left": None, "window_right": None, "softcap": None, "scale": None,
    "dropout_p": 0.0, "chunk": None, "sink_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel to compile. `kernel` is its launch: forward, decode, merge, row_term, dq, dkv, dbias, *_repair."""

    kernel: str
    feature: str
    dtype: str
    D: int
    E: int
    tile: TileConfig | None

    @property
    def name(self) -> str:
        name = f"{self.kernel}-{self.feature}-{self.dtype}-{self.D}x{self.E}"
        if self.tile is None or self.kernel.endswith("_repair"):  # a repair's own tile follows from its target
            return name
        return f"{name}-{self.tile.block_m}x{self.tile.block_n}w{self.tile.warps}s{self.tile.stages}"


def problem(feature: str, dtype: str, D: int, E: int, queries: int = N) -> Problem:
    """A problem of the feature's options on tensors without storage."""

    def empty(*shape: int, of: torch.dtype = DTYPES[dtype]) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    given = {
        "bias": empty(1, H, queries, M), "mask": empty(B, 1, queries, M, of=torch.bool), "sink": empty(H),
        "dropout_mask": empty(B, H, queries, M, of=torch.bool),
        **{n: empty(B, of=torch.int32) for n in ("q_length", "kv_length", "left_pad")},
        "q_segment": empty(B, queries, of=torch.int32), "kv_segment": empty(B, M, of=torch.int32),
    }  # fmt: skip
    arguments = DEFAULTS | {name: given[name] for name in FEATURES[feature]} | OPTIONS.get(feature, {})
    K: Tensor | None = empty(B, HK, M, D)
    V: Tensor | None = empty(B, HK, M, E)
    if feature.startswith("paged"):
        K = V = None
        arguments |= {
            "k_pages": empty(1024, PAGE, HK, D), "v_pages": empty(1024, PAGE, HK, E),
            "block_table": empty(B, M // PAGE, of=torch.int32),
        }  # fmt: skip
    p = check(empty(B, H, queries, D), K, V, **arguments)
    if p.q_segment is not None:
        for name in ("q_seg", "q_pos", "q_first", "q_last"):
            p.segments[name] = empty(B, queries, of=torch.int32)
        for name in ("k_seg", "k_loc", "k_first", "k_last"):
            p.segments[name] = empty(B, M, of=torch.int32)
    return p


def launches(variant: Variant, target: Target) -> list[Launch]:
    """All launches of the call that the variant's kernel belongs to, with the variant's tile."""
    decode = variant.kernel in ("decode", "decode_repair", "merge")
    p = problem(variant.feature, variant.dtype, variant.D, variant.E, 1 if decode else N)
    forward, O, LSE = plan_forward(
        p, variant.tile if decode or variant.kernel.startswith("forward") else None, target, PROCESSORS
    )
    if decode or variant.kernel.startswith("forward"):
        return forward
    wanted = dict.fromkeys(("Q", "K", "V", "bias", "sink"), True)
    shape = (1, H, N, M) if p.bias is not None else None
    return plan_backward(p, O, LSE, torch.empty_like(O), torch.empty_like(LSE), wanted, shape, variant.tile, target)[0]


def launch_of(variant: Variant, target: Target) -> Launch:
    """The launch that the variant names."""
    found = [launch for launch in launches(variant, target) if launch.name == variant.kernel]
    if len(found) != 1:
        raise LookupError(f"{variant.name}: {len(found)} launches of that name")
    return found[0]


def variants(target: Target) -> Iterator[Variant]:
    """The list for a target: all head sizes and dtypes, every configuration, and every set of options."""
    kinds: tuple[Kind, ...] = ("forward", "dq", "dkv", "decode")

    def tiles(kind: Kind, feature: str, dtype: str, D: int, E: int) -> list[TileConfig]:
        pair_data = has_pair_data(problem(feature, dtype, D, E))
        return configs(kind, D, E, DTYPES[dtype].itemsize, target, pair_data)

    for dtype, heads in (("bf16", HEADS), ("fp32", FP32_HEADS), ("fp16", (FEATURE_HEAD,))):
        for D, E in heads:
            for kind in kinds:
                feature = "paged" if kind == "decode" else "causal"
                for tile in tiles(kind, feature, dtype, D, E):
                    yield Variant(kind, feature, dtype, D, E, tile)
                worst = "paged_everything" if kind == "decode" else "everything"
                yield Variant(kind, worst, dtype, D, E, tiles(kind, worst, dtype, D, E)[0])
            for kind in kinds if dtype == "bf16" else ():
                feature = "paged" if kind == "decode" else "causal"
                yield Variant(f"{kind}_repair", feature, dtype, D, E, tiles(kind, feature, dtype, D, E)[0])
            yield Variant("dbias", "everything", dtype, D, E, tiles("dbias", "everything", dtype, D, E)[0])
            yield Variant("merge", "plain", dtype, D, E, None)
            yield Variant("row_term", "plain", dtype, D, E, None)
    D, E = FEATURE_HEAD
    for feature in FEATURES:
        for kind in kinds:
            # Decoding reads what the forward kernel reads: its sets are the paged ones above.
            if (kind != "decode" or feature in ("plain", "window")) and not (
                feature.startswith("paged") and kind in ("dq", "dkv")
            ):
                yield Variant(kind, feature, "bf16", D, E, tiles(kind, feature, "bf16", D, E)[0])
    yield Variant("dbias", "bias", "bf16", D, E, tiles("dbias", "bias", "bf16", D, E)[0])
    for kernel, feature in (
        ("forward_repair", "everything"), ("dq_repair", "everything"), ("dkv_repair", "everything"),
        ("decode_repair", "paged_everything"),
    ):  # fmt: skip
        kind = kernel.removesuffix("_repair")  # type: ignore[assignment]
        yield Variant(kernel, feature, "bf16", 128, 128, tiles(kind, feature, "bf16", 128, 128)[0])
    for feature in ("segments", "lengths"):
        yield Variant("row_term", feature, "bf16", 128, 128, None)
