"""Explaining a report's failures while the candidate is still loaded: shrink, locate, guess.

`explain` is what the runner calls after a run that failed. It picks failures that differ from each other, finds the
smallest failing case of each, and writes the diagnosis into the results. It keeps to its budget and never makes a
report worse: a failure that cannot be explained keeps its figures.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance import semantics
from attnspec.conformance.case_id import parse
from attnspec.conformance.causes import Observed
from attnspec.conformance.diagnose import assemble, diagnose
from attnspec.conformance.outcome import failures
from attnspec.conformance.regions import Region
from attnspec.conformance.session import Examination, Session
from attnspec.conformance.shrink import shrink
from attnspec.conformance.types import Case, CaseData, CaseResult, OutputEvidence, Report
from attnspec.conformance.verdict import widened
from attnspec.spec import SpecError, load

EXPLAINED = 6
"""Failures that are explained; the others of a run are most often the same ones again."""
BUDGET = 40.0
"""Seconds for all explanations of a run."""
SHRINK_SECONDS = 5.0
CAUSE_SECONDS = 4.0
SLOW_START = ("crash", "timeout")
"""Every attempt at these costs a new process, so they are not shrunk."""


def explain(session: Session, report: Report, *, budget_seconds: float = BUDGET) -> None:
    """Fill in `diagnosis` for failures that differ from each other."""
    deadline = time.monotonic() + budget_seconds
    for result in chosen(failures(report)):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if result.status == "fail":
            result.diagnosis = explain_failure(session, result, left)
        elif result.status == "error":
            smallest = _smallest(session, result, min(SHRINK_SECONDS, left))
            if smallest is not None:
                result.diagnosis = {"smallest": smallest.id}


def chosen(failed: list[CaseResult]) -> list[CaseResult]:
    """A few failures: of each kind of case one, small ones first, forward before backward."""

    def size(result: CaseResult) -> tuple[bool, int, str]:
        volume = math.prod(max(value, 1) for value in result.case.sizes.values())
        return result.case.direction == "backward", volume, result.case.id

    ordered = sorted((result for result in failed if result.status != "xpass"), key=size)
    kinds: dict[tuple[str, ...], list[CaseResult]] = {}
    for result in ordered:
        case = result.case
        kinds.setdefault((case.direction, case.check, result.status, case.group), []).append(result)
    queues = [members for _, members in sorted(kinds.items(), key=lambda item: size(item[1][0]))]
    picked: list[CaseResult] = []
    while queues and len(picked) < EXPLAINED:
        picked += [members.pop(0) for members in queues][: EXPLAINED - len(picked)]
        queues = [members for members in queues if members]
    return picked


def explain_failure(session: Session, result: CaseResult, budget_seconds: float) -> dict[str, Any]:
    """The diagnosis of one failing case."""
    began = time.monotonic()
    original = session.examine(result.case)
    if original.result.status != "fail":
        return {
            "sentence": f"did not fail again: {original.result.status} when run once more",
            "region": Region("repeat", "only sometimes: it did not fail when run once more").as_dict(),
        }
    special = _special(original)
    if special is not None:
        smallest = _smallest(session, result, min(SHRINK_SECONDS, budget_seconds))
        return {**special, **({"smallest": smallest.id} if smallest is not None else {})}
    smallest = _smallest(session, result, min(SHRINK_SECONDS, budget_seconds / 2))
    small = session.examine(smallest) if smallest is not None else original
    if small.result.status != "fail":
        small = original
    told: dict[str, Any] = {}
    difference = _difference(session, small, original)
    examinations = [original] if small is original else [original, small]
    for examination in examinations:
        left = budget_seconds - (time.monotonic() - began)
        seconds = 0.0 if difference is not None else max(min(CAUSE_SECONDS, left), 0.1)
        told = _merged(told, _diagnosis(session, examination, original, seconds))
    if difference is not None:
        told = _merged(told, {"cause": difference})
    if small is not original:
        told["smallest"] = small.case.id
    return told


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The region of the original case, unless only the smaller one has a structure; the cause of the smaller one."""
    region = first.get("region") or second.get("region")
    closer = second.get("region")
    if region and region["kind"] == "everything" and closer and closer["kind"] in ("diagonal", "block", "head"):
        region = closer
    cause = second.get("cause") or first.get("cause")
    told = {name: part for name, part in (("region", region), ("cause", cause)) if part}
    sentences = [part["sentence"] for part in told.values()]
    return {**told, "sentence": "; ".join(sentences)} if sentences else told


def _difference(session: Session, small: Examination, original: Examination) -> dict[str, Any] | None:
    """The named semantics with which both cases would pass: a declaration is missing, and nothing is wrong."""
    table = semantics.table_for(session.suite.mechanism)
    choices = [(name, value) for name, entry in table.items() for value in entry.values]
    # What promises less comes last: another convention explains more than a row that is not judged.
    for name, value in sorted(choices, key=lambda choice: choice[1] in ("undefined", "none", "rounding", "unchecked")):
        if semantics.declared(session.signature.declares, name) == value:
            continue
        if all(_passes(session, case, name, value) for case in dict.fromkeys((small.case.id, original.case.id))):
            return {
                "variant": f"{name}={value}",
                "sentence": f"passes once it declares {name} = {value!r} ({table[name].doc})",
                "others": [],
            }
    return None


def _passes(session: Session, case_id: str, name: str, value: str) -> bool:
    stated = session.signature
    session.signature = dataclasses.replace(stated, declares={**stated.declares, name: value})
    try:
        return session.judge(parse(case_id)).status == "pass"
    except Exception:
        # A declaration that does not fit the case at all is no explanation.
        return False
    finally:
        session.signature = stated


def _diagnosis(session: Session, seen: Examination, original: Examination, budget_seconds: float) -> dict[str, Any]:
    wrong = observe(seen)
    if wrong is None:
        return {}
    case, data, observed = wrong
    try:
        return diagnose(
            session.suite.mechanism,
            case,
            data,
            observed,
            call=_call(session, seen),
            budget_seconds=budget_seconds,
            confirm=observe(original) if seen is not original else None,
        )
    except SpecError:
        # The equations cannot be evaluated on arrays made up for the diagnosis; the verdict stands without it.
        return {}


def observe(seen: Examination) -> tuple[Case, CaseData, Observed] | None:
    """What came and what was wanted, of everything that was judged; None where shapes do not fit.

    Where only a further call of the case is wrong, it is that call's arrays, and a case with that call's options.
    """
    backward = seen.case.direction == "backward"
    number = _later_call(seen)
    case, expected, data = seen.case, seen.expected, seen.data
    returned: Mapping[str, Any] = seen.observation.gradients if backward else seen.observation.outputs
    if number is not None:
        expected = seen.expected.calls[number - 2]
        returned = seen.observation.repeats[number - 2]["gradients" if backward else "outputs"]
        data = seen.data.extra["calls"][number - 2]
        case = dataclasses.replace(case, options=dict(data.options), rows=None)
    if semantics.differences(expected.declares):
        both = semantics.from_candidate(
            load(seen.case.mechanism),
            data,
            {} if backward else returned,
            returned if backward else {},
            expected.declares,
        )
        returned = both[backward]
    got, want, spread = {}, {}, {}
    for name, exact in expected.exact.items():
        if name not in returned:
            continue
        label = f"d{name}" if backward else name
        array = np.asarray(returned[name], dtype=np.float64)
        axis = expected.row_axis.get(name)
        if expected.rows is not None and axis is not None:
            array = np.take(array, list(expected.rows), axis=axis)
        if array.shape != exact.shape:
            return None
        judged = expected.judged.get(name)
        got[label] = array if judged is None else np.where(judged, array, exact)
        want[label] = np.asarray(exact, dtype=np.float64)
        spread[label] = widened(
            expected.sigma[name], want[label], got[label], seen.case.dtype,
            "" if backward else str(seen.observation.receipt.get("dtypes", {}).get(name, "")),
            backward or name == next(iter(expected.exact)),
        )  # fmt: skip
    return (case, data, Observed(got, want, spread, _limit(seen.result.evidence))) if got else None


def _later_call(seen: Examination) -> int | None:
    """The number of the further call that is wrong, where the first one is right."""
    wrong = [entry.name for entry in seen.result.evidence if not entry.passed]
    numbers = [re.search(r"\(call (\d+)\)", name) for name in wrong]
    found = [int(match.group(1)) for match in numbers if match]
    return min(found) if found and len(found) == len(wrong) else None


def _limit(evidence: list[OutputEvidence]) -> float:
    limits = [entry.max_limit for entry in evidence if math.isfinite(entry.max_limit) and entry.max_limit > 0]
    return max(limits, default=8.0)


def _call(session: Session, seen: Examination) -> Any:
    """Runs the candidate on other arrays of the same case; gives its outputs."""
    case = dataclasses.replace(seen.case, direction="forward", layout="contiguous", check="tolerance", params={})

    def call(data: CaseData) -> Mapping[str, Any]:
        outputs = session.ask(case, data).outputs
        declares = session.signature.declares
        if outputs and semantics.differences(declares):
            outputs = semantics.from_candidate(session.suite.mechanism, data, outputs, {}, declares)[0]
        return outputs

    return call


def _special(seen: Examination) -> dict[str, Any] | None:
    """Failures that are not about values: memory, and calls that do not repeat."""
    faults = list(dict.fromkeys(seen.observation.memory_faults))
    wrong = [entry for entry in seen.result.evidence if not entry.passed]
    if faults and not wrong:
        return assemble(Region("memory", faults[0]), None)
    if wrong and all("returned other bits" in entry.message for entry in wrong):
        return assemble(Region("repeat", f"{wrong[0].name}: {wrong[0].message}"), None)
    if seen.observation.receipt.get("stale"):
        return assemble(Region("repeat", str(seen.observation.receipt["stale"])), None)
    if seen.observation.receipt.get("outside"):
        return assemble(Region("memory", str(seen.observation.receipt["outside"])), None)
    return None


def _smallest(session: Session, result: CaseResult, budget_seconds: float) -> Case | None:
    """The smallest case that fails in the same way; None where the case itself is the smallest."""
    if result.status in SLOW_START:
        return None

    def still_fails(case: Case) -> bool:
        try:
            got = session.judge(case)
        except Exception:
            # Shrinking makes up cases; one that cannot be built or evaluated, in whatever way, is no witness.
            return False
        if got.status != result.status:
            return False
        if result.status == "error":
            return _kind(got.message) == _kind(result.message)
        # A wrong LSE alone is another failure than a wrong output: what was wrong must stay wrong.
        return _wrong_outputs(result) <= _wrong_outputs(got)

    smallest = shrink(result.case, still_fails, budget_seconds)
    return smallest if smallest.id != result.case.id else None


def _wrong_outputs(result: CaseResult) -> set[str]:
    names = [entry.name for entry in result.evidence if not entry.passed]
    return {name for name in names if name == names[0] or result.case.direction == "backward"}


def _kind(message: str) -> str:
    """The message without its numbers: sizes change while shrinking, the complaint must not."""
    return re.sub(r"[\d., ]+", "#", message.partition(" (")[0])
