"""Check one trial of a law on one implementation."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.property_tests.implementations import Implementation
from attnspec.spec.laws import Trial, Violation


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
