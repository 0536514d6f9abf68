"""One kernel launch as data: run it, or record it for the ahead-of-time compiler.

An implementation states what it launches as `Launch` objects and calls `run`; every kernel is launched so and in no
other way. `with recorded(("cuda", 90)) as launches:` collects the launches of the calls inside instead of running them
(their outputs keep whatever memory held), so that what is compiled ahead of time is what would be launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attnspec.impls.engines import interpreter, runtime


class Tile(Protocol):
    """A configuration of a kernel: at least its compile options."""

    def options(self) -> dict[str, int]:
        """Options in Triton's names (`num_warps`, `num_stages`, ...)."""
        ...


@dataclass(frozen=True)
class Threads:
    """Compile options of a kernel whose block sizes are not chosen by configuration.

    registers (CUDA): per thread; without it (0) the assembler may spill a few for the sake of more resident warps.
    """

    warps: int = 4
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Compile options in Triton's names."""
        return {"num_warps": self.warps, "num_stages": 1} | ({"maxnreg": self.registers} if self.registers else {})


def without_spills(warps: int, target: runtime.Target | None) -> Threads:
    """So many warps, each thread with all the registers that CUDA has for it."""
    return Threads(warps, 255 if target is not None and target[0] == "cuda" else 0)


@dataclass(frozen=True)
class Launch:
    """One kernel launch over `programs` programs on a one-dimensional grid.

    `name` tells launches of one plan apart; `arguments` are by name, constants (`tl.constexpr`) included; `tile` is
    None for kernels without configurations.
    """

    name: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile | None = None

    def options(self) -> dict[str, int | bool]:
        """Compile options in Triton's names. Fused multiply-add is on, as it was in all versions up to 3.9."""
        return (self.tile or Threads()).options() | {"enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        """Launch on the tensors' device, or record; no programs, no launch.

        Raises:
            ValueError: more programs than a device launches.
        """
        if self.programs == 0:
            return
        if self.programs >= 2**31:
            raise ValueError(f"{self.name}: {self.programs} programs; a device launches fewer than 2^31")
        if runtime.recording is not None:
            runtime.recording.launches.append(self)
        elif device.type == "cuda":
            with torch.cuda.device(device):
                self.kernel[(self.programs,)](**self.arguments, **self.options())
        else:
            runtime.interpreted_launches += 1
            interpreter.quickened()
            self.kernel[(self.programs,)](**self.arguments)
