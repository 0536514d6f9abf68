"""Tile configurations of the softmax engines: block sizes, warps and stages per kernel, dtype, head size and target.

Used by the launcher, by the ahead-of-time compiler (which shows that each fits its target without spilling) and by
the tests, which run every configuration. Pure Python. The lists rest on what the compiled binaries use (docs/aot.md),
not on timings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["forward", "decode", "dq", "dkv", "dbias"]
KINDS: tuple[Kind, ...] = ("forward", "decode", "dq", "dkv", "dbias")
Target = tuple[str, int | str]


@dataclass(frozen=True)
class TileConfig:
    """`block_m` query rows by `block_n` keys.

    splits: divides the keys of a decode (0: chosen by the launcher). registers (CUDA): per thread; without it (0) the
    assembler may spill a few registers for the sake of more resident warps.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    splits: int = 0
    registers: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            block = getattr(self, name)
            if block < 16 or block & (block - 1):
                raise ValueError(f"TileConfig: {name} must be a power of two of at least 16, got {block}")

    def options(self) -> dict[str, int]:
        """Compile options in Triton's names."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


def padded(size: int) -> int:
    """The power of two, at least 16, that a feature axis of this size is padded to."""
    return max(16, 1 << (size - 1).bit_length())


def _read(table: str, registers: int = 0) -> dict[int, list[TileConfig]]:
    """Lines `head: MxNwWsS MxNwWsS ...`: the configurations for padded head sizes up to `head`."""
    out = {}
    for line in table.split("\n"):
        head, _, entries = line.strip().partition(":")
        if head:
            tiles = []
            for entry in entries.split():
                m, n, warps, stages = (int(x) for x in re.split("[xws]", entry))
                tiles.append(TileConfig(m, n, warps, stages, registers=registers))
            out[int(head)] = tiles
    return out


INTERPRETED = [TileConfig(32, 32, 1, 1), TileConfig(16, 64, 1, 1), TileConfig(64, 16, 1, 1)]
MANY_PAIRS = 1 << 20
LARGE = 128


def interpreted_tile(configs: Sequence[TileConfig], queries: int, keys: int) -> TileConfig:
    """The configuration in Triton's interpreter, where a tile costs the same whatever its size.

    The first, but LARGE queries and keys where there are so many pairs that small tiles would take minutes.
    """
    return configs[0] if queries * keys < MANY_PAIRS else replace(configs[0], block_m=LARGE, block_n=LARGE)

# (kernel, bytes per element, whether pairs carry data of their own, vendor) -> configurations by head size.
# Pairs carry data where a tensor over [query, key] is read (bias, mask, dropout), where sequences are packed, and with
# a softcap: registers are then scarce and tiles smaller.
_TABLE: dict[tuple[Kind, int, bool, str], dict[int, list[TileConfig]]] = {
    ("forward", 2, False, "cuda"): _read("""
        64: 128x64w4s3 64x64w4s2
        128: 128x64w8s2 64x64w4s2
        256: 64x64w8s2 64x32w8s2"""),
    ("forward", 2, True, "cuda"): _read(
        """
        64: 64x32w4s2
        128: 64x32w4s2
        256: 64x32w8s2""",
        255,
    ),
    ("forward", 2, False, "hip"): _read("""
        64: 128x64w4s2 64x64w4s2
        128: 128x64w8s2 64x64w4s2
        256: 64x32w8s2 64x32w4s2"""),
    ("forward", 2, True, "hip"): _read("""
        64: 64x32w4s2
        128: 64x32w4s2
        256: 64x32w4s2"""),
    ("dq", 2, False, "cuda"): _read(
        """
        64: 64x64w4s2 64x32w4s2
        128: 64x64w8s2 64x32w4s1
        256: 64x32w8s1 32x32w4s1""",
        255,
    ),
    ("dq", 2, True, "cuda"): _read(
        """
        64: 64x32w8s1
        128: 32x32w8s1
        256: 16x32w8s1""",
        255,
    ),
    ("dq", 2, False, "hip"): _read("""
        64: 64x64w4s2 64x32w4s2
        128: 64x32w4s2 64x64w4s2
        256: 32x32w4s1 16x32w4s1"""),
    ("dq", 2, True, "hip"): _read("""
        128: 32x32w4s1
        256: 16x32w4s1"""),
    ("dkv", 2, False, "cuda"): _read(
        """
        32: 32x32w4s2 32x32w4s1
        64: 64x32w4s2 32x32w4s1
        128: 64x32w8s2 32x32w4s2
        256: 32x32w8s1 16x32w4s1""",
        255,
    ),
    ("dkv", 2, True, "cuda"): _read(
        """
        128: 32x32w4s1
        256: 32x16w8s1""",
        255,
    ),
    ("dkv", 2, False, "hip"): _read("""
        64: 32x64w4s1 64x64w4s1
        128: 32x64w4s1 32x32w4s1
        256: 16x32w4s1 16x16w4s1"""),
    ("dkv", 2, True, "hip"): _read("""
        128: 32x32w4s1
        256: 16x16w4s1"""),
    ("dbias", 2, True, "cuda"): _read(
        """
        128: 32x16w4s1
        256: 32x16w8s1""",
        255,
    ),
    ("dbias", 2, True, "hip"): _read("""
        128: 32x32w4s1
        256: 16x32w4s1"""),
    ("decode", 2, False, "cuda"): _read("""
        128: 16x64w4s2 16x32w4s2
        256: 16x32w4s2 16x32w4s1"""),
    ("decode", 2, True, "cuda"): _read(
        """
        128: 16x64w4s2
        256: 16x32w4s2""",
        255,
    ),
    ("decode", 2, False, "hip"): _read("""
        128: 16x64w4s2 16x32w4s2
        256: 16x32w4s1 16x16w4s1"""),
    ("decode", 2, True, "hip"): _read("""
        128: 16x32w4s1
        256: 16x16w4s1"""),
}
# float32 has no tensor cores to feed on CUDA: its products take registers, which more warps share out. Kernel, CUDA
# without and with data of pairs, AMD (one conservative list for both).
_FLOAT32: tuple[tuple[Kind, str, str, str], ...] = (
    ("forward", "64: 32x32w8s2\n 256: 64x32w8s1", "64: 32x32w4s1\n 128: 64x32w8s1\n 256: 32x32w8s1",
     "128: 32x32w4s2\n 256: 32x32w4s1"),
    ("decode", "128: 16x32w4s1\n 256: 16x16w4s1", "128: 16x32w8s1\n 256: 16x16w4s1", "128: 16x32w4s1\n 256: 16x16w4s1"),
    ("dq", "128: 32x32w8s1\n 256: 16x16w4s1", "128: 32x32w8s1\n 256: 16x16w8s1", "128: 32x32w4s1\n 256: 16x16w4s1"),
    ("dkv", "128: 32x32w8s1\n 256: 16x16w4s1", "64: 32x16w8s1\n 256: 16x16w8s1", "128: 32x32w4s1\n 256: 16x16w4s1"),
    ("dbias", "", "64: 32x32w8s1\n 256: 16x16w8s1", "128: 32x32w4s1\n 256: 16x16w4s1"),
)  # fmt: skip
for _kind, _plain, _paired, _hip in _FLOAT32:
    _TABLE[_kind, 4, False, "cuda"] = _read(_plain, 255)
    _TABLE[_kind, 4, True, "cuda"] = _read(_paired, 255)
    _TABLE[_kind, 4, False, "hip"] = _TABLE[_kind, 4, True, "hip"] = _read(_hip)


def configs(
    kind: Kind, D: int, E: int, itemsize: int, target: Target | None, pair_data: bool = False
) -> list[TileConfig]:
    """Configurations for head sizes D and E, the preferred one first. `target` is None under the interpreter.

    pair_data: whether the problem has a bias, mask, dropout mask, segments or softcap.
    """
    if target is None:
        return INTERPRETED
    vendor = "hip" if target[0] == "hip" else "cuda"
    by_head = _TABLE[kind, 2 if itemsize == 2 else 4, pair_data or kind == "dbias", vendor]
    return next(found for head, found in by_head.items() if max(padded(D), padded(E)) <= head)
