"""Which cases become golden vectors, and how their tolerance is to be read.

The suite's own cases that are judged by tolerance, with the oracle's results and sigma, for a candidate that takes
everything and declares nothing. Used by `attnspec vectors export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnspec.conformance.types import Direction, Level
from attnspec.conformance.vectors import Vector
from attnspec.spec import Mechanism

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
RULE = (
    "z = (got - value) / sigma, element by element. A result is accepted when the largest |z| and the root mean "
    "square of z stay below their limits, infinities stand where they are expected, and no NaN occurs; elements with "
    "sigma = 0 are exact. The limits depend on how much is judged: they are given by the number of elements."
)


def collect(mechanism: Mechanism, level: Level, dtypes: Sequence[str], seed: int) -> Iterator[Vector]:
    """The vectors of a level, forward and backward.

    Args:
        dtypes: of the stored inputs; results are float64 and sigma is that of an implementation in this dtype.
    """
    from attnspec.conformance.mechanical import everything
    from attnspec.conformance.suite import Suite

    suite = Suite(mechanism.name)
    signature = everything(suite.interface, tuple(dtypes))
    for direction in DIRECTIONS:
        if direction == "backward" and mechanism.gradient is None:
            continue
        for case in suite.cases(level, dtypes, direction, seed, signature):
            if case.check != "tolerance":
                continue
            data = suite.build(case)
            expected = suite.expected(case, data, signature)
            if expected.calls or expected.judged:
                # Cases that need several calls, or in which not everything counts, are no plain vectors.
                continue
            prefix = "d" if direction == "backward" else ""
            results = {f"{prefix}{name}": np.asarray(value) for name, value in expected.exact.items()}
            sigma = {f"{prefix}{name}": np.asarray(value) for name, value in expected.sigma.items()}
            yield Vector(case, data, results, sigma)


def tolerance(mechanism: Mechanism) -> dict[str, Any]:
    """The manifest's account of how sigma decides."""
    from attnspec.conformance import tolerance as limits

    model = mechanism.rounding()
    table = {
        str(count): {"largest": limits.limits(count, count).largest, "rms": limits.limits(count, count).rms}
        for count in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
    }
    return {
        "rule": RULE,
        "limits_by_elements": table,
        "false_rejection_per_result": limits.limits(1, 1).chance,
        "rounding": {"name": model.name, "stored": sorted(model.stored), "doc": model.doc},
    }
