"""Static folding: what sizes, options and the presence of inputs already decide is decided before evaluation.

`fold` replaces static names by literals, evaluates static expressions with Python's exact integers and
float64, and keeps only the chosen branch of a static `if`, `and` or `or`, so that the others may refer to
absent inputs. `Plan` holds the folded definitions of a program for one setting; plans are cached, as a suite
evaluates the same setting many times.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from attnspec.spec.language.errors import EvaluationError
from attnspec.spec.language.kinds import kind_of
from attnspec.spec.language.macros import children, rebuild
from attnspec.spec.language.syntax import (
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
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

Literal = int | float | bool | str
_LITERALS = (Num, Bool, Str)
_EMPTY: dict[str, Node] = {
    "mean": Num(0.0), "any": Bool(False), "all": Bool(True), "logsumexp": Num(-math.inf), "argmax": Num(-1),
    "softmax": Num(0.0),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Everything static: known sizes, options with their defaults (None: absent), and what is present."""

    sizes: Mapping[str, int]
    options: Mapping[str, Literal | None]
    present: frozenset[str]


def literal(value: Literal, like: Node) -> Node:
    """The literal node of a value, at the place of another node."""
    if isinstance(value, bool):
        return Bool(value, at=like.at)
    if isinstance(value, str):
        return Str(value, at=like.at)
    return Num(value, at=like.at)


class Folder:
    """Folds expressions for one setting. `known` maps scalar or constant definitions to their literals.

    `kind` gives the kind of an expression of the program; with it, folding keeps kinds: an integer branch of
    an `if` that is real stays real.
    """

    def __init__(
        self,
        setting: Setting,
        file: str,
        known: Mapping[str, Node] | None = None,
        kind: Callable[[Node], str] | None = None,
    ) -> None:
        self.setting = setting
        self.kind = kind
        self.file = file
        self.known = dict(known or {})
        self.plain_left: dict[str, tuple[str, ...]] = {}

    def error(self, message: str, node: Node) -> EvaluationError:
        return EvaluationError(message, file=self.file, equation=node.at.line or None, column=node.at.column or None)

    def fold(self, node: Node) -> Node:
        """The folded node; a literal when it is static."""
        match node:
            case Num() | Bool() | Str():
                return node
            case Name():
                return self.name(node)
            case Call(function="present", arguments=(Name(id=name),)):
                return Bool(name in self.setting.present, at=node.at)
            case Cond(test=test, then=then, otherwise=otherwise):
                chosen = self.fold(test)
                if isinstance(chosen, Bool):
                    return self.chosen(node, then if chosen.value else otherwise)
                return replace(node, test=chosen, then=self.fold(then), otherwise=self.fold(otherwise))
            case Logic():
                return self.logic(node)
            case Reduce():
                return self.reduce(node)
        parts = tuple(self.fold(child) for child in children(node))
        if isinstance(node, Ref):
            known = self.known.get(node.name)
            if known is not None and all(isinstance(p, Name) for p in parts):
                names = tuple(p.id for p in parts if isinstance(p, Name))
                if names == self.plain_left.get(node.name):
                    return replace(known, at=node.at)
            return rebuild(node, parts)
        if all(isinstance(part, _LITERALS) for part in parts):
            values = [part.value for part in parts if isinstance(part, Num | Bool | Str)]
            return literal(self.compute(node, values), node)
        return _simplified(rebuild(node, parts))

    def chosen(self, node: Cond, branch: Node) -> Node:
        """The folded branch, in the kind of the whole `if`."""
        folded = self.fold(branch)
        if self.kind is None or self.kind(branch) != "int" or self.kind(node) == "int":
            return folded
        if isinstance(folded, Num):
            return replace(folded, value=float(folded.value))
        return Binary("+", folded, Num(0.0), at=folded.at)

    def name(self, node: Name) -> Node:
        name, setting = node.id, self.setting
        if name == "inf":
            return Num(math.inf, at=node.at)
        if name == "pi":
            return Num(math.pi, at=node.at)
        if name in setting.sizes:
            return Num(setting.sizes[name], at=node.at)
        if name in setting.options:
            value = setting.options[name]
            if value is None:
                raise self.error(f"option '{name}' is not set here; guard its use with present({name})", node)
            return literal(value, node)
        known = self.known.get(name)
        return node if known is None else replace(known, at=node.at)

    def logic(self, node: Logic) -> Node:
        decisive = node.op == "or"
        kept: list[Node] = []
        for operand in node.operands:
            folded = self.fold(operand)
            if isinstance(folded, Bool):
                if folded.value == decisive:
                    return Bool(decisive, at=node.at)
                continue
            kept.append(folded)
        if not kept:
            return Bool(not decisive, at=node.at)
        return kept[0] if len(kept) == 1 else replace(node, operands=tuple(kept))

    def reduce(self, node: Reduce) -> Node:
        condition = None if node.condition is None else self.fold(node.condition)
        if isinstance(condition, Bool):
            if not condition.value and node.op in _EMPTY:
                return replace(_EMPTY[node.op], at=node.at)
            if condition.value:
                condition = None
        return replace(node, condition=condition, body=self.fold(node.body))

    def compute(self, node: Node, values: list[Literal]) -> Literal:
        """The value of an operation on literals. Integers stay below 2**63."""
        match node:
            case Unary(op="not"):
                return not values[0]
            case Unary(op="-"):
                return self.bounded(-values[0], node)  # type: ignore[operator]
            case Unary():
                return values[0]
            case Binary(op=op):
                return self.bounded(self.binary(op, values[0], values[1], node), node)
            case Compare(ops=ops):
                return all(compare(op, a, b) for op, a, b in zip(ops, values, values[1:]))
            case Call(function=function):
                from attnspec.spec.language.elementwise import scalar_function

                if function in ("floor", "ceil") and not math.isfinite(values[0]):  # type: ignore[arg-type]
                    raise self.error(f"{function} of a number that is not finite", node)
                return self.bounded(scalar_function(function, values), node)
        raise self.error("not a static expression", node)

    def bounded(self, value: Literal, node: Node) -> Literal:
        if isinstance(value, int) and abs(value) > 2**63 - 1:
            raise self.error("static integer larger than 2**63 - 1", node)
        return value

    def binary(self, op: str, a: Literal, b: Literal, node: Node) -> Literal:
        assert isinstance(a, int | float) and isinstance(b, int | float)
        if op in ("//", "%") and b == 0:
            raise self.error(f"'{op}' by zero", node)
        if op == "**":
            if isinstance(a, int) and isinstance(b, int) and b >= 0:
                if abs(a) > 1 and b * math.log2(abs(a)) > 63.5:
                    raise self.error("static integer larger than 2**63 - 1", node)
                return int(a**b)
            value = scalar_power(float(a), float(b))
            if math.isfinite(a) and math.isfinite(b) and not math.isfinite(value) and a != 0:
                raise self.error("power without a finite value", node)
            return value
        return scalar_binary(op, a, b)


def compare(op: str, a: Literal, b: Literal) -> bool:
    """One comparison of two literals."""
    if op == "==":
        return a == b
    if op == "!=":
        return a != b
    assert not isinstance(a, str) and not isinstance(b, str)
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[op]


def scalar_power(a: float, b: float) -> float:
    """`a ** b` as IEEE has it: NaN and infinities instead of exceptions."""
    try:
        value = a**b
    except ZeroDivisionError:
        return math.inf
    except OverflowError:
        return -math.inf if a < 0 and b % 2 == 1 else math.inf
    return value if isinstance(value, float) else math.nan


def scalar_binary(op: str, a: int | float, b: int | float) -> int | float:
    """A binary operation on Python numbers with IEEE division; `//` and `%` by zero are the caller's business."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    if op == "//":
        return a // b
    if op == "%":
        return a % b
    if op == "**":
        return scalar_power(float(a), float(b)) if isinstance(a, float) or isinstance(b, float) or b < 0 else a**b
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)
    try:
        return a / b
    except OverflowError:
        return math.inf


def _is(node: Node, value: int) -> bool:
    return isinstance(node, Num) and type(node.value) is int and node.value == value


def _simplified(node: Node) -> Node:
    """Drops operations without effect, such as `+ 0` of an absent bias and `// 1` of a single head group."""
    if isinstance(node, Binary):
        left, right, op = node.left, node.right, node.op
        if (op in ("+", "-") and _is(right, 0)) or (op in ("*", "/", "//") and _is(right, 1)):
            return left if op != "/" else node
        if (op == "+" and _is(left, 0)) or (op == "*" and _is(left, 1)):
            return right
        if op == "%" and _is(right, 1):
            return Num(0, at=node.at)
    return node


def static_value(
    node: Node,
    *,
    sizes: Mapping[str, int],
    options: Mapping[str, Literal | None] | None = None,
    present: frozenset[str] | set[str] = frozenset(),
    file: str = "<text>",
) -> Literal | None:
    """The value of a static expression, or None when it needs something that is not known.

    Raises:
        EvaluationError: when it can be computed but has no value (division by zero, an integer that is too
        large).
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    folded = Folder(Setting(sizes, given, frozenset(present)), file).fold(node)
    return folded.value if isinstance(folded, Num | Bool | Str) else None


class Plan:
    """The folded definitions of a program. A definition that cannot be folded keeps its error until it is needed."""

    def __init__(self, program: Program, setting: Setting) -> None:
        self.program = program
        self.setting = setting
        self.bodies: dict[str, Node | EvaluationError] = {}
        self.edges: dict[str, Node | EvaluationError] = {}
        folder = Folder(setting, program.file, kind=lambda node: kind_of(node, program))
        for name in program.order:
            definition = program.definitions[name]
            try:
                body: Node | EvaluationError = folder.fold(definition.body)
            except EvaluationError as error:
                body = error
            if isinstance(body, _LITERALS):
                if isinstance(body, Num) and program.kinds[name] == "real":
                    body = replace(body, value=float(body.value))
                folder.known[name] = body
                folder.plain_left[name] = tuple(s.id for s in definition.subscripts if isinstance(s, Name))
            self.bodies[name] = body
            if name in program.boundaries:
                try:
                    self.edges[name] = folder.fold(program.boundaries[name].body)
                except EvaluationError as error:
                    self.edges[name] = error
        self.size_of: dict[str, int | None] = {}
        for index, size in program.declarations.indices.items():
            try:
                value = folder.fold(size)
            except EvaluationError:
                value = size
            self.size_of[index] = value.value if isinstance(value, Num) and isinstance(value.value, int) else None

    def body(self, name: str) -> Node:
        """The folded right side of a definition. Raises the EvaluationError met when folding it."""
        return _checked(self.bodies[name])

    def edge(self, name: str) -> Node:
        """The folded right side of an initial line."""
        return _checked(self.edges[name])


def _checked(body: Node | EvaluationError) -> Node:
    if isinstance(body, EvaluationError):
        raise EvaluationError(body.message, file=body.file, equation=body.equation, column=body.column)
    return body


_PLANS: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
_MAX_PLANS = 512


def plan_for(program: Program, setting: Setting) -> Plan:
    """The plan of a program for a setting, from the cache of recently used ones where it was made before.

    A cached plan keeps its program alive, so that the program's id in the key stays its own.
    """
    key = (
        id(program),
        tuple(sorted(setting.sizes.items())),
        tuple(sorted((name, type(value).__name__, str(value)) for name, value in setting.options.items())),
        setting.present,
    )
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = Plan(program, setting)
        if len(_PLANS) > _MAX_PLANS:
            _PLANS.popitem(last=False)
    else:
        _PLANS.move_to_end(key)
    return plan
