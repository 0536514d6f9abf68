"""Planted kernels: their anchors hold, and the honest kernels that they are made from are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from attnspec.conformance import planted
from attnspec.conformance.candidate import described, resolve
from attnspec.conformance.planted import registry, witness
from attnspec.conformance.planted.honest import HONEST
from attnspec.conformance.planted.kernel import make
from attnspec.conformance.planted.registry import REGIONS, Faults, Planted, Witness
from attnspec.spec import load

ALL = planted.all()
NAMES = [entry.name for entry in ALL]
FOLDER = Path(next(iter(planted.__path__)))


def test_there_are_more_than_a_hundred_of_all_regions() -> None:
    assert len(ALL) > 100
    assert {entry.region for entry in ALL} == set(REGIONS)


@pytest.mark.parametrize("entry", ALL, ids=NAMES)
def test_the_anchor_holds(entry: Planted) -> None:
    assert witness.anchor(entry, HONEST["honest_plain"]) is None


@pytest.mark.parametrize("entry", ALL, ids=NAMES)
def test_honest_kernels_are_right_on_the_witness(entry: Planted) -> None:
    want = expected(entry.witness)
    for name, function in HONEST.items():
        call = witness.observe(function, entry.witness)
        assert not call.error, f"{name}: {call.error}"
        tolerance = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2}[entry.witness.dtype]
        for label, value in want.items():
            got = call.results[label].double().numpy()
            np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * 4, err_msg=f"{name} {label}")


def expected(case: Witness) -> dict[str, Any]:
    """What the equations say on a witness."""
    mechanism = load("softmax_attention")
    tensors = witness.arguments(case)
    inputs = {
        name: t.double().numpy() if t.dtype.is_floating_point else t.numpy() for name, t in tensors.items()
    }
    return mechanism.evaluate(inputs, dict(case.options))


def test_every_fault_point_in_the_code_belongs_to_a_planted_kernel() -> None:
    asked = set()
    for path in FOLDER.glob("*.py"):
        asked |= set(re.findall(r'faults\("([a-z0-9_]+)"\)', path.read_text(encoding="utf-8")))
    asked.discard("name")
    assert asked == set(NAMES)


def test_a_fault_point_that_is_not_passed_is_no_kill() -> None:
    entry = planted.find("causal_strict")
    idle = Planted(
        entry.name, entry.function, entry.evidence, entry.region, entry.options, entry.framework, entry.summary,
        Witness({}, {"causal": False}), entry.build,
    )  # fmt: skip
    assert witness.anchor(idle, HONEST["honest_plain"]) == "its fault point is not passed on its witness"


def test_a_witness_that_shows_nothing_is_no_kill() -> None:
    entry = planted.find("causal_top_left")
    blind = Planted(
        entry.name, entry.function, entry.evidence, entry.region, entry.options, entry.framework, entry.summary,
        Witness({"N": 4, "M": 4}, {"causal": True}), entry.build,
    )  # fmt: skip
    assert witness.anchor(blind, HONEST["honest_plain"]) == "its witness does not tell it from the honest"


def test_names_are_unique_and_regions_and_evidence_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    with pytest.raises(ValueError, match="registered twice"):
        registry.plant("causal_strict", "again", evidence=("a/b#1",), region="row", witness=Witness())
    with pytest.raises(ValueError, match="region 'somewhere'"):
        registry.plant("brand_new", "x", evidence=("a/b#1",), region="somewhere", witness=Witness())
    with pytest.raises(ValueError, match="no evidence"):
        registry.plant("brand_new", "x", evidence=(), region="row", witness=Witness())


def test_evidence_is_a_public_reference() -> None:
    reference = re.compile(r"[\w.-]+/[\w.-]+(#\d+|@[0-9a-f]{6,40})")
    loose = {entry.name: e for entry in ALL for e in entry.evidence if not reference.fullmatch(e)}
    assert set(loose) == {"tail_index_clamped"}, loose


def test_a_planted_kernel_is_a_candidate_by_its_address() -> None:
    candidate = resolve("attnspec.conformance.planted:causal_strict", "softmax_attention")
    assert candidate.name == "attnspec.conformance.planted:causal_strict"
    assert candidate.function is planted.find("causal_strict").function
    honest = resolve("attnspec.conformance.planted:honest_plain", "softmax_attention")
    assert honest.function is HONEST["honest_plain"]


def test_a_planted_kernel_takes_every_input_and_option() -> None:
    mechanism = load("softmax_attention")
    for entry in ALL:
        assert set(entry.options) == {*mechanism.inputs, *mechanism.options}, entry.name


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="causal_strict"):
        planted.find("no_such_kernel")


def test_the_honest_kernels_differ_only_in_how_they_compute() -> None:
    function = make("probe", Faults(), kind="tiled", block=(8, 8), splits=2)
    description = described(function)
    assert description is not None and description.mechanism == "softmax_attention"
    assert not Faults()("anything")
