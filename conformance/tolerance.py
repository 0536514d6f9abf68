"""The limits of a verdict: how large z may get for an honest implementation.

z = (candidate - exact) / sigma, sigma from the noise of the rounding model. Two figures are limited: the root mean
square of z, over the whole output and over every slice of every axis (one row, one head, one column), and the
largest |z|. An honest implementation's z has an RMS of about 1, but not exactly: the model does not know in which
order it adds or which instruction it divides with. `HONEST` is the largest RMS that honest implementations were
measured to have, with a margin (docs/verdict.md); around it the limits are quantiles, so that the chance of failing
an honest run is below `CHANCE` however long it is. They depend on how much is judged, never on the candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

HONEST = 1.5
"""RMS of z up to which an implementation counts as honest."""
CHANCE = 1e-6
"""Probability, at most, that a whole run fails an honest implementation by chance."""
JUDGEMENTS = 20_000
"""Outputs judged in a run, at most; each gets an equal share of `CHANCE`."""
SHARES = 3
"""The largest |z|, the RMS of the whole and the RMS of the slices share an output's chance."""
DOF = 30
"""Degrees of freedom behind sigma: 16 samples pooled with the row's median (`spec.language.noise`), at least."""

PER_OUTPUT = CHANCE / JUDGEMENTS / SHARES
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Limits:
    """The limits of one output."""

    rms: float
    largest: float
    chance: float


def normal_quantile(tail: float) -> float:
    """The value that a standard normal variable exceeds with probability `tail`."""
    return -_NORMAL.inv_cdf(max(tail, 1e-300))


def student_quantile(tail: float, dof: int) -> float:
    """The value that Student's t exceeds with probability `tail` (Wallace 1959, good to a per cent)."""
    z = normal_quantile(tail)
    factor = ((8 * dof + 3) / (8 * dof + 1)) ** 2
    return math.sqrt(dof * math.expm1(factor * z * z / dof))


def rms_quantile(tail: float, count: float) -> float:
    """The value that the RMS of `count` independent standard normal variables exceeds with probability `tail`.

    Wilson and Hilferty's approximation of chi-square, the largest of it and the t quantile for a single variable.
    """
    n = max(count, 1.0)
    spread = 2.0 / (9.0 * n)
    return float((1.0 - spread + normal_quantile(tail) * math.sqrt(spread)) ** 1.5)


def largest_limit(elements: int, chance: float = PER_OUTPUT) -> float:
    """The limit on the largest |z| of `elements` values."""
    return HONEST * student_quantile(chance / (2 * max(elements, 1)), DOF)


def rms_limit(independent: float, slices: int = 1, chance: float = PER_OUTPUT) -> float:
    """The limit on the RMS of z, over values of which `independent` are independent, one of `slices` such limits."""
    return HONEST * rms_quantile(chance / max(slices, 1), independent)


def limits(elements: int, rows: int) -> Limits:
    """The limits of an output of `elements` values in `rows` rows.

    The errors of one row are not independent (they share the row's normalizer), so that each row counts once.
    """
    return Limits(rms_limit(rows), largest_limit(elements), SHARES * PER_OUTPUT)
