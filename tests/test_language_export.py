"""The JSON tree follows its published schema, reads back as the same program, and refuses everything else."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings

from attnspec.spec import load, mechanisms
from attnspec.spec.language import SpecError, evaluate, read
from attnspec.spec.language.export import SCHEMA, from_json, node_from_json, node_to_json, to_json
from attnspec.spec.language.functions import FUNCTIONS
from attnspec.spec.language.syntax import NORMALIZERS, REDUCTIONS, Bool, Compare, Name, Num, Place, Str
from attnspec.tests.language_programs import Sample, samples, wild_samples

schema = json.loads(SCHEMA.read_text(encoding="utf-8"))


def through_text(data: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the JSON text sees."""
    return json.loads(json.dumps(data, allow_nan=False))  # type: ignore[no-any-return]


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_schema_names_every_function_and_reduction() -> None:
    nodes = schema["$defs"]["nodes"]
    assert set(nodes["call"]["properties"]["function"]["enum"]) == {*FUNCTIONS, "present"}
    assert set(nodes["reduce"]["properties"]["op"]["enum"]) == {*REDUCTIONS, *NORMALIZERS}


@pytest.mark.parametrize("name", mechanisms())
def test_a_mechanisms_programs_survive_the_round_trip(name: str) -> None:
    mechanism = load(name)
    for program in (mechanism.program, mechanism.gradient, *mechanism.forms.values()):
        if program is None:
            continue
        data = through_text(to_json(program))
        jsonschema.Draft202012Validator(schema).validate(data)
        assert from_json(data) == program
        assert to_json(from_json(data)) == to_json(program)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(samples() | wild_samples())
def test_generated_programs_survive_the_round_trip(sample: Sample) -> None:
    program = read(sample.text, sample.declarations)
    again = from_json(through_text(to_json(program)))
    assert again == program
    first = evaluate(program, sample.inputs, sample.options, sizes=sample.sizes)
    second = evaluate(again, sample.inputs, sample.options, sizes=sample.sizes)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_places_survive_the_round_trip() -> None:
    node = Compare(("<",), (Name("i", at=Place(3, 4)), Num(2, at=Place(3, 8))), at=Place(3, 4))
    again = node_from_json(through_text(node_to_json(node)))
    assert again.at == Place(3, 4)
    assert isinstance(again, Compare)
    assert again.operands[1].at == Place(3, 8)


@pytest.mark.parametrize("node", [Num(2), Num(2.0), Num(1e-300), Num(2**63 - 1), Bool(True), Str("a'\"\\")])
def test_literals_keep_their_kind(node: Any) -> None:
    again = node_from_json(through_text(node_to_json(node)))
    assert again == node
    assert type(again.value) is type(node.value)  # type: ignore[attr-defined]


def softmax_tree() -> dict[str, Any]:
    return through_text(to_json(load("softmax_attention").program))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The tree of softmax attention with one entry replaced (or removed, for None)."""
    data = copy.deepcopy(softmax_tree())
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = data
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


N = {"node": "name", "id": "N"}
TRUE = {"node": "bool", "value": True}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("version", 2, "version"),
        ("format", None, "format"),
        ("surplus", 1, "surplus"),
        ("definitions.0.body.node", "lambda", "lambda"),
        ("definitions.0.body", {"node": "call", "function": "system", "arguments": [N]}, "system"),
        ("definitions.0.body", {"node": "name", "id": "__import__('os')"}, "does not match"),
        ("definitions.0.body", {"node": "name", "id": "nowhere"}, "nowhere"),
        ("definitions.0.body", {"node": "number", "kind": "int", "value": 2.5}, "int"),
        ("definitions.0.body", {"node": "number", "kind": "int", "value": 2**70}, "63 bits"),
        ("definitions.0.body", {"node": "name", "id": "N", "surplus": 1}, "surplus"),
        ("definitions.0.body", {"node": "call", "function": "exp", "arguments": [N] * 3}, "exp"),
        ("definitions.0.body", {"node": "call", "function": "present", "arguments": [TRUE]}, "present"),
        ("definitions.0.body", {"node": "compare", "ops": ["<"], "operands": [N] * 3}, "operand"),
        ("definitions.1.name", "pad", "twice"),
        ("definitions.0.boundary", True, "definitions"),
        ("order.0", "O", "order"),
        ("kinds.O", "int", "kinds"),
        ("scans", [{"names": ["O"], "index": "i", "step": 1}], "scans"),
        ("declarations.sizes.0.minimum", -1, "minimum"),
        ("declarations.inputs.0.axes.0", "nowhere", "nowhere"),
        ("declarations.inputs.0.name", "K", "twice"),
    ],
)  # fmt: skip
def test_a_damaged_tree_is_refused(path: str, value: Any, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        from_json(changed(path, value))


@pytest.mark.parametrize("data", [{}, [], None, 3, "text", {"node": "bool"}])
def test_what_is_no_tree_is_refused(data: Any) -> None:
    with pytest.raises(SpecError):
        from_json(data)


def test_monstrous_nesting_is_refused() -> None:
    node: Any = {"node": "name", "id": "N"}
    for _ in range(5000):
        node = {"node": "unary", "op": "-", "operand": node}
    with pytest.raises(SpecError, match="nested"):
        from_json({**softmax_tree(), "order": node})
