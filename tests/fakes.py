"""Cases, results and reports made by hand, for tests of what happens after the judging."""

from __future__ import annotations

from typing import Any

from attnspec.conformance import outcome
from attnspec.conformance.types import Case, CaseResult, OutputEvidence, Report


def case(name: str = "softmax_attention/edges/N5", **changes: Any) -> Case:
    """A small forward case."""
    fields: dict[str, Any] = {
        "id": name,
        "mechanism": "softmax_attention",
        "group": "edges",
        "level": "standard",
        "sizes": {"B": 1, "H": 2, "Hk": 2, "N": 5, "M": 5, "D": 4, "E": 4},
        "options": {},
        "inputs": (),
        "values": "normal",
        "layout": "contiguous",
        "dtype": "fp32",
        "direction": "forward",
        "check": "tolerance",
        "seed": 0,
    }
    return Case(**{**fields, **changes})


def evidence(passed: bool = True, **changes: Any) -> OutputEvidence:
    """Figures of one output, inside the limits or far outside."""
    fields: dict[str, Any] = {
        "name": "O",
        "passed": passed,
        "elements": 40,
        "rms_z": 0.9 if passed else 50.0,
        "max_z": 2.5 if passed else 412.7,
        "rms_limit": 2.5,
        "max_limit": 6.0,
        "worst_index": (0, 1, 4, 3),
        "worst_got": 1.0,
        "worst_want": 1.0 if passed else 0.5,
        "worst_sigma": 0.001,
    }
    return OutputEvidence(**{**fields, **changes})


def result(name: str = "softmax_attention/edges/N5", status: str = "pass", **changes: Any) -> CaseResult:
    """A result with the evidence that goes with its status."""
    made = CaseResult(case(name), "pass", seconds=0.01)
    made.status = status  # type: ignore[assignment]
    if status in ("pass", "fail", "xfail", "xpass"):
        made.evidence = [evidence(status in ("pass", "xpass"))]
    for field, value in changes.items():
        setattr(made, field, value)
    return made


def report(*results: CaseResult, **changes: Any) -> Report:
    """A concluded report of these results."""
    fields: dict[str, Any] = {
        "candidate": "my_kernels:attention",
        "mechanism": "softmax_attention",
        "level": "standard",
        "results": list(results),
        "declares": {},
        "not_supported": {},
        "environment": {"device": "cpu", "framework": "torch", "version": "2.13.0"},
        "seed": 0,
        "seconds": 1.5,
    }
    return outcome.conclude(Report(**{**fields, **changes}))
