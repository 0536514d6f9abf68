"""The door to the cases: `cases_for` lists them, `case_from_id` reads one back, `renamed` and `build` complete it.

`cases_for` is driven by what the mechanism's file declares and by what the candidate takes (`plan`); nothing goes by a
mechanism's name. What a candidate does not take is left out (the runner lists it).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from attnspec.conformance.case_id import CaseError, parse, renamed
from attnspec.conformance.data import build
from attnspec.conformance.plan import FAR, Plan
from attnspec.conformance.types import CandidateSignature, Case, Direction, Level
from attnspec.spec.mechanism import Mechanism


def cases_for(
    mechanism: Mechanism,
    level: Level = "standard",
    dtypes: Sequence[str] = ("fp32",),
    direction: Direction | Sequence[Direction] = "forward",
    seed: int = 0,
    supported: Collection[str] | CandidateSignature | None = None,
) -> list[Case]:
    """The cases of a level, in a fixed order: dtype by dtype, what is basic first.

    Args:
        direction: "forward", "backward", or both in order.
        seed: of the random values; every seed has the same cases with other values.
        supported: the inputs and options that the candidate takes, or its signature; None: all.
    """
    taken, required = _taken(mechanism, supported)
    signature = supported if isinstance(supported, CandidateSignature) else None
    directions = (direction,) if isinstance(direction, str) else tuple(direction)
    found: dict[str, Case] = {}
    for way in directions:
        for dtype in dtypes:
            plan = Plan(mechanism, level, dtype, way, seed, taken, required)
            plan.forward() if way == "forward" else plan.backward()
            found.update((case.id, case) for case in plan.cases if _posable(mechanism, signature, case))
    return list(found.values())


def _posable(mechanism: Mechanism, signature: CandidateSignature | None, case: Case) -> bool:
    """Whether what the candidate states about itself leaves the case a meaning."""
    if signature is None:
        return True
    if case.group.endswith("_all"):
        # Cotangents for every output are for candidates that return every output.
        return signature.outputs is None or set(mechanism.outputs) <= set(signature.outputs)
    if case.group == FAR:
        return (signature.rounding or mechanism.default_rounding).partition("+")[0] == mechanism.default_rounding
    return True


def case_from_id(identifier: str, mechanism: Mechanism | None = None) -> Case:
    """The case behind an id.

    Raises:
        CaseError: the text is no id of a case.
        SpecError: no such mechanism.
    """
    return parse(identifier, mechanism)


def _taken(
    mechanism: Mechanism, supported: Collection[str] | CandidateSignature | None
) -> tuple[frozenset[str], tuple[str, ...]]:
    if supported is None:
        return frozenset({*mechanism.inputs, *mechanism.options}), ()
    if isinstance(supported, CandidateSignature):
        names = supported.inputs | supported.options
        return names, tuple(name for name in mechanism.inputs if name in supported.required)
    return frozenset(supported), ()


__all__ = ["CaseError", "build", "case_from_id", "cases_for", "renamed"]
