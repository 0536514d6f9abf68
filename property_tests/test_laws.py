"""Every invariant, identity and claim of every mechanism, on the equations, the reference and the kernels.

And the other way round: each law must notice the change of the equations that its `breaks` entry names, so that no law
is one that nothing can violate.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from attnspec.conformance.types import Unsupported
from attnspec.impls import written
from attnspec.property_tests import implementations
from attnspec.property_tests.checking import asks, unreturned, violation
from attnspec.property_tests.draw import trials
from attnspec.spec import load, mechanisms
from attnspec.spec.laws import Law, Trial, laws
from attnspec.spec.mechanism import Mechanism

EVERY = [(name, law) for name in mechanisms() for law in laws(load(name))]
HELD = [(name, law) for name, law in EVERY if not law.refuted]
LAWS = [pytest.param(name, law, id=f"{name}-{law.name}") for name, law in HELD]
# Definitions come from the equations, whoever computes the outputs: only what speaks of outputs asks others.
ASKING = [entry for entry, (name, law) in zip(LAWS, HELD) if asks(load(name), law)]
REFUTED = [pytest.param(name, law, id=f"{name}-{law.name}") for name, law in EVERY if law.refuted]
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def hold(
    mechanism: Mechanism,
    law: Law,
    implementation: implementations.Implementation,
    examples: int,
    phases: Sequence[Phase] = tuple(Phase),
) -> None:
    """Raise AssertionError with the smallest trial found that violates the law (any trial without shrinking).

    A kernel may refuse a call, or return fewer outputs than the mechanism has: a law all of whose calls it refuses, and
    one about what it does not return, is reported as skipped, with the reason.
    """
    lacking = unreturned(mechanism, law, implementation)
    if lacking:
        pytest.skip(f"not applicable: {implementation.name} does not return {', '.join(lacking)}")
    refusals: list[str] = []
    held = 0

    @seed(20260101)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=QUIET, phases=phases)
    @given(trial=trials(mechanism, law))
    def check(trial: Trial) -> None:
        nonlocal held
        try:
            found = violation(trial, implementation)
        except Unsupported as refusal:
            refusals.append(str(refusal))
            return
        assert found is None, str(found)
        held += 1

    check()
    if refusals and not held:
        pytest.skip(f"refused by the kernel: {refusals[0]}")


@pytest.mark.parametrize(("name", "law"), LAWS)
def test_the_law_holds_for_the_equations(name: str, law: Law) -> None:
    mechanism = load(name)
    hold(mechanism, law, implementations.spec(mechanism), 25)


@pytest.mark.parametrize(("name", "law"), ASKING)
def test_the_law_holds_for_the_reference(name: str, law: Law) -> None:
    mechanism = load(name)
    hold(mechanism, law, implementations.reference(mechanism), 15)


@pytest.mark.parametrize(("name", "law"), [entry for entry in ASKING if list(written(str(entry.values[0])))])
def test_the_law_holds_for_the_kernels(name: str, law: Law) -> None:
    pytest.importorskip("triton")
    mechanism = load(name)
    hold(mechanism, law, implementations.kernel(mechanism), 3)


def broken(mechanism: Mechanism, law: Law, change: tuple[str, str]) -> Mechanism:
    """The mechanism with one change in its equations' text."""
    from attnspec.spec.language import read

    old, new = change
    macros = tomllib.loads(mechanism.path.read_text(encoding="utf-8")).get("macros", "")
    programs: dict[str, Any] = {}
    for part in ("program", "gradient"):
        program = getattr(mechanism, part)
        if program is not None and old in program.text:
            text = program.text.replace(old, new)
            programs[part] = read(
                text, program.declarations, macros=macros, file=f"{mechanism.name} broken for {law.name}"
            )
    assert programs, f"{law.name}: {old!r} is not in the equations"
    return dataclasses.replace(mechanism, **programs)


def notices(mechanism: Mechanism, law: Law, change: tuple[str, str]) -> bool:
    """Whether some drawn trial shows that the changed equations violate the law.

    A law is stated about the right equations: its definitions come from there, the outputs from the wrong ones, unless
    it speaks of definitions alone.
    """
    wrong_mechanism = broken(mechanism, law, change)
    wrong = implementations.spec(wrong_mechanism)
    caught = False

    @seed(7)
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=QUIET, phases=[Phase.generate])
    @given(trial=trials(mechanism, law))
    def check(trial: Trial) -> None:
        nonlocal caught
        if not caught:
            judged = dataclasses.replace(trial, mechanism=wrong_mechanism) if not asks(mechanism, law) else trial
            caught = violation(judged, wrong) is not None

    check()
    return caught


@pytest.mark.parametrize(("name", "law"), LAWS)
def test_the_law_rejects_a_wrong_variant(name: str, law: Law) -> None:
    assert law.breaks, f"{law.name} names no change that it must notice"
    for change in law.breaks:
        assert notices(load(name), law, change), f"{law.name} does not notice {change[0]!r} -> {change[1]!r}"


@pytest.mark.parametrize(("name", "law"), REFUTED)
def test_a_refuted_claim_has_a_counterexample(name: str, law: Law) -> None:
    mechanism = load(name)
    with pytest.raises(AssertionError, match=law.name):
        hold(mechanism, law, implementations.spec(mechanism), 40, phases=[Phase.generate])
