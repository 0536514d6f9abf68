"""Floating-point formats: rounding float64 values into them, and their unit roundoffs.

Used by case generation (inputs are rounded to the candidate's format before the oracle sees them), by the
noise model and by the bridges. All values travel as float64 arrays that hold only values of the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnspec.spec.language.errors import SpecError


@dataclass(frozen=True)
class Format:
    """A binary format: `bits` of precision (the hidden one included) and the exponents of its normal numbers."""

    name: str
    bits: int
    least: int
    greatest: int

    @property
    def unit_roundoff(self) -> float:
        """Half the distance from 1 to the next number: the largest relative error of rounding to nearest."""
        return float(2.0**-self.bits)

    @property
    def smallest(self) -> float:
        """The smallest positive number (subnormal)."""
        return float(2.0 ** (self.least - self.bits + 1))

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float((2.0 - 2.0 ** (1 - self.bits)) * 2.0**self.greatest)


FORMATS = {
    "fp64": Format("fp64", 53, -1022, 1023),
    "fp32": Format("fp32", 24, -126, 127),
    "tf32": Format("tf32", 11, -126, 127),
    "bf16": Format("bf16", 8, -126, 127),
    "fp16": Format("fp16", 11, -14, 15),
}


def format_of(dtype: str) -> Format:
    """The format of that name. Raises SpecError for an unknown one."""
    try:
        return FORMATS[dtype]
    except (KeyError, TypeError):
        raise SpecError(f"unknown floating-point format {dtype!r}; expected one of {', '.join(FORMATS)}") from None


def unit_roundoff(dtype: str) -> float:
    """The largest relative error of rounding to nearest into a format: 2**-24 for fp32."""
    return format_of(dtype).unit_roundoff


def round_to(x: ArrayLike, dtype: str) -> NDArray[np.float64]:
    """`x` rounded to nearest, ties to even, into a format; as float64.

    Subnormals are kept, what lies beyond the largest number by half a unit or more becomes infinite, NaN,
    infinities and signed zeros stay.

    Raises:
        SpecError: for an unknown format.
    """
    target = format_of(dtype)
    values: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    if target.name == "fp64":
        return values.copy()
    with np.errstate(all="ignore"):
        if target.name == "fp32":
            return values.astype(np.float32).astype(np.float64)
        if target.name == "fp16":
            return values.astype(np.float16).astype(np.float64)
        _, exponent = np.frexp(values)
        quantum = np.maximum(exponent - 1, target.least) - (target.bits - 1)
        rounded: Any = np.ldexp(np.rint(np.ldexp(values, -quantum)), quantum)
        rounded = np.where(np.abs(rounded) > target.largest, np.copysign(np.inf, values), rounded)
        return np.asarray(np.where(np.isfinite(values), rounded, values), dtype=np.float64)
