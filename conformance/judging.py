"""From an observation to a result: which status a case gets, and the one line that says why.

Values are judged by the suite's tolerance; everything else that makes a candidate wrong is decided here: it
raised or crashed, it wrote where it must not, it returned its input, it called the oracle, its function never
ran.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.suite import Suite
from attnspec.conformance.types import CandidateSignature, Case, CaseResult, Observation, OutputEvidence

PLAIN = {"contiguous", "the runtime's own"}


def conclude(
    suite: Suite, case: Case, expected: Any, observation: Observation, signature: CandidateSignature
) -> CaseResult:
    """The result of one case. `expected` is used only where the candidate returned something."""
    result = CaseResult(case, "error", seconds=observation.seconds, receipt=dict(observation.receipt))
    if observation.printed.strip():
        result.receipt["printed"] = observation.printed[-500:]
    if case.check == "refusal" and observation.status in ("returned", "refused", "error"):
        return _refusal(result, observation, signature)
    if observation.status == "refused":
        reason = observation.receipt.get("not_supported")
        result.status = "not_supported" if reason else "refused"
        result.message = str(reason or observation.message)
        return result
    faults = _faults(observation)
    if observation.status != "returned":
        result.status = observation.status
        result.message = "; ".join([observation.message, *faults])
        return result
    result.evidence = suite.judge(case, expected, observation)
    wrong = [entry for entry in result.evidence if not entry.passed]
    if not result.evidence:
        result.status, result.message = (
            "error",
            "nothing was judged: the oracle knows no output that was returned",
        )
    elif wrong or faults:
        result.status = "fail"
        result.message = "; ".join([*faults, *_hints(case, observation, wrong), *(map(_evidence, wrong[:2]))])
    else:
        result.status = "pass"
    return result


def _faults(observation: Observation) -> list[str]:
    """What is wrong whatever the values are."""
    lines = list(dict.fromkeys(observation.memory_faults))
    calls = observation.receipt.get("oracle_calls") or []
    if calls:
        lines.append(f"calls the oracle ({', '.join(calls[:2])}): the result is not the candidate's own")
    if observation.receipt.get("entered") == 0:
        lines.append("the candidate's function did not run")
    return lines


def _refusal(result: CaseResult, observation: Observation, signature: CandidateSignature) -> CaseResult:
    """Inputs that contradict each other must be refused, with whatever exception, unless the candidate declares that
    it does not check them."""
    unchecked = result.case.values == "bad_keys" and signature.declares.get("kv_lengths") == "unchecked"
    if unchecked and observation.status == "returned" and not _faults(observation):
        result.status = "not_supported"
        result.message = "kv_lengths: keys and values of different lengths are unchecked, as declared"
        return result
    if observation.status == "returned" or observation.outputs:
        result.status = "fail"
        result.message = "; ".join(["computes something for inputs that contradict each other", *_faults(observation)])
    else:
        result.status = "pass"
        result.message = f"refused: {observation.message}"
    return result


def _hints(case: Case, observation: Observation, wrong: list[OutputEvidence]) -> list[str]:
    """What explains wrong values without looking at the oracle."""
    if not wrong:
        return []
    lines = []
    if observation.receipt.get("stale"):
        lines.append(str(observation.receipt["stale"]))
    if observation.receipt.get("outside"):
        lines.append(str(observation.receipt["outside"]))
    absent = [
        name for name in observation.receipt.get("no_gradient", ()) if any(e.name in (name, f"d{name}") for e in wrong)
    ]
    if absent:
        lines.append(f"no gradient reaches {', '.join(absent)} (declare differentiable=... if that is intended)")
    if observation.receipt.get("layout"):
        lines.append(str(observation.receipt["layout"]))
    elif not lines and layouts(observation):
        lines.append(f"inputs are {', '.join(layouts(observation))} in memory")
    return lines


def layouts(observation: Observation) -> list[str]:
    """The memory layouts other than contiguous that inputs of this call had."""
    return sorted({str(layout) for layout in observation.receipt.get("layouts", {}).values()} - PLAIN)


def _evidence(entry: OutputEvidence) -> str:
    if entry.message:
        return f"{entry.name}: {entry.message}"
    where = ", ".join(str(part) for part in entry.worst_index)
    off = f"({entry.max_z:.3g} sigma)"
    return f"{entry.name}[{where}] is {entry.worst_got:.6g}, expected {entry.worst_want:.6g} {off}"


def has_stray_nan(observation: Observation) -> bool:
    """Whether NaN came back: worth a second call whose margins hold numbers instead of NaN."""
    arrays = [*observation.outputs.values(), *observation.gradients.values()]
    return any(array.dtype.kind == "f" and bool(np.isnan(array).any()) for array in arrays)


def reads_outside(first: Observation, second: Observation) -> bool:
    """Whether the results of two calls differ whose only difference is what lies around the inputs."""
    pairs = [(first.outputs, second.outputs), (first.gradients, second.gradients)]
    return second.status == "returned" and any(
        name in two and not np.array_equal(array, two[name], equal_nan=True)
        for one, two in pairs
        for name, array in one.items()
    )
