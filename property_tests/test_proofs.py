"""The identities that ask for a proof are proved, and the prover refutes their wrong variants."""

from __future__ import annotations

import pytest

from attnspec.property_tests.proofs import prove
from attnspec.property_tests.test_laws import broken
from attnspec.spec import load, mechanisms
from attnspec.spec.language.prove import Counterexample
from attnspec.spec.laws import Law, laws

PROVED = [
    pytest.param(name, law, id=f"{name}-{law.name}") for name in mechanisms() for law in laws(load(name)) if law.prove
]


@pytest.mark.parametrize(("name", "law"), PROVED)
def test_the_identity_is_proved(name: str, law: Law) -> None:
    assert prove(load(name), law) is True


@pytest.mark.parametrize(("name", "law"), PROVED)
def test_the_prover_refutes_a_wrong_variant(name: str, law: Law) -> None:
    """At least one of the law's stated changes shows at the tiny size; the counterexample has numbers."""
    mechanism = load(name)
    results = [prove(broken(mechanism, law, change), law) for change in law.breaks]
    assert any(isinstance(result, Counterexample) for result in results), results
