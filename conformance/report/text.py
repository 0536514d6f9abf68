"""Sentences that several reports share: how a failure, the tolerance and a command read.

Used by the terminal, Markdown and JUnit reports and by the pytest plugin, so that a failure is told once. Each
function takes data of `types` and returns plain text; none prints.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from attnspec.conformance.types import CaseResult, OutputEvidence, Report


def figure(value: float) -> str:
    """A number for people: three or four digits, no exponent where none is needed."""
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def repeat_command(case: str, report: Report) -> str:
    """The command line that runs this case again against the same candidate."""
    words = ["attnspec", "repro", case, "--candidate", report.candidate]
    device = report.environment.get("device")
    if isinstance(device, str) and device.partition(":")[0] not in ("", "cpu"):
        words += ["--device", device.partition(":")[0]]
    return shlex.join(words)


def worst(evidence: Sequence[OutputEvidence]) -> OutputEvidence | None:
    """The evidence that is furthest over its limits; None where nothing was measured."""
    return max(evidence, key=ratio, default=None)


def ratio(evidence: OutputEvidence) -> float:
    """How far beyond the tolerance: the larger of both figures over their limits (infinite for NaN)."""
    ratios = [
        value / limit if limit else (0.0 if value == 0 else math.inf)
        for value, limit in ((evidence.max_z, evidence.max_limit), (evidence.rms_z, evidence.rms_limit))
    ]
    largest = math.inf if any(math.isnan(value) for value in ratios) else max(ratios)
    return math.inf if not evidence.passed and largest <= 1 and evidence.message else largest


def element(evidence: OutputEvidence, axes: Mapping[str, Sequence[str]] | None = None) -> str:
    """`O[b=0,h=1,i=64,e=3]`, or `O[0,1,64,3]` without the names of the axes."""
    names = (axes or {}).get(evidence.name, ())
    if len(names) == len(evidence.worst_index):
        inner = ",".join(f"{name}={place}" for name, place in zip(names, evidence.worst_index, strict=True))
    else:
        inner = ",".join(str(place) for place in evidence.worst_index)
    return f"{evidence.name}[{inner}]" if inner else evidence.name


def evidence_line(evidence: OutputEvidence, axes: Mapping[str, Sequence[str]] | None = None) -> str:
    """One line on one output: the worst element, and both figures with their limits."""
    if evidence.message and not evidence.passed and not evidence.worst_index:
        return f"{evidence.name}: {evidence.message}"
    line = (
        f"{element(evidence, axes)} is {figure(evidence.worst_got)}, expected {figure(evidence.worst_want)}: "
        f"|z| {figure(evidence.max_z)} (limit {figure(evidence.max_limit)}), "
        f"rms z {figure(evidence.rms_z)} (limit {figure(evidence.rms_limit)}) over {evidence.elements} elements"
    )
    repeated = evidence.message.startswith(("largest |z|", "RMS of z is"))
    return line if repeated or not evidence.message else f"{line}; {evidence.message}"


def explanation(
    result: CaseResult, report: Report, axes: Mapping[str, Sequence[str]] | None = None
) -> list[tuple[str, str]]:
    """A failure as (label, text) pairs: got, where, smallest, cause, repeat. Absent knowledge has no line."""
    lines: list[tuple[str, str]] = []
    wrong = [evidence for evidence in result.evidence if not evidence.passed]
    message = _beside(result.message, result.evidence)
    if message:
        lines.append((_LABEL.get(result.status, "what"), message))
    if result.status != "xpass":
        lines += [("got", evidence_line(evidence, axes)) for evidence in sorted(wrong, key=ratio, reverse=True)[:3]]
        top = worst(wrong)
        if top is not None and math.isfinite(ratio(top)):
            lines.append(("ratio", f"{figure(ratio(top))} times the tolerance"))
    diagnosis = result.diagnosis
    region = diagnosis.get("region")
    if isinstance(region, Mapping) and region.get("sentence"):
        lines.append(("where", str(region["sentence"])))
    cause = diagnosis.get("cause")
    if isinstance(cause, Mapping) and cause.get("sentence"):
        lines.append(("cause", str(cause["sentence"])))
    smallest = diagnosis.get("smallest")
    if smallest and smallest != result.case.id:
        lines.append(("smallest", str(smallest)))
    lines.append(("repeat", repeat_command(str(smallest or result.case.id), report)))
    return lines


def _beside(message: str, evidence: Sequence[OutputEvidence]) -> str:
    """What a message says beside the figures, which have lines of their own."""
    names = tuple(entry.name for entry in evidence)
    parts = [part.strip() for part in message.split("; ")]
    told = [entry.message for entry in evidence if entry.message]
    return "; ".join(
        part
        for part in parts
        if part and not (part.startswith(names) and (part.endswith("sigma)") or any(part.endswith(t) for t in told)))
    )


_LABEL = {"error": "raised", "crash": "crashed", "timeout": "hung", "xpass": "passed"}


def tolerance_lines(report: Report) -> list[tuple[str, str]]:
    """The rounding model and the limits, with the figures of this run that stand against them."""
    lines: list[tuple[str, str]] = []
    model = dict(report.rounding)
    if model:
        lines.append(("rounding", _model(model)))
    measured = [
        (evidence, result)
        for result in report.results
        if result.status == "pass"
        for evidence in result.evidence
        if evidence.elements and evidence.max_limit > 0
    ]
    if measured:
        rms, rms_case = max(measured, key=lambda pair: _over(pair[0].rms_z, pair[0].rms_limit))
        top, top_case = max(measured, key=lambda pair: _over(pair[0].max_z, pair[0].max_limit))
        total = sum(evidence.elements for evidence, _ in measured)
        lines.append(
            (
                "evidence",
                f"{total} elements passed; worst rms z {figure(rms.rms_z)} of {figure(rms.rms_limit)} "
                f"({rms_case.case.id}), worst |z| {figure(top.max_z)} of {figure(top.max_limit)} ({top_case.case.id})",
            )
        )
    either = sum(evidence.either_choice_rows for evidence, _ in measured)
    if either:
        lines.append(("either", f"{either} rows whose selection is closer than the noise: either choice was accepted"))
    return lines


def _model(model: dict[str, Any]) -> str:
    name, stored, doc = model.pop("name", ""), model.pop("stored", None), model.pop("doc", "")
    parts = [f"model {name}" if name else "", f"may round {_told(stored)} to the input's dtype" if stored else "", doc]
    parts += [f"{key.replace('_', ' ')} {_told(value)}" for key, value in model.items()]
    return "; ".join(str(part) for part in parts if part)


def _over(value: float, limit: float) -> float:
    return value / limit if limit else 0.0


def _told(value: Any) -> str:
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(sorted(str(entry) for entry in value)) or "nothing"
    return str(value)
