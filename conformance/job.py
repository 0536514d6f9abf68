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
class Call:
    """The arguments of one call. `shapes` are those of the outputs in the mechanism's axes; empty: not
    checked."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    resolved: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    cotangents: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """A case to pose.

    `more` are further calls with other arguments, made after the first in order; `again` further calls with
    the very same arrays. `wrt` names the inputs whose gradients are asked for. `decoy` asks for a call with
    other values first, `finite` for margins that hold 1 instead of NaN, `thorough` for a receipt without a
    budget of watched calls.
    """

    case: Case
    device: str
    call: Call
    more: list[Call] = field(default_factory=list)
    again: int = 0
    wrt: tuple[str, ...] = ()
    decoy: bool = False
    finite: bool = False
    thorough: bool = False

    def layout(self, name: str) -> str:
        """The memory layout of one input: the case's, or contiguous where the case (`strided:K`) names
        another."""
        layout, _, only = self.case.layout.partition(":")
        return layout if only in ("", name) else "contiguous"


def make_call(
    case: Case,
    data: CaseData,
    interface: Interface,
    resolved: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
) -> Call:
    """Bring the arrays of a call into the form that travels.

    Raises:
        CandidateError: an array that is not rounded to the case's dtype.
    """
    return Call(
        inputs={
            name: narrow(value, case.dtype, name) if _real(interface, name) else np.asarray(value)
            for name, value in data.inputs.items()
            if value is not None
        },
        options=dict(data.options),
        resolved={**resolved, **data.options},
        shapes={name: tuple(int(size) for size in shape) for name, shape in shapes.items()},
        cotangents={name: narrow(value, case.dtype, f"d{name}") for name, value in data.cotangents.items()}
        if case.direction == "backward"
        else {},
    )


def make_job(
    case: Case,
    call: Call,
    more: Sequence[Call],
    *,
    device: str,
    differentiable: Sequence[str],
    sampled: bool,
) -> Job:
    """A job for a case; `sampled` asks for the decoy call and the thorough receipt."""
    backward = case.direction == "backward"
    return Job(
        case=case,
        device=device,
        call=call,
        more=list(more),
        again=1 if case.check == "determinism" and not more else 0,
        wrt=tuple(name for name in differentiable if name in call.inputs) if backward else (),
        decoy=sampled and case.check != "refusal",
        thorough=sampled,
    )


def _real(interface: Interface, name: str) -> bool:
    face = interface.inputs.get(name)
    return face is None or face.kind == "real"
