"""Where an expression of an equation is evaluated: the values of its indices and the conditions around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnspec.spec.language.named import Named
from attnspec.spec.language.syntax import Scan

Domain = tuple[int, ...] | None


@dataclass(frozen=True)
class Step:
    """One step of a recurrence: values of this step so far, values of the step before, and what `t` may become."""

    scan: Scan
    now: Mapping[str, Named]
    before: Mapping[str, Named]
    reach: Domain


@dataclass(frozen=True)
class Scope:
    """Where an expression is evaluated: domains of the bound indices (a number inside a recurrence step),
    conditions around it, and the step of the recurrence it belongs to."""

    domains: Mapping[str, Domain | int]
    guards: tuple[Named, ...] = ()
    step: Step | None = None

    @property
    def restricted(self) -> bool:
        return self.step is None and any(domain is not None for domain in self.domains.values())
