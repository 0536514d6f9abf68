"""What every mechanism must show, without naming one: two readings agree, gradients agree, official numbers come out.

A mechanism is found by its files; a new one is tested here without an edit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.property_tests.random_calls import cotangents, random_call
from attnspec.spec import SpecError, load, mechanisms
from attnspec.spec.mechanism import Mechanism
from attnspec.tests.official import Case, arranged, cases
from attnspec.tests.test_reference import gap

CALLS = 25
LIMIT = 1e-11
NAMES = mechanisms()
FORMS = [(name, form) for name in mechanisms() for form in load(name).forms]


def compare(got: dict[str, Any], want: dict[str, Any], limit: float = LIMIT) -> None:
    assert set(want) <= set(got)
    for name, value in want.items():
        assert gap(got[name], value) < limit, name


@pytest.mark.parametrize("name", NAMES)
def test_equations_and_reference_agree(name: str) -> None:
    mechanism = load(name)
    forward, _ = reference.find(name)
    for seed in range(CALLS):
        inputs, options = random_call(mechanism, seed)
        want = mechanism.evaluate(inputs, options)
        got = forward(**inputs, **options)
        assert set(got) == set(want)
        compare(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_random_calls_use_every_input_and_option(name: str) -> None:
    mechanism = load(name)
    seen: set[str] = set()
    for seed in range(CALLS):
        inputs, options = random_call(mechanism, seed)
        seen |= {*inputs, *options}
    assert seen == {*mechanism.inputs, *mechanism.options}


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).gradient])
def test_backward_equations_autograd_and_reference_agree(name: str) -> None:
    pytest.importorskip("torch")
    mechanism = load(name)
    _, backward = reference.find(name)
    for seed in range(CALLS):
        inputs, options = random_call(mechanism, seed)
        if not set(mechanism.usual) <= set(inputs):
            continue  # what stands in for the usual inputs, such as pages, has no gradient
        weights = cotangents(mechanism, mechanism.evaluate(inputs, options), seed)
        want = mechanism.gradients(inputs, options, weights)
        compare(mechanism.gradients(inputs, options, weights, method="autograd"), want)
        if backward is not None:
            compare(backward(**{f"d{key}": value for key, value in weights.items()}, **inputs, **options), want)


def slope(mechanism: Mechanism, inputs: dict[str, Any], options: dict[str, Any], weights: dict[str, Any],
          name: str, step: Any) -> float:  # fmt: skip
    """Central difference of the weighted sum of all outputs along a direction."""

    def loss(sign: float) -> float:
        got = mechanism.evaluate({**inputs, name: inputs[name] + sign * step}, options)
        return sum(float(np.sum(np.where(np.isfinite(got[key]), got[key], 0.0) * w)) for key, w in weights.items())

    return (loss(1.0) - loss(-1.0)) / 2


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).differentiable])
def test_autograd_agrees_with_finite_differences(name: str) -> None:
    pytest.importorskip("torch")
    mechanism = load(name)
    for seed in range(5):
        inputs, options = random_call(mechanism, seed, empty=False)
        weights = cotangents(mechanism, mechanism.evaluate(inputs, options), seed)
        gradients = mechanism.gradients(inputs, options, weights, method="autograd")
        rng = np.random.default_rng(seed)
        for key, gradient in gradients.items():
            direction = rng.normal(size=np.shape(inputs[key]))
            measured = slope(mechanism, inputs, options, weights, key, 1e-6 * direction) / 1e-6
            scale = 1.0 + float(np.abs(gradient * direction).sum())
            assert abs(float(np.sum(gradient * direction)) - measured) < 1e-6 * scale, key


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_form_equals_the_equations(name: str, form: str) -> None:
    mechanism = load(name)
    for seed in range(CALLS):
        inputs, options = random_call(mechanism, seed)
        compare(mechanism.evaluate(inputs, options, form=form), mechanism.evaluate(inputs, options))


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in FORMS if form in load(name).form_gradients])
def test_the_gradients_of_a_form_equal_those_of_the_equations(name: str, form: str) -> None:
    mechanism = load(name)
    for seed in range(CALLS):
        inputs, options = random_call(mechanism, seed)
        weights = cotangents(mechanism, mechanism.evaluate(inputs, options), seed)
        want = mechanism.gradients(inputs, options, weights)
        compare(mechanism.gradients(inputs, options, weights, form=form), want, 1e-10)


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.mechanism}-{case.name}")
def test_official_numbers_come_out(case: Case) -> None:
    mechanism = load(case.mechanism)
    forward, backward = reference.find(case.mechanism)
    inputs, options = dict(case.inputs), dict(case.options)
    compare(mechanism.evaluate(inputs, options, outputs=list(case.outputs)), dict(case.outputs), case.tolerance)
    compare(forward(**inputs, **options), dict(case.outputs), case.tolerance)
    if case.gradients:
        weights, wrt = dict(case.cotangents), list(case.gradients)
        if mechanism.gradient is not None:
            compare(mechanism.gradients(inputs, options, weights, wrt=wrt), dict(case.gradients), case.tolerance)
        got = mechanism.gradients(inputs, options, weights, wrt=wrt, method="autograd")
        compare(got, dict(case.gradients), case.tolerance)
        if backward is not None:
            given = {f"d{key}": value for key, value in weights.items()}
            compare(backward(**given, **inputs, **options), dict(case.gradients), case.tolerance)


def test_an_arrangement_moves_inserts_and_drops_axes() -> None:
    array = np.arange(6).reshape(2, 1, 3)
    assert arranged({"x": array}, "x : a 1 b -> 1 b a").shape == (1, 3, 2)
    with pytest.raises(ValueError, match="3 axes"):
        arranged({"x": array}, "x : a b -> b a")


@pytest.mark.parametrize("name", mechanisms())
def test_data_outside_a_domain_are_refused(name: str) -> None:
    from attnspec.spec.domains import domain

    mechanism = load(name)
    inputs, options = random_call(mechanism, 1, empty=False)
    for key, value in inputs.items():
        found = domain(mechanism.inputs[key])
        if found is None or not np.size(value):
            continue
        beyond = np.array(value)
        beyond.flat[0] = -(10**6) if found.low is not None else 10**6
        with pytest.raises(SpecError, match=f"'{key}' holds"):
            mechanism.evaluate({**inputs, key: beyond}, options)
