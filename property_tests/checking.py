"""Check one trial of a law on one implementation."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.property_tests.implementations import Implementation
from attnspec.spec.laws import Law, Trial, Violation
from attnspec.spec.mechanism import Mechanism, load


def unreturned(mechanism: Mechanism, law: Law, implementation: Implementation) -> list[str]:
    """Outputs that the law speaks of, of either call, and the implementation does not return: then it cannot be asked.

    Those of another mechanism's call carry the trailing underscore that they have in the law.
    """
    first = [name for name in mechanism.outputs if name not in implementation.outputs]
    lacking = [name for name in first if law.speaks_of(name) or (not law.mechanism and law.speaks_of(f"{name}_"))]
    if law.mechanism:
        target = load(law.mechanism)
        returned = implementation.on(target).outputs
        lacking += [f"{name}_" for name in target.outputs if name not in returned and law.speaks_of(f"{name}_")]
    return lacking


def asks(mechanism: Mechanism, law: Law) -> bool:
    """Whether the law speaks of outputs or gradients of a call, and not of definitions alone."""
    second = load(law.mechanism) if law.mechanism else mechanism
    spoken = [*mechanism.outputs, *(f"{name}_" for name in second.outputs)]
    return bool(law.cotangents) or any(law.speaks_of(name) for name in spoken)


def violation(trial: Trial, implementation: Implementation) -> Violation | None:
    """The first place where the law does not hold for this implementation, or None.

    Laws send NaN and infinities through on purpose, so that NumPy's warnings about them are no news.
    """
    with np.errstate(all="ignore"):
        return _violation(trial, implementation)


def _violation(trial: Trial, implementation: Implementation) -> Violation | None:
    law = trial.law
    first = implementation.forward(trial.inputs, trial.options)
    second: dict[str, Any] | None = None
    other_inputs: dict[str, Any] = {}
    gradients = None
    if law.two_calls:
        other_inputs, other_options = trial.second_call()
        other = implementation.on(trial.target) if law.mechanism else implementation
        second = other.forward(other_inputs, other_options)
    if law.cotangents:
        wrt = [name for name in trial.mechanism.differentiable if name in trial.inputs]
        gradients = implementation.backward(trial.inputs, trial.options, trial.cotangents, wrt)
    return trial.verdict(
        first, second, other_inputs=other_inputs, gradients=gradients, tolerance=implementation.tolerance
    )
