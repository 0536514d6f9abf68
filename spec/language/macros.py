"""Macros: named expressions with index and value parameters, expanded by the reader before checking.

    l2norm[d](x, eps=1e-6) = x * rsqrt(sum[d](x*x) + eps)

The prelude (`prelude.txt`) holds the ones every mechanism may use; a file may add its own. A macro's body may
bind only its own index parameters, so that an argument's indices are never captured by accident. A macro may
call macros defined above it. Expansion is bounded in size.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.functions import RESERVED
from attnspec.spec.language.syntax import (
    Binary,
    Call,
    Compare,
    Cond,
    Logic,
    Name,
    Node,
    Num,
    Place,
    Reduce,
    Ref,
    Unary,
)
from attnspec.spec.language.text import fail, logical_lines, node_place, parse_expression, split_equation

MAX_NODES = 10_000
MAX_DEPTH = 120


class Budget:
    """What the macros of one text may still expand to, in nodes."""

    def __init__(self) -> None:
        self.left = MAX_NODES

    def take(self, nodes: int, at: Place, file: str) -> None:
        self.left -= nodes
        if self.left < 0:
            raise fail(f"macros expand this to more than {MAX_NODES} nodes", at, file)


@dataclass(frozen=True)
class Macro:
    """`name[indices](parameters) = body`; `defaults` of the last parameters; `file` and `line` of its definition."""

    name: str
    indices: tuple[str, ...]
    parameters: tuple[str, ...]
    defaults: Mapping[str, Node]
    body: Node
    file: str
    line: int


def children(node: Node) -> tuple[Node, ...]:
    """The direct subexpressions of a node, in order of appearance."""
    match node:
        case Ref(subscripts=subscripts):
            return subscripts
        case Unary(operand=operand):
            return (operand,)
        case Binary(left=left, right=right):
            return (left, right)
        case Compare(operands=operands) | Logic(operands=operands):
            return operands
        case Cond(test=test, then=then, otherwise=otherwise):
            return (test, then, otherwise)
        case Call(arguments=arguments):
            return arguments
        case Reduce(condition=condition, body=body):
            return (body,) if condition is None else (condition, body)
    return ()


def subexpressions(node: Node) -> Iterator[Node]:
    """The node and everything below it, each node before what is in it."""
    stack = [node]
    while stack:
        found = stack.pop()
        yield found
        stack.extend(children(found))


def rebuild(node: Node, parts: tuple[Node, ...]) -> Node:
    """`node` with its `children` replaced by `parts`."""
    match node:
        case Ref():
            return replace(node, subscripts=parts)
        case Unary():
            return replace(node, operand=parts[0])
        case Binary():
            return replace(node, left=parts[0], right=parts[1])
        case Compare() | Logic():
            return replace(node, operands=parts)
        case Cond():
            return replace(node, test=parts[0], then=parts[1], otherwise=parts[2])
        case Call():
            return replace(node, arguments=parts)
        case Reduce():
            if node.condition is None:
                return replace(node, body=parts[0])
            return replace(node, condition=parts[0], body=parts[1])
    return node


def tree_size(node: Node, limit: int = MAX_NODES) -> int:
    """The number of nodes, counted up to `limit`."""
    return sum(1 for _ in islice(subexpressions(node), limit + 1))


def tree_depth(node: Node) -> int:
    """The length of the longest path down from a node."""
    deepest = 0
    stack = [(node, 1)]
    while stack:
        current, depth = stack.pop()
        deepest = max(deepest, depth)
        stack.extend((child, depth + 1) for child in children(current))
    return deepest


def bounded(node: Node, at: Place, file: str) -> Node:
    """The node itself, if it is neither too large nor too deep to walk."""
    if tree_size(node) > MAX_NODES:
        raise fail(f"macros expand this to more than {MAX_NODES} nodes", at, file)
    if tree_depth(node) > MAX_DEPTH:
        raise fail(f"macros expand this to a nesting deeper than {MAX_DEPTH}", at, file)
    return node


def expand(
    macro: Macro,
    indices: tuple[str, ...],
    arguments: Mapping[str, Node],
    at: Place,
    file: str,
    budget: Budget,
) -> Node:
    """The macro's body with index and value parameters replaced; every node is placed at the call."""
    names = dict(zip(macro.indices, indices))
    sizes = {name: tree_size(argument) for name, argument in arguments.items()}
    budget.take(sum(sizes.values()), at, file)

    def visit(node: Node) -> Node:
        if isinstance(node, Name) and node.id in arguments:
            budget.take(sizes[node.id], at, file)
            return arguments[node.id]
        budget.take(1, at, file)
        if isinstance(node, Name):
            return Name(names.get(node.id, node.id), at=at)
        if isinstance(node, Ref) and node.name in arguments:
            raise fail(
                f"macro '{macro.name}' subscripts its parameter '{node.name}'; pass the element instead",
                at,
                file,
            )
        done = rebuild(node, tuple(visit(child) for child in children(node)))
        if isinstance(done, Reduce):
            done = replace(done, indices=tuple(names.get(name, name) for name in done.indices))
        return replace(done, at=at)

    return visit(macro.body)


def parse_macros(text: str, file: str, known: Mapping[str, Macro]) -> dict[str, Macro]:
    """The macros of a text; their bodies may call `known` macros and earlier ones of the text.

    Raises:
        SpecError: for a malformed header, a reserved or repeated name, or a body that binds a foreign index.
    """
    from attnspec.spec.language.reader import Converter

    found: dict[str, Macro] = {}
    budget = Budget()
    for line in logical_lines(text, file):
        equal = split_equation(line, file)
        header = parse_expression(line, 0, equal, file)
        at = node_place(header, line)
        shape = "a macro is `name[index](parameter, other=1.0) = expression`"
        if not isinstance(header, ast.Call):
            raise fail(f"{shape}; found no parameter list", at, file)
        indices: tuple[str, ...] = ()
        target = header.func
        if isinstance(target, ast.Subscript):
            parts = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]
            if not all(isinstance(part, ast.Name) for part in parts):
                raise fail(f"{shape}; index parameters are names", at, file)
            indices = tuple(part.id for part in parts if isinstance(part, ast.Name))
            target = target.value
        if not isinstance(target, ast.Name):
            raise fail(shape, at, file)
        name = target.id
        if name in RESERVED:
            raise fail(f"'{name}' is reserved and cannot be a macro", at, file)
        if name in found:
            raise fail(f"macro '{name}' is defined twice", at, file)
        parameters: list[str] = []
        defaults: dict[str, Node] = {}
        for argument in header.args:
            if not isinstance(argument, ast.Name):
                raise fail(f"{shape}; a parameter is a name", node_place(argument, line), file)
            parameters.append(argument.id)
        scope = {**known, **found}
        for keyword in header.keywords:
            if keyword.arg is None:
                raise fail(f"{shape}; '**' is not part of the language", at, file)
            default = Converter(line, file, {}, budget).convert(keyword.value)
            if not isinstance(default.operand if isinstance(default, Unary) else default, Num):
                raise fail(f"the default of '{keyword.arg}' must be a number", node_place(keyword.value, line), file)
            parameters.append(keyword.arg)
            defaults[keyword.arg] = default
        every = [*indices, *parameters]
        if len(set(every)) < len(every):
            raise fail(f"macro '{name}' names a parameter twice", at, file)
        if reserved := [p for p in every if p in RESERVED]:
            raise fail(f"'{reserved[0]}' is reserved and cannot be a parameter", at, file)
        body = Converter(line, file, scope, budget).convert(parse_expression(line, equal + 1, len(line.text), file))
        body = bounded(body, line.place(equal + 1), file)
        _only_own_indices(body, name, indices, file)
        found[name] = Macro(name, indices, tuple(parameters), defaults, body, file, line.number)
    return found


def _only_own_indices(body: Node, name: str, indices: tuple[str, ...], file: str) -> None:
    for node in subexpressions(body):
        for index in node.indices if isinstance(node, Reduce) else ():
            if index not in indices:
                message = f"macro '{name}' binds '{index}', which is not one of its index parameters"
                raise fail(message, node.at, file)


@cache
def prelude() -> Mapping[str, Macro]:
    """The macros of `prelude.txt`."""
    path = Path(__file__).with_name("prelude.txt")
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise SpecError(f"cannot read the prelude: {error}", file="prelude.txt") from error
    return parse_macros(text, "prelude.txt", {})
