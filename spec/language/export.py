"""The checked tree as JSON (schema/tree.schema.json), and back.

`to_json` serves readers in other languages and `attnspec show --format json`; `from_json` refuses what does not follow
the schema and checks the equations again, so that a tree from a stranger is as safe as a text from one.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.functions import FUNCTIONS
from attnspec.spec.language.syntax import (
    NOWHERE,
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Declarations,
    Definition,
    InputDecl,
    Kind,
    Logic,
    Name,
    Node,
    Num,
    OptionDecl,
    OutputDecl,
    Place,
    Program,
    Reduce,
    Ref,
    Scan,
    SizeDecl,
    Str,
    Unary,
)

FORMAT = "attnspec-tree"
VERSION = 1
SCHEMA = Path(__file__).parent.parent / "schema" / "tree.schema.json"
_MAX_DEPTH = 300
_MAX_NODES = 1_000_000


def to_json(program: Program) -> dict[str, Any]:
    """The program as JSON data that follows the published schema; `json.dumps` of it needs no special encoder."""
    decl = program.declarations
    return {
        "format": FORMAT,
        "version": VERSION,
        "file": program.file,
        "text": program.text,
        "declarations": {
            "sizes": [
                {"name": name, "minimum": size.minimum, "value": _optional(size.value)}
                for name, size in decl.sizes.items()
            ],
            "indices": [{"name": name, "size": node_to_json(size)} for name, size in decl.indices.items()],
            "inputs": [_fields(entry) for entry in decl.inputs.values()],
            "options": [_fields(entry) for entry in decl.options.values()],
            "outputs": [_fields(entry) for entry in decl.outputs.values()],
            "batch": list(decl.batch),
        },
        "definitions": [_definition(entry) for entry in program.definitions.values()],
        "boundaries": [_definition(entry) for entry in program.boundaries.values()],
        "order": list(program.order),
        "scans": [{"names": list(s.names), "index": s.index, "step": s.step} for s in program.scans],
        "kinds": dict(program.kinds),
    }


def from_json(data: Mapping[str, Any]) -> Program:
    """The program that `to_json` wrote.

    Raises:
        SpecError: the data do not follow the schema, or the equations in them are not well formed, or order, scans
            and kinds are not those of the equations.
    """
    _refuse_monsters(data)
    _validate(data)
    decl = _declarations(data["declarations"])
    stated = Program(
        declarations=decl,
        definitions=_definitions(data["definitions"]),
        boundaries=_definitions(data["boundaries"]),
        order=tuple(data["order"]),
        scans=tuple(Scan(tuple(s["names"]), s["index"], s["step"]) for s in data["scans"]),
        kinds=dict(data["kinds"]),
        text=data["text"],
        file=data["file"],
    )
    _check_again(stated)
    return stated


def _check_again(stated: Program) -> None:
    from attnspec.spec.language.check import check

    lines = sorted((*stated.definitions.values(), *stated.boundaries.values()), key=lambda entry: entry.line)
    plain = [Definition(d.name, d.subscripts, d.body, d.line, d.text) for d in lines]
    checked = check(plain, stated.declarations, stated.text, stated.file)
    for part in ("definitions", "boundaries", "order", "scans", "kinds"):
        if getattr(checked, part) != getattr(stated, part):
            raise SpecError(f"{part}: not what checking these equations gives", file=stated.file)


def node_to_json(node: Node) -> dict[str, Any]:
    """One expression as JSON data."""
    data = _node(node)
    if node.at != NOWHERE:
        data["at"] = [node.at.line, node.at.column]
    return data


def _node(node: Node) -> dict[str, Any]:
    match node:
        case Num(value=value):
            return {"node": "number", "kind": "int" if isinstance(value, int) else "real", "value": value}
        case Bool(value=truth):
            return {"node": "bool", "value": truth}
        case Str(value=string):
            return {"node": "string", "value": string}
        case Name(id=name):
            return {"node": "name", "id": name}
        case Ref(name=name, subscripts=subscripts):
            return {"node": "element", "name": name, "subscripts": _nodes(subscripts)}
        case Unary(op=op, operand=operand):
            return {"node": "unary", "op": op, "operand": node_to_json(operand)}
        case Binary(op=op, left=left, right=right):
            return {"node": "binary", "op": op, "left": node_to_json(left), "right": node_to_json(right)}
        case Compare(ops=ops, operands=operands):
            return {"node": "compare", "ops": list(ops), "operands": _nodes(operands)}
        case Logic(op=op, operands=operands):
            return {"node": "logic", "op": op, "operands": _nodes(operands)}
        case Cond(test=test, then=then, otherwise=other):
            return {
                "node": "if", "test": node_to_json(test), "then": node_to_json(then), "else": node_to_json(other)
            }  # fmt: skip
        case Call(function=function, arguments=arguments):
            return {"node": "call", "function": function, "arguments": _nodes(arguments)}
        case Reduce(op=op, indices=indices, condition=condition, body=body):
            return {
                "node": "reduce", "op": op, "indices": list(indices), "condition": _optional(condition),
                "body": node_to_json(body),
            }  # fmt: skip
    raise TypeError(f"not a node of the tree: {type(node).__name__}")


def node_from_json(data: Mapping[str, Any]) -> Node:
    """The expression that `node_to_json` wrote; `data` must follow the schema."""
    at = Place(*data["at"]) if "at" in data else NOWHERE
    return _READERS[data["node"]](data, at)


def _number(data: Mapping[str, Any], at: Place) -> Node:
    value = data["value"]
    if data["kind"] == "real":
        if not math.isfinite(float(value)):
            raise SpecError("a number that is not finite: write the name inf", file="<tree>")
        return Num(float(value), at=at)
    if value != int(value) or not -(2**63) < value < 2**63:
        raise SpecError(f"number: an int of at most 63 bits was expected, got {_short(repr(value))}", file="<tree>")
    return Num(int(value), at=at)


_READERS: dict[str, Callable[[Mapping[str, Any], Place], Node]] = {
    "number": _number,
    "bool": lambda n, at: Bool(n["value"], at=at),
    "string": lambda n, at: Str(n["value"], at=at),
    "name": lambda n, at: Name(n["id"], at=at),
    "element": lambda n, at: Ref(n["name"], _read(n["subscripts"]), at=at),
    "unary": lambda n, at: Unary(n["op"], node_from_json(n["operand"]), at=at),
    "binary": lambda n, at: Binary(n["op"], node_from_json(n["left"]), node_from_json(n["right"]), at=at),
    "compare": lambda n, at: _comparison(n, at),
    "logic": lambda n, at: Logic(n["op"], _read(n["operands"]), at=at),
    "if": lambda n, at: Cond(node_from_json(n["test"]), node_from_json(n["then"]), node_from_json(n["else"]), at=at),
    "call": lambda n, at: _call(n, at),
    "reduce": lambda n, at: _reduction(n, at),
}


def _comparison(data: Mapping[str, Any], at: Place) -> Node:
    if len(data["operands"]) != len(data["ops"]) + 1:
        raise SpecError("compare: one more operand than ops was expected", file="<tree>")
    return Compare(tuple(data["ops"]), _read(data["operands"]), at=at)


def _call(data: Mapping[str, Any], at: Place) -> Node:
    name, arguments = data["function"], _read(data["arguments"])
    least, most = (1, 1) if name == "present" else (FUNCTIONS[name].least, FUNCTIONS[name].most)
    if len(arguments) < least or (most is not None and len(arguments) > most):
        raise SpecError(f"call: {name} takes {least} argument(s), got {len(arguments)}", file="<tree>")
    if name == "present" and not isinstance(arguments[0], Name):
        raise SpecError("call: present takes a name", file="<tree>")
    return Call(name, arguments, at=at)


def _reduction(data: Mapping[str, Any], at: Place) -> Node:
    op, indices = data["op"], tuple(data["indices"])
    if op in ("rank", "argsort", "argmax") and len(indices) != 1:
        raise SpecError(f"reduce: {op} takes exactly one index, got {len(indices)}", file="<tree>")
    return Reduce(op, indices, _read_optional(data["condition"]), node_from_json(data["body"]), at=at)


def _nodes(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    return [node_to_json(node) for node in nodes]


def _read(data: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
    return tuple(node_from_json(entry) for entry in data)


def _optional(node: Node | None) -> dict[str, Any] | None:
    return None if node is None else node_to_json(node)


def _read_optional(data: Mapping[str, Any] | None) -> Node | None:
    return None if data is None else node_from_json(data)


def _fields(entry: InputDecl | OptionDecl | OutputDecl) -> dict[str, Any]:
    """A declaration's fields: tuples become lists, expressions trees."""
    data: dict[str, Any] = {}
    for key, value in vars(entry).items():
        if isinstance(value, tuple):
            data[key] = list(value)
        elif isinstance(value, Node):
            data[key] = node_to_json(value)
        else:
            data[key] = value
    return data


def _definition(entry: Definition) -> dict[str, Any]:
    return {
        "name": entry.name,
        "subscripts": _nodes(entry.subscripts),
        "body": node_to_json(entry.body),
        "line": entry.line,
        "text": entry.text,
        "boundary": entry.boundary,
    }


def _definitions(data: Sequence[Mapping[str, Any]]) -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for entry in data:
        if entry["name"] in found:
            raise SpecError(f"{entry['name']!r} is defined twice", file="<tree>")
        found[entry["name"]] = Definition(
            entry["name"], _read(entry["subscripts"]), node_from_json(entry["body"]), entry["line"], entry["text"],
            entry["boundary"],
        )  # fmt: skip
    return found


def _declarations(data: Mapping[str, Any]) -> Declarations:
    def by_name(part: str, build: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
        built = {entry["name"]: build(entry) for entry in data[part]}
        if len(built) < len(data[part]):
            raise SpecError(f"declarations.{part}: a name is declared twice", file="<tree>")
        return built

    return Declarations(
        sizes=by_name("sizes", lambda e: SizeDecl(e["name"], e["minimum"], _read_optional(e["value"]))),
        indices=by_name("indices", lambda e: node_from_json(e["size"])),
        inputs=by_name("inputs", _input),
        options=by_name("options", _option),
        outputs=by_name("outputs", lambda e: OutputDecl(e["name"], tuple(e["axes"]), e["doc"])),
        batch=tuple(data["batch"]),
    )


def _input(entry: Mapping[str, Any]) -> InputDecl:
    lists = {key: tuple(entry[key]) for key in ("axes", "batch", "broadcast")}
    return InputDecl(**{**entry, **lists, "kind": cast(Kind, entry["kind"])})


def _option(entry: Mapping[str, Any]) -> OptionDecl:
    return OptionDecl(**{**entry, "choices": tuple(entry["choices"]), "formula": _read_optional(entry["formula"])})


def _refuse_monsters(data: Any) -> None:
    """Refuse nesting and sizes that a validator would choke on, without recursion."""
    stack = [(data, 0)]
    seen = 0
    while stack:
        current, depth = stack.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_NODES:
            raise SpecError("the tree is nested too deeply or too large", file="<tree>")
        if isinstance(current, Mapping):
            stack += [(value, depth + 1) for value in current.values()]
        elif isinstance(current, list | tuple):
            stack += [(value, depth + 1) for value in current]


def _validate(data: Any) -> None:
    """Validate by the schema, one node at a time: a validator that recurses would exhaust the stack on deep trees."""
    whole, by_kind = _validators()
    pending: list[tuple[str, Any, Any]] = [("", data, whole)]
    while pending:
        place, value, validator = pending.pop()
        below: list[tuple[str, Any]] = []
        flat = value
        if isinstance(value, Mapping):
            flat = {key: _without_nodes(entry, f"{place}.{key}", below) for key, entry in value.items()}
        error = min(validator.iter_errors(flat), key=lambda e: [str(part) for part in e.absolute_path], default=None)
        if error is not None:
            where = ".".join([place.lstrip("."), *(str(part) for part in error.absolute_path)]).strip(".")
            raise SpecError(f"{where or 'top level'}: {_short(error.message)}", file="<tree>")
        for at, entry in below:
            kind = entry["node"]
            if not isinstance(kind, str) or kind not in by_kind:
                raise SpecError(f"{at.lstrip('.')}: unknown node {_short(repr(kind))}", file="<tree>")
            pending.append((at, entry, by_kind[kind]))


def _without_nodes(value: Any, place: str, found: list[tuple[str, Any]]) -> Any:
    """`value` with every node below it replaced by a valid small one; the nodes go to `found` with their places."""
    if isinstance(value, Mapping):
        if "node" in value:
            found.append((place, value))
            return {"node": "bool", "value": True}
        return {key: _without_nodes(entry, f"{place}.{key}", found) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nodes(entry, f"{place}.{k}", found) for k, entry in enumerate(value)]
    return value


def _short(message: str) -> str:
    return message if len(message) <= 200 else message[:197] + "..."


@functools.cache
def _validators() -> tuple[Any, dict[str, Any]]:
    """Validators for the whole and for each kind of node, which take nodes below them as valid."""
    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    nodes = schema["$defs"]["nodes"]
    schema["$defs"]["node"] = {"type": "object", "required": ["node"]}
    common = {"$schema": schema["$schema"], "$defs": schema["$defs"]}
    by_kind = {kind: jsonschema.Draft202012Validator({**common, **entry}) for kind, entry in nodes.items()}
    return jsonschema.Draft202012Validator(schema), by_kind
