"""Cases: complete ids, driven by the file alone, and nothing that the candidate does not take."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest

from attnspec.conformance import cases as module
from attnspec.conformance import shapes
from attnspec.conformance.case_id import CaseError, make, parse, renamed
from attnspec.conformance.cases import case_from_id, cases_for
from attnspec.conformance.data import build
from attnspec.conformance.gathers import MOST, gathered
from attnspec.conformance.seeing import deciding, hides_by_default
from attnspec.conformance.settings import alone, pairs
from attnspec.conformance.types import CandidateSignature, Case
from attnspec.spec import load
from attnspec.spec.language import SpecError
from attnspec.spec.mechanism import Mechanism, mechanisms

SDPA = {"Q", "K", "V", "bias", "mask", "causal", "scale"}


@pytest.fixture(scope="module")
def spec() -> Mechanism:
    return load("softmax_attention")


@pytest.fixture(scope="module")
def everything(spec: Mechanism) -> list[Case]:
    return cases_for(spec, "exhaustive", ["fp32"], ("forward", "backward"), 3)


def signature(**changes: object) -> CandidateSignature:
    plain = CandidateSignature(
        name="k", mechanism="softmax_attention", inputs=frozenset({"Q", "K", "V"}), options=frozenset({"causal"}),
        not_taken={}, dtypes=("fp32",), devices=("cpu",), framework="torch", declares={}, outputs=("O",),
        differentiable=("Q",), required=frozenset({"K", "V"}),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_every_id_gives_its_case_back(everything: list[Case]) -> None:
    for case in everything:
        again = case_from_id(case.id)
        assert dataclasses.replace(again, level=case.level) == case


def test_ids_are_unique_and_readable(everything: list[Case]) -> None:
    assert len({case.id for case in everything}) == len(everything)
    plain = "softmax_attention/options/causal=true/B2.H4.Hk2.N19.M23.D16.E16/normal/contiguous/fp32/forward/s3"
    assert plain in {case.id for case in everything}
    shell_characters = set(" *?[]{}()$&;|<>'\"\\`!~#")
    assert not any(shell_characters & set(case.id) for case in everything)


def test_the_levels_grow_and_standard_is_about_a_hundred(spec: Mechanism) -> None:
    counts = [
        len(cases_for(spec, level, ["fp32"], "forward", 0, SDPA)) for level in ("smoke", "standard", "exhaustive")
    ]
    assert counts[0] <= 25 and 90 <= counts[1] <= 140 and counts[2] > counts[1]


def test_what_is_not_taken_is_not_exercised(spec: Mechanism) -> None:
    for case in cases_for(spec, "standard", ["fp32"], ("forward", "backward"), 0, SDPA):
        assert set(case.inputs) | set(case.options) <= SDPA


def test_every_option_and_optional_input_is_exercised_alone(spec: Mechanism) -> None:
    posed = cases_for(spec, "standard", ["fp32"], "forward", 0)
    options = {name for case in posed if case.group == "options" for name in case.options}
    inputs = {name for case in posed if case.group == "options" for name in case.inputs}
    assert options == set(spec.options)
    assert inputs == {name for name, decl in spec.inputs.items() if decl.optional}


def test_a_setting_brings_what_it_needs(spec: Mechanism) -> None:
    found = {setting.names: setting for setting in alone(spec)}
    assert found["causal_alignment",].options["causal"] is True
    assert found["dropout_p",].inputs == ("dropout_mask",)
    assert found["sink_tokens",].options["window_left"] == 3
    assert ("q_segment", "kv_segment") in found
    assert ("kv_length", "k_pages", "v_pages", "block_table") in found


def test_an_option_value_that_changes_nothing_is_no_setting(spec: Mechanism) -> None:
    exhaustive = [setting for setting in alone(spec, "exhaustive") if setting.names == ("window_left",)]
    assert {setting.options["window_left"] for setting in exhaustive} == {3, 0, 8, 1, 6}  # 100 is beyond every key


def test_pairs_cover_every_two_compatible_settings(spec: Mechanism) -> None:
    single = [setting for setting in alone(spec) if setting.names in {("causal",), ("softcap",), ("bias",), ("mask",)}]
    merged = pairs(spec, single, width=3, most=50)
    names = ["causal", "softcap", "bias", "mask"]
    for number, one in enumerate(names):
        for two in names[number + 1 :]:
            assert any({one, two} <= {*entry.names} for entry in merged), (one, two)


def test_pages_replace_keys_and_values(spec: Mechanism) -> None:
    case = make(spec, "options", sizes=shapes.BASE, inputs=("k_pages", "v_pages", "block_table", "kv_length"))
    assert "K" not in case.inputs and "V" not in case.inputs
    data = build(case)
    sizes, _ = spec.resolve(data.inputs, data.options)
    assert sizes["M"] == case.sizes["Kt"] * case.sizes["Ps"] >= 23
    assert parse(case.id) == case


def test_forbidden_combinations_do_not_exist(spec: Mechanism) -> None:
    with pytest.raises(CaseError, match="multiple of the number of key/value heads"):
        make(spec, "shapes", sizes={**shapes.BASE, "heads": 5})
    with pytest.raises(CaseError, match="window_left must be given"):
        make(spec, "options", sizes=shapes.BASE, options={"sink_tokens": 2})


def test_a_smaller_case_gets_its_own_id(spec: Mechanism) -> None:
    case = make(
        spec, "options", sizes=shapes.BASE, options={"causal": True}, inputs=("bias",), broadcast={"bias": "bh"}
    )
    smaller = renamed(dataclasses.replace(case, sizes={**case.sizes, "N": 2, "M": 3}, inputs=("K", "V")))
    assert smaller is not None and smaller.id.split("/")[2:4] == ["causal=true", "B2.H4.Hk2.N2.M3.D16.E16"]
    assert renamed(dataclasses.replace(case, sizes={**case.sizes, "Hk": 3})) is None
    assert renamed(dataclasses.replace(case, inputs=())) == renamed(dataclasses.replace(case, inputs=("K", "V")))


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("nonsense", "is no case id: expected 9 parts"),
        ("softmax_attention/x/plain/B1.Z3/normal/contiguous/fp32/forward/s0", "'Z3' is no size"),
        ("softmax_attention/x/plain/B1/normal/contiguous/fp8/forward/s0", "unknown dtype 'fp8'"),
        ("softmax_attention/x/plain/B1/normal/contiguous/fp32/sideways/s0", "unknown direction 'sideways'"),
        ("softmax_attention/x/plain/B1/normal/contiguous/fp32/forward/7", "expected s and a number"),
        (
            "softmax_attention/x/causal=maybe/B1/normal/contiguous/fp32/forward/s0",
            "causal=maybe is no value of type bool",
        ),
        ("softmax_attention/x/colour=3/B1/normal/contiguous/fp32/forward/s0", "is no option of softmax_attention"),
        ("softmax_attention/x/+sauce/B1/normal/contiguous/fp32/forward/s0", "unknown input 'sauce'"),
    ],
)
def test_a_text_that_is_no_id_is_one_clear_line(identifier: str, message: str) -> None:
    with pytest.raises(CaseError) as caught:
        case_from_id(identifier)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_values_are_refused_by_name(spec: Mechanism) -> None:
    case = make(spec, "values", sizes=shapes.BASE, values="moody")
    with pytest.raises(CaseError, match="unknown values 'moody'"):
        build(case)


def test_a_signature_leaves_out_what_it_cannot_answer(spec: Mechanism) -> None:
    posed = cases_for(spec, "standard", ["fp32"], "backward", 0, signature())
    assert posed and not [case for case in posed if case.group == "gradients_all"]
    both = cases_for(spec, "standard", ["fp32"], "backward", 0, signature(outputs=("O", "LSE")))
    assert [case for case in both if case.group == "gradients_all"]


def test_a_required_optional_input_is_in_every_case(spec: Mechanism) -> None:
    needy = signature(inputs=frozenset({"Q", "K", "V", "mask"}), required=frozenset({"K", "V", "mask"}))
    assert all("mask" in case.inputs for case in cases_for(spec, "standard", ["fp32"], "forward", 0, needy))


def test_every_seed_has_the_same_cases(spec: Mechanism) -> None:
    one, two = (
        [case.id.rpartition("/")[0] for case in cases_for(spec, "standard", ["bf16"], "forward", seed, SDPA)]
        for seed in (0, 9)
    )
    assert one == two


def test_products_beyond_fp16_are_for_kernels_that_keep_logits_wide(spec: Mechanism) -> None:
    plain = signature(inputs=frozenset({"Q", "K", "V", "mask"}), dtypes=("fp16", "fp32"))
    far = [case for case in cases_for(spec, "exhaustive", ["fp16", "fp32"], supported=plain) if case.group == "far"]
    assert [case.dtype for case in far] == ["fp16"]
    eager = dataclasses.replace(plain, rounding="materialized")
    assert not [case for case in cases_for(spec, "exhaustive", ["fp16"], supported=eager) if case.group == "far"]


def test_every_case_can_be_built(spec: Mechanism) -> None:
    for case in cases_for(spec, "standard", ["fp16"], ("forward", "backward"), 1):
        data = build(case)
        assert data.extra["shapes"] and data.extra["resolved"]
        if case.direction == "backward":
            assert set(data.cotangents) <= set(spec.outputs) and data.cotangents


OTHER = """
name = "neighbour_mean"
family = "test"
summary = "The mean of the previous values and itself."
batch = ["b"]
[paper]
title = "none"
year = 2024
[sizes]
B = { min = 0 }
T = { min = 0 }
E = { min = 1 }
[indices]
b = "B"
t = "T"
u = "T"
e = "E"
[inputs.X]
axes = ["t", "e"]
batch = ["b"]
role = "value"
differentiable = true
[options.width]
type = "int"
nullable = true
min = 0
[outputs.Y]
axes = ["t", "e"]
[equations]
text = '''
Y[t,e] = mean[u : u <= t and (u >= t - width if present(width) else True)](X[u,e])
'''
"""


def test_a_mechanism_that_nobody_prepared_for_gets_cases(tmp_path: Path) -> None:
    path = tmp_path / "neighbour_mean.toml"
    path.write_text(textwrap.dedent(OTHER), encoding="utf-8")
    other = load(path)
    posed = cases_for(other, "standard", ["fp32"], "forward", 0)
    assert {"shapes", "options", "values"} <= {case.group for case in posed}
    for case in posed:
        assert build(case, mechanism=other).inputs["X"].shape == tuple(case.sizes[name] for name in ("B", "T", "E"))
        assert parse(case.id, other) == case
    assert {case.sizes["T"] for case in posed} >= {0, 1, 131}


STATED = """
[[case]]
reason = "a window that is wider than the sequence"
sizes = { T = 4 }
options = { width = 7 }
values = "large"
"""


def stated(tmp_path: Path, text: str) -> Mechanism:
    path = tmp_path / "neighbour_mean.toml"
    path.write_text(textwrap.dedent(OTHER) + text, encoding="utf-8")
    return load(path)


def test_a_case_that_the_file_states_is_posed_from_standard_on(tmp_path: Path) -> None:
    other = stated(tmp_path, STATED)
    assert not [case for case in cases_for(other, "smoke") if case.group == "stated"]
    (case,) = [case for case in cases_for(other, "standard") if case.group == "stated"]
    assert (case.sizes["T"], case.options, case.values) == (4, {"width": 7}, "large")
    assert parse(case.id, other) == case


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("T = 4", "Y = 4", "case.sizes names 'Y'; declared: B, T, E"),
        ("width", "with", "case.options names 'with'; declared: width"),
        ('values = "large"', 'inputs = ["Z"]', "case.inputs names 'Z'; declared: X"),
        ("T = 4", "T = -1", "-1 is less than the minimum of 0"),
    ],
)
def test_a_stated_case_of_what_is_not_declared_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        stated(tmp_path, STATED.replace(old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[equivalent_mutant]]\nids = ["a", "b"]\nreason = "for a reason"\n' * 2, "equivalent_mutant names 'a' twice"),
        ('[[form]]\nname = "f"\ntext = "Y[t,e] = X[t,e]"\ngradient = "dX[t,e] = dY[t,e]"\n', "file has no .gradient."),
        (
            '[gradient]\noutputs = { dX = "X" }\ntext = "dX[t,e] = dY[t,e]"\n'
            '[[form]]\nname = "f"\ntext = "Y[t,e] = X[t,e]"\ngradient = "other[t,e] = dY[t,e]"\n',
            "defines nothing that .gradient. defines",
        ),
    ],
)
def test_what_a_file_says_of_mutants_and_forms_is_checked(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        stated(tmp_path, text)


def test_short_vectors_lie_on_both_sides_of_a_floor(spec: Mechanism) -> None:
    case = make(spec, "stated", sizes={}, values="short")
    lengths = np.sqrt((build(case).inputs["Q"] ** 2).sum(-1))
    assert (lengths == 0).any() and ((lengths > 0) & (lengths < 1e-12)).any()
    assert ((lengths > 1e-12) & (lengths < 1e-11)).any() and (lengths > 1).any()


def drawing(tmp_path: Path, drawn: str) -> Mechanism:
    path = tmp_path / "neighbour_mean.toml"
    role = 'role = "value"'
    path.write_text(textwrap.dedent(OTHER).replace(role, f'{role}\ndrawn = "{drawn}"'), encoding="utf-8")
    return load(path)


@pytest.mark.parametrize("drawn", ["0 <= X <= 0.25", "unit"])
def test_values_keep_to_what_callers_give(tmp_path: Path, drawn: str) -> None:
    other = drawing(tmp_path, drawn)
    cases = [case for case in cases_for(other, "standard") if case.group == "shapes"]
    assert len(cases) > 10
    for case in cases:
        X = build(case, mechanism=other).inputs["X"]
        if drawn == "unit":
            assert np.allclose((X * X).sum(-1), 1, rtol=0, atol=1e-6)
        else:
            assert (X >= 0).all() and (X <= 0.25).all()


def test_a_way_to_draw_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"X\.drawn is 'small', expected 'unit', 'unit unless OPTION' or bounds"):
        drawing(tmp_path, "small")


@pytest.mark.parametrize("name", [name for name in mechanisms() if load(name).cases])
def test_every_stated_case_arises(name: str) -> None:
    mechanism = load(name)
    posed = [case for case in cases_for(mechanism, "standard") if case.group == "stated"]
    assert len(posed) == len(mechanism.cases)
    for entry in mechanism.cases:
        assert any(
            dict(case.options) == dict(entry.options) and set(entry.inputs) <= set(case.inputs)
            and case.values == entry.values and dict(entry.sizes).items() <= dict(case.sizes).items()
            for case in posed
        ), entry.reason  # fmt: skip


def test_the_door_of_the_room_has_what_others_import() -> None:
    assert {"build", "case_from_id", "cases_for", "renamed", "CaseError"} == set(module.__all__)


def test_tokens_that_stand_left_of_other_axes_are_found_by_their_index() -> None:
    names = shapes.roles(load("deformable_attention")).names  # logits[h,i,l,k]
    assert (names["queries"], names["heads"]) == ("N", "H")
    assert "L" not in names.values() and "P" not in names.values()


@pytest.mark.parametrize("name", ["graph_isomorphic_attention", "hornet_gnconv"])
def test_constraints_on_heads_and_channels_leave_cases_over(name: str) -> None:
    mechanism = load(name)
    assert len(shapes.families(mechanism, "standard", [*mechanism.inputs])) > 15


def test_a_usual_input_is_also_left_out() -> None:
    mechanism = load("urpe_attention")
    bare = [case for case in cases_for(mechanism) if "-gam" in case.id]
    assert "options" in {case.group for case in bare}
    for case in bare:
        assert parse(case.id) == case and "gam" not in build(case).inputs
        assert renamed(case) == case
    with pytest.raises(CaseError, match="'bta' is no usual input; usual: gam"):
        parse(bare[0].id.replace("-gam", "-bta"))


@pytest.mark.parametrize("option", ["gate_mean", "gsf", "alpha"])
def test_an_option_finds_all_the_inputs_that_it_needs(option: str) -> None:
    assert any(option in setting.names for setting in alone(load("clipped_softmax_gated_attention")))


@pytest.mark.parametrize("name", mechanisms())
def test_a_long_case_fits_into_memory(name: str) -> None:
    mechanism = load(name)
    long = [case for case in cases_for(mechanism) if case.group == "long"]
    assert all(gathered(mechanism, case.sizes) <= MOST for case in long)


def test_a_long_case_is_shortened_where_every_pair_is_gathered_for_every_feature() -> None:
    mechanism, sizes = load("auto_correlation"), {"B": 3, "H": 2, "N": 50, "M": 40, "D": 8}
    assert gathered(mechanism, sizes) == 3 * 2 * 50 * 50 * 8  # Q[b,h,(t + u) % N,d]
    for level in ("standard", "exhaustive"):
        long = [case for case in cases_for(mechanism, level) if case.group == "long"]
        assert max(case.sizes["N"] for case in long) == 1024
        assert len({case.id for case in long}) == len(long)
    assert max(case.sizes["N"] for case in cases_for(load("softmax_attention")) if case.group == "long") == 4096


@pytest.mark.parametrize("name", mechanisms())
def test_the_equations_refuse_what_a_candidate_must_refuse(name: str) -> None:
    mechanism = load(name)
    for case in cases_for(mechanism):
        if case.check == "refusal":
            data = build(case)
            with pytest.raises(SpecError):
                mechanism.evaluate(data.inputs, data.options)


def test_what_decides_who_is_seen_is_what_the_file_says(spec: Mechanism) -> None:
    assert deciding(spec) == {
        "causal", "causal_alignment", "window_left", "window_right", "chunk", "sink_tokens"
    }  # fmt: skip
    assert {"window_x", "dilation_y", "rows"} < deciding(load("fused_neighborhood_attention"))
    assert not deciding(load("landmark_attention")), "scores decide beside its options: NaN would change who is seen"
    assert deciding(load("informer_probsparse")) == {"causal"}, "no keep: the usual names"


@pytest.mark.parametrize("name", mechanisms())
def test_keys_hidden_by_default_are_spoiled_without_any_option(name: str) -> None:
    mechanism = load(name)
    plain = [case for case in cases_for(mechanism) if "/hidden/plain/" in case.id and "future" in case.values]
    assert bool(plain) == hides_by_default(mechanism)
    for case in plain:
        values = build(case).inputs
        assert any(np.abs(value).max() > 1e3 or not np.isfinite(value).all() for value in values.values() if value.size)


def test_hiding_by_default_is_known_of_both_kinds(spec: Mechanism) -> None:
    assert not hides_by_default(spec)
    assert all(hides_by_default(load(name)) for name in ("landmark_attention", "lssa_softplus_attention"))


def test_keys_are_of_length_one_unless_the_mechanism_makes_them_so() -> None:
    mechanism = load("gated_delta_rule")
    for flag in (False, True):
        options = {"normalize_qk": flag}
        data = build(make(mechanism, "options", sizes={**shapes.BASE, "heads": 2, "kv_heads": 4}, options=options))
        assert np.allclose(np.linalg.norm(data.inputs["K"], axis=-1), 1.0, atol=1e-6) is not flag
    assert mechanism.options["normalize_qk"].default is False
