"""What the runner sends to a worker: one case with its arrays, ready to be placed and called.

`make_job` narrows the float64 arrays to the case's dtype (exactly) and computes what the worker checks
results against, so that the worker needs neither the mechanism nor the oracle. Plain data: it pickles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from attnspec.conformance.bridges import narrow
from attnspec.conformance.interface import Interface
from attnspec.conformance.types import Case, CaseData


@dataclass
class Job:
    """One call to make.

    `shapes` holds the shapes of the outputs in the mechanism's axes; `wrt` the inputs whose gradients are
    asked for; `repeats` further calls with the same arrays; `decoy` asks for a call with other values first,
    `finite` for margins that hold 1 instead of NaN, `thorough` for a receipt without a budget of watched
    calls.
    """

    case: Case
    device: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    resolved: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    cotangents: dict[str, Any] = field(default_factory=dict)
    wrt: tuple[str, ...] = ()
    repeats: int = 0
    decoy: bool = False
    finite: bool = False
    thorough: bool = False


def make_job(
    case: Case,
    data: CaseData,
    interface: Interface,
    *,
    device: str,
    resolved: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    differentiable: Sequence[str],
    decoy: bool = False,
    thorough: bool = False,
) -> Job:
    """Bring a case's data into the form that travels.

    Raises:
        CandidateError: an array that is not rounded to the case's dtype.
    """
    inputs = {
        name: narrow(value, case.dtype, name) if _real(interface, name) else np.asarray(value)
        for name, value in data.inputs.items()
        if value is not None
    }
    backward = case.direction == "backward"
    cotangents = {name: narrow(value, case.dtype, f"d{name}") for name, value in data.cotangents.items()}
    return Job(
        case=case,
        device=device,
        inputs=inputs,
        options=dict(data.options),
        resolved=dict(resolved),
        shapes={name: tuple(int(size) for size in shape) for name, shape in shapes.items()},
        cotangents=cotangents if backward else {},
        wrt=tuple(name for name in differentiable if name in inputs) if backward else (),
        repeats=1 if case.check == "determinism" else int(case.params.get("repeats", 0)),
        decoy=decoy,
        thorough=thorough,
    )


def _real(interface: Interface, name: str) -> bool:
    face = interface.inputs.get(name)
    return face is None or face.kind == "real"
