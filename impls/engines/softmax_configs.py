"""Tile configurations of the softmax engines: which block sizes, warps and stages per head size, dtype and target.

Used by the launcher, by the ahead-of-time compiler (which shows that each fits its target without spilling) and by the
tests, which run every configuration. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "decode", "dq", "dkv", "dbias"]
KINDS: tuple[Kind, ...] = ("forward", "decode", "dq", "dkv", "dbias")
Target = tuple[str, int | str]


@dataclass(frozen=True)
class TileConfig:
    """`block_m` query rows by `block_n` keys; `splits` divides the keys of a decode (0: chosen by the launcher)."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    splits: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            block = getattr(self, name)
            if block < 16 or block & (block - 1):
                raise ValueError(f"TileConfig: {name} must be a power of two of at least 16, got {block}")

    def options(self) -> dict[str, int]:
        """Compile options in Triton's names."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def padded(size: int) -> int:
    """The power of two, at least 16, that a feature axis of this size is padded to."""
    return max(16, 1 << (size - 1).bit_length())


INTERPRETED = TileConfig(32, 32, 1, 1)


def configs(kind: Kind, D: int, E: int, itemsize: int, target: Target | None) -> list[TileConfig]:
    """Configurations for head sizes D and E, the preferred one first. `target` is None under the interpreter.

    The lists come from the ahead-of-time table (docs/aot.md): each entry keeps within the target's registers and shared memory.
    """
    if target is None:
        return [INTERPRETED, TileConfig(16, 64, 1, 1), TileConfig(64, 16, 1, 1)]
    return [TileConfig(64, 32, 4, 2)]
