"""Kinds of expressions: real, integer, condition (and strings, which are only compared with options).

Used by `check`, by static folding and by the evaluators. It refuses conditions where a number is wanted,
reals as subscripts or in `//` and `%`, and strings anywhere but in a comparison with an enumerated option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.functions import CONSTANTS, FUNCTIONS
from attnspec.spec.language.syntax import (
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Declarations,
    Definition,
    Kind,
    Logic,
    Name,
    Node,
    Num,
    Program,
    Reduce,
    Ref,
    Str,
    Unary,
)
from attnspec.spec.language.text import fail

_OPTION_KINDS: dict[str, str] = {"int": "int", "float": "real", "bool": "bool", "enum": "text"}
_NOUNS = {"real": "a real number", "int": "an integer", "bool": "a condition", "text": "a string"}


class Kinds:
    """Kinds of expressions under declarations; `known` holds those of the definitions met so far."""

    def __init__(self, declarations: Declarations, definitions: Mapping[str, Definition], file: str) -> None:
        self.declarations = declarations
        self.mains = definitions
        self.file = file
        self.known: dict[str, str] = {}

    def error(self, message: str, node: Node) -> SpecError:
        return fail(message, node.at, self.file)

    def all(
        self,
        order: Sequence[str],
        boundaries: Mapping[str, Definition],
        groups: Mapping[str, tuple[str, ...]],
    ) -> dict[str, Kind]:
        """The kind of each definition; a recurrence's is the join of its boundary's and its body's."""
        done: set[str] = set()
        for name in order:
            if name in done:
                continue
            group = groups.get(name, (name,))
            done.update(group)
            if name not in groups:
                self.known[name] = self.value(name, self.mains[name].body)
                continue
            for member in group:
                self.known[member] = self.value(member, boundaries[member].body) if member in boundaries else "int"
            changed = True
            while changed:
                changed = False
                for member in group:
                    kind = self.value(member, self.mains[member].body)
                    if member not in boundaries and self.known[member] == "int" and kind == "bool":
                        joined = "bool"
                    else:
                        joined = self.join(self.known[member], kind, self.mains[member].body)
                    changed |= joined != self.known[member]
                    self.known[member] = joined
        return {name: cast(Kind, kind) for name, kind in self.known.items()}

    def value(self, name: str, body: Node) -> str:
        kind = self.kind(body)
        if kind == "text":
            raise self.error(f"'{name}' would be a string; strings are only compared with options", body)
        return kind

    def join(self, first: str, second: str, node: Node) -> str:
        if first == second:
            return first
        if {first, second} == {"int", "real"}:
            return "real"
        raise self.error(f"one branch is {_NOUNS[first]}, the other {_NOUNS[second]}", node)

    def number(self, node: Node, what: str) -> str:
        kind = self.kind(node)
        if kind not in ("real", "int"):
            hint = "; write `1 if … else 0`" if kind == "bool" else ""
            raise self.error(f"{what} must be a number, got {_NOUNS[kind]}{hint}", node)
        return kind

    def expect(self, node: Node, wanted: str, what: str) -> None:
        kind = self.kind(node)
        if kind != wanted:
            raise self.error(f"{what} must be {_NOUNS[wanted]}, got {_NOUNS[kind]}", node)

    def kind(self, node: Node) -> str:
        """The kind of an expression: real, int, bool, or text (a string or an enumerated option)."""
        match node:
            case Num(value=value):
                return "int" if isinstance(value, int) else "real"
            case Str():
                return "text"
            case Bool():
                return "bool"
            case Name(id=name):
                return self.leaf(name)
            case Ref(name=name, subscripts=subscripts):
                for position, subscript in enumerate(subscripts, 1):
                    self.expect(subscript, "int", f"subscript {position} of '{name}'")
                return self.leaf(name)
            case Unary(op="not", operand=operand):
                self.expect(operand, "bool", "the operand of 'not'")
                return "bool"
            case Unary(op=op, operand=operand):
                return self.number(operand, f"the operand of '{op}'")
            case Binary():
                return self.binary(node)
            case Compare():
                return self.compare(node)
            case Logic(op=op, operands=operands):
                for operand in operands:
                    self.expect(operand, "bool", f"the operand of '{op}'")
                return "bool"
            case Cond(test=test, then=then, otherwise=otherwise):
                self.expect(test, "bool", "the test of 'if'")
                first, second = self.kind(then), self.kind(otherwise)
                return self.join(first, second, otherwise)
            case Call(function=function, arguments=arguments):
                return self.call(function, arguments)
            case Reduce():
                return self.reduction(node)
        raise self.error("this is not an expression", node)

    def leaf(self, name: str) -> str:
        decl = self.declarations
        if name in self.known:
            return self.known[name]
        if name in decl.inputs:
            return decl.inputs[name].kind
        if name in decl.options:
            return _OPTION_KINDS[decl.options[name].type]
        return "real" if name in CONSTANTS else "int"

    def binary(self, node: Binary) -> str:
        left = self.number(node.left, f"the left operand of '{node.op}'")
        right = self.number(node.right, f"the right operand of '{node.op}'")
        if node.op in ("//", "%"):
            for side, kind in ((node.left, left), (node.right, right)):
                if kind != "int":
                    raise self.error(
                        f"'{node.op}' needs integers, got {_NOUNS[kind]}; use floor(a / b) for reals", side
                    )
            return "int"
        if node.op == "/":
            return "real"
        if node.op == "**" and isinstance(node.right, Unary) and node.right.op == "-":
            return "real"
        return "int" if left == right == "int" else "real"

    def compare(self, node: Compare) -> str:
        kinds = [self.kind(operand) for operand in node.operands]
        if "text" in kinds:
            self.text_comparison(node, kinds)
            return "bool"
        if "bool" in kinds and (set(kinds) != {"bool"} or not set(node.ops) <= {"==", "!="}):
            raise self.error("a condition is compared with == or != to a condition only", node)
        return "bool"

    def text_comparison(self, node: Compare, kinds: list[str]) -> None:
        ok = len(kinds) == 2 and node.ops[0] in ("==", "!=") and kinds == ["text", "text"]
        options = [o for o in node.operands if isinstance(o, Name)]
        strings = [o for o in node.operands if isinstance(o, Str)]
        if not ok or len(options) != 1 or len(strings) != 1:
            raise self.error("a string is only compared, with == or !=, to an enumerated option", node)
        option = self.declarations.options[options[0].id]
        if strings[0].value not in option.choices:
            raise self.error(
                f"option '{option.name}' has no choice '{strings[0].value[:40]}'; it is one of "
                f"{', '.join(option.choices)}",
                strings[0],
            )

    def call(self, function: str, arguments: tuple[Node, ...]) -> str:
        if function == "present":
            return "bool"
        kinds = [self.number(argument, f"the argument of {function}") for argument in arguments]
        gives = FUNCTIONS[function].gives
        if gives == "same":
            return "int" if all(kind == "int" for kind in kinds) else "real"
        return gives

    def reduction(self, node: Reduce) -> str:
        if node.condition is not None:
            self.expect(node.condition, "bool", f"the condition of {node.op}")
        if node.op in ("any", "all"):
            self.expect(node.body, "bool", f"the operand of {node.op}")
            return "bool"
        kind = self.number(node.body, f"the operand of {node.op}")
        if node.op in ("argmax", "rank", "argsort"):
            return "int"
        return "real" if node.op in ("mean", "softmax", "logsumexp") else kind


def kind_of(node: Node, program: Program) -> Kind:
    """The kind of an expression of a checked program (used by the evaluators)."""
    checker = Kinds(program.declarations, program.definitions, program.file)
    checker.known = dict(program.kinds)
    return cast(Kind, checker.kind(node))
