"""The judge's side of a run as one object: cases, their data, what is expected, and the judgement.

`Suite` bundles the stations `cases`, `oracle` and `verdict` for one mechanism, so that the runner, the oracle
processes and tests speak to one thing. It is sent to oracle processes by the mechanism's name and loads
there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.interface import Interface
from attnspec.conformance.types import (
    CandidateSignature,
    Case,
    CaseData,
    Direction,
    Level,
    Observation,
    OutputEvidence,
)


class Suite:
    """Cases and oracle of one mechanism.

    Raises:
        SpecError: no such mechanism, or a malformed file.
    """

    def __init__(self, mechanism: str) -> None:
        self.name = mechanism
        self.interface = Interface.of(self.mechanism)

    def __reduce__(self) -> tuple[Any, ...]:
        return Suite, (self.name,)

    @functools.cached_property
    def mechanism(self) -> Any:
        from attnspec.spec import load

        return load(self.name)

    def cases(
        self,
        level: Level,
        dtypes: Sequence[str],
        direction: Direction,
        seed: int,
        signature: CandidateSignature,
    ) -> list[Case]:
        """The cases of a level for what the candidate takes, in a fixed order."""
        from attnspec.conformance.cases import cases_for

        return list(cases_for(self.mechanism, level, dtypes, direction, seed, signature))

    def build(self, case: Case, signature: CandidateSignature | None = None) -> CaseData:
        """The arrays of a case, in the mechanism's conventions; `extra["calls"]` holds those of further
        calls."""
        from attnspec.conformance.data import build

        declares = None if signature is None else signature.declares
        return build(case, declares, mechanism=self.mechanism)

    def check(self, signature: CandidateSignature) -> None:
        """Refuse declarations that are unknown or say nothing about this mechanism.

        Raises:
            CandidateError: the message names the declaration and what is legal.
        """
        from attnspec.conformance import semantics
        from attnspec.conformance.oracle import rounding_model

        try:
            semantics.check(self.mechanism, signature.declares)
            rounding_model(self.mechanism, "fp32", signature.rounding)
        except ValueError as error:
            raise CandidateError(f"{signature.name}: {error}") from None

    def to_candidate(self, data: CaseData, signature: CandidateSignature) -> CaseData:
        """The data in the conventions that the candidate declares."""
        from attnspec.conformance import semantics

        return semantics.to_candidate(self.mechanism, data, signature.declares)

    def frame(self, case: Case, data: CaseData) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """Every option with its default, and the outputs' shapes with the batch axes first."""
        from attnspec.conformance.data import output_shapes, resolved_options

        if "resolved" in data.extra:
            return data.extra["resolved"], data.extra["shapes"]
        return resolved_options(self.mechanism, data, None), output_shapes(self.mechanism, data)

    def expected(self, case: Case, data: CaseData, signature: CandidateSignature) -> Any:
        """The oracle's outputs with the spread that honest rounding gives them."""
        from attnspec.conformance.oracle import expected

        return expected(
            case, data, signature.declares, signature.rounding, mechanism=self.mechanism, form=signature.form
        )

    def stripped(self, expected: Any) -> Any:
        """What was expected without the inputs, to travel between processes; `restored` puts them back."""
        from attnspec.conformance.oracle import without_data

        return without_data(expected)

    def restored(self, expected: Any, data: CaseData) -> Any:
        """The other half of `stripped`."""
        expected.data = data
        for call, arrays in zip(expected.calls, data.extra.get("calls", ()), strict=True):
            call.data = arrays
        return expected

    def rounding(self, signature: CandidateSignature) -> dict[str, Any]:
        """The rounding model that the candidate is judged by."""
        from attnspec.conformance.oracle import rounding_model

        model = rounding_model(self.mechanism, "fp32", signature.rounding)
        entry = self.mechanism.rounding(model.name.partition("+")[0])
        return {"name": model.name, "stored": sorted(entry.stored), "product": model.product, "doc": entry.doc}

    def judge(self, case: Case, expected: Any, observation: Observation) -> list[OutputEvidence]:
        """Judge what the candidate returned."""
        from attnspec.conformance.verdict import judge_observation

        return judge_observation(case, expected, observation)
