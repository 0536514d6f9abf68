"""Planted kernels against the suite's own cases: is each rejected, and does the diagnosis say where it is wrong?

Every planted kernel runs in this process like a candidate, with the same guarded memory, receipts and judgement, until
a case rejects it. Its anchor is verified first: a kernel whose fault point is no longer passed, or whose witness no
longer tells it from the honest kernel, is an error and not a rejection. Used by `mutation` and the tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnspec.conformance import outcome
from attnspec.conformance.planted.registry import Faults, Planted
from attnspec.conformance.session import Examination, Session
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import CandidateSignature, Case, CaseData, Direction, Level

MECHANISM = "softmax_attention"
DTYPES = ("fp32", "fp16", "bf16")
EXPLAIN_SECONDS = 1.0
LARGE = 20_000
"""Product of a witness' sizes from which large cases come first."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class CachedSuite(Suite):
    """A suite that computes the data and the oracle of a case once for many candidates."""

    def __init__(self, mechanism: str) -> None:
        super().__init__(mechanism)
        self._built: dict[str, CaseData] = {}
        self._expectations: dict[tuple[str, str], Any] = {}

    def build(self, case: Case, signature: CandidateSignature | None = None) -> CaseData:
        if case.id not in self._built:
            self._built[case.id] = super().build(case, signature)
        return self._built[case.id]

    def expected(self, case: Case, data: CaseData, signature: CandidateSignature) -> Any:
        key = case.id, repr((sorted(signature.declares.items()), signature.rounding, signature.form))
        if key not in self._expectations or data is not self._built.get(case.id):
            self._expectations[key] = super().expected(case, data, signature)
        return self._expectations[key]


@dataclass(frozen=True)
class Rejection:
    """What became of a planted kernel. `status`: killed, survived, or error (its anchor does not hold).

    `region` is where the diagnosis of the killing case finds the error, `expected_region` where it was planted.
    """

    id: str
    description: str
    evidence: tuple[str, ...]
    status: str
    case: str = ""
    ratio: float = 0.0
    tried: int = 0
    expected_region: str = ""
    region: str = ""
    diagnosis: str = ""
    message: str = ""
    kind: str = "planted"


def run(entry: Planted, suite: Suite, cases: Sequence[Case]) -> Rejection:
    """Pose the cases, those closest to the kernel's witness first, until one rejects it."""
    from attnspec.conformance.planted.honest import plain
    from attnspec.conformance.planted.witness import anchor

    def told(status: str, **more: Any) -> Rejection:
        return Rejection(entry.name, entry.summary, entry.evidence, status, expected_region=entry.region, **more)

    problem = anchor(entry, plain)
    if problem is not None:
        return told("error", message=problem)
    function = entry.build(Faults({entry.name}))
    with Session(function, suite, isolated=False, oracles=0) as session:
        for tried, case in enumerate(ordered(entry, cases), 1):
            seen = session.examine(case)
            if seen.result.status in outcome.BROKEN:
                region, sentence = _region(session, seen)
                return told("killed", case=case.id, ratio=_ratio(seen), tried=tried, region=region,
                            diagnosis=sentence, message=seen.result.message[:300])
    return told("survived", tried=len(cases))


def standard(suite: Suite, level: Level = "standard", dtypes: Sequence[str] = DTYPES, seed: int = 0) -> list[Case]:
    """The cases of a level that a kernel with the full signature gets."""
    from attnspec.conformance.mechanical import everything

    signature = dataclasses.replace(everything(suite.interface, dtypes), framework="torch")
    return [case for direction in DIRECTIONS for case in suite.cases(level, dtypes, direction, seed, signature)]


def ordered(entry: Planted, cases: Sequence[Case]) -> list[Case]:
    """The cases, those that look like the kernel's witness first; large ones last."""
    witness = entry.witness
    wanted = {*witness.options, *witness.inputs}

    large = math.prod(witness.sizes.values()) > LARGE

    def distance(case: Case) -> tuple[bool, int, int, bool, bool, int]:
        given = {*case.options, *(name for name in case.inputs if name not in ("K", "V"))}
        volume = math.prod(max(1, size) for size in case.sizes.values())
        other_dtype = case.dtype != witness.dtype
        wrong_direction = (case.direction == "backward") != witness.backward
        # A case with a few rows and keys fails as well, but says less about where.
        tiny = min(case.sizes.get("N", 8), case.sizes.get("M", 8)) < 8
        other_values = (case.values == "normal") != (witness.values == "normal")
        return (wrong_direction, len(wanted - given), len(given - wanted), other_dtype or other_values, tiny,
                -volume if large else volume)

    return sorted(cases, key=distance)


def _ratio(seen: Examination) -> float:
    worst = 0.0
    for evidence in seen.result.evidence:
        if not evidence.passed and evidence.max_limit > 0:
            ratio = evidence.max_z / evidence.max_limit
            worst = max(worst, ratio if math.isfinite(ratio) else math.inf)
    return worst


def _region(session: Session, seen: Examination) -> tuple[str, str]:
    """Where the diagnosis finds the error, and its sentence."""
    from attnspec.conformance.explain import explain_failure

    if seen.result.status != "fail":
        return "", ""
    told = explain_failure(session, seen.result, EXPLAIN_SECONDS)
    return str(told.get("region", {}).get("kind", "")), str(told.get("sentence", ""))
