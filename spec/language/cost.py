"""The cost model: operations and bytes of the equations as written, as SymPy polynomials in the sizes.

Used by `perf` and by the claims in mechanism files. The counting rules are in docs/language.md, section 16; the tests
check them against operations counted one by one. It refuses unknown options and inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy

from attnspec.spec.language.check import kind_of
from attnspec.spec.language.macros import children
from attnspec.spec.language.sizes import index_size
from attnspec.spec.language.specialise import Choices, choices, needed, references, specialised
from attnspec.spec.language.syntax import (
    NORMALIZERS,
    Binary,
    Call,
    Compare,
    Cond,
    Definition,
    Kind,
    Logic,
    Name,
    Node,
    Num,
    Program,
    Reduce,
    Ref,
    Unary,
)

Expr = Any
"""A SymPy expression in the sizes."""

EXPONENTIALS = frozenset(
    [
        "exp",
        "exp2",
        "log",
        "log2",
        "log1p",
        "sqrt",
        "rsqrt",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "softplus",
        "elu",
        "gelu",
        "silu",
        "erf",
        "pow",
        "logaddexp",
        "atan2",
    ]
)
SMALL_POWERS = (2, 3, 4)


@dataclass(frozen=True)
class Cost:
    """Counts of one equation, or of all. `dense`: a condition restricts the work and was counted as if it did not."""

    name: str
    line: int
    multiply_adds: Expr
    exponentials: Expr
    bytes: Expr
    dense: bool

    def at(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The three counts as numbers; `sizes` by name, derived ones included."""
        values = {symbol(name): value for name, value in sizes.items()}
        counts = {"multiply_adds": self.multiply_adds, "exponentials": self.exponentials, "bytes": self.bytes}
        return {key: int(expression.subs(values)) for key, expression in counts.items()}


@dataclass(frozen=True)
class CostModel:
    """Costs per equation in the order of the text, their total, and the least traffic of a fused kernel."""

    equations: tuple[Cost, ...]
    total: Cost
    compulsory_bytes: Expr


def symbol(size: str) -> Expr:
    """The SymPy symbol that stands for a declared size."""
    return sympy.Symbol(size, integer=True, nonnegative=True)


def cost(
    program: Program,
    options: Mapping[str, Any] | None = None,
    *,
    present: Collection[str] | None = None,
    itemsize: int = 8,
) -> CostModel:
    """Count the operations and bytes of the equations that the outputs need.

    Args:
        program: checked equations.
        options: option values; the others take their defaults.
        present: the optional inputs that are given; none by default.
        itemsize: bytes of a real number. Ints count 8 bytes, bools 1.

    Raises:
        SpecError: an unknown option or input.
    """
    under = choices(program, options, present)
    lines = specialised(program, under)
    wanted = needed(program, lines)
    counter = _Counter(program, under, itemsize)
    costs = tuple(counter.equation(line) for line in lines if line.name in wanted)
    zero = sympy.Integer(0)
    total = Cost(
        "total",
        0,
        sympy.expand(sum((c.multiply_adds for c in costs), zero)),
        sympy.expand(sum((c.exponentials for c in costs), zero)),
        sympy.expand(sum((c.bytes for c in costs), zero)),
        any(c.dense for c in costs),
    )
    used = set[str]().union(*(references(line.body) for line in lines if line.name in wanted))
    ends = (used & program.declarations.inputs.keys()) | set(program.declarations.outputs)
    return CostModel(costs, total, sympy.expand(sum((counter.tensor_bytes(name) for name in ends), zero)))


@dataclass(frozen=True)
class _Work:
    """Counts for one evaluation of an expression."""

    multiplies: Expr = sympy.S.Zero
    exponentials: Expr = sympy.S.Zero
    dense: bool = False

    def __add__(self, other: _Work) -> _Work:
        return _Work(
            self.multiplies + other.multiplies, self.exponentials + other.exponentials, self.dense or other.dense
        )

    def times(self, factor: Expr) -> _Work:
        return _Work(self.multiplies * factor, self.exponentials * factor, self.dense)

    def as_dense(self) -> _Work:
        """Marked as dense if there is any work that a condition could save."""
        return _Work(self.multiplies, self.exponentials, self.dense or self.multiplies + self.exponentials != 0)


class _Counter:
    def __init__(self, program: Program, under: Choices, itemsize: int) -> None:
        self.program = program
        self.under = under
        self.width: dict[Kind, int] = {"real": itemsize, "int": 8, "bool": 1}
        self.left: frozenset[str] = frozenset()

    def equation(self, line: Definition) -> Cost:
        axes = [node.id for node in line.subscripts if isinstance(node, Name) and self.is_index(node.id)]
        self.left = frozenset(axes)
        points = self.points((*self.program.declarations.batch, *axes))
        work = self.work(line.body).times(points)
        tensors = references(line.body) & (self.program.definitions.keys() | self.program.declarations.inputs.keys())
        traffic = points * self.width[self.program.kinds[line.name]]
        traffic += sum((self.tensor_bytes(name) for name in tensors), sympy.Integer(0))
        return Cost(
            line.name, line.line, sympy.expand(work.multiplies), sympy.expand(work.exponentials),
            sympy.expand(traffic), work.dense,
        )  # fmt: skip

    def is_index(self, name: str) -> bool:
        return name in self.program.declarations.indices

    def points(self, indices: Collection[str]) -> Expr:
        result: Expr = sympy.Integer(1)
        for index in indices:
            result *= self.size(index_size(self.program.declarations, index))
        return result

    def size(self, node: Node) -> Expr:
        """A static int expression of sizes in SymPy; options stand with their values, if they have one."""
        match node:
            case Num(value=value):
                return sympy.sympify(value)
            case Name(id=name):
                given = self.under.options.get(name)
                return symbol(name) if given is None else sympy.sympify(given)
            case Unary(op="-", operand=operand):
                return -self.size(operand)
            case Binary(op=op, left=left, right=right):
                a, b = self.size(left), self.size(right)
                forms = {"+": a + b, "-": a - b, "*": a * b, "**": a**b}
                if op in ("//", "%"):
                    return sympy.floor(a / b) if op == "//" else sympy.Mod(a, b)
                return forms[op]
            case Call(function="min" | "max" as function, arguments=arguments):
                extreme = sympy.Min if function == "min" else sympy.Max
                return extreme(*(self.size(argument) for argument in arguments))
        return sympy.Symbol("(" + type(node).__name__ + ")", integer=True)

    def tensor_bytes(self, name: str) -> Expr:
        decl = self.program.declarations
        if name in decl.inputs:
            entry = decl.inputs[name]
            return self.points((*entry.batch, *entry.axes)) * self.width[entry.kind]
        axes = [node.id for node in self.program.definitions[name].subscripts if isinstance(node, Name)]
        return self.points((*decl.batch, *axes)) * self.width[self.program.kinds[name]]

    def is_static(self, node: Node) -> bool:
        if isinstance(node, Ref | Reduce):
            return False
        if isinstance(node, Name):
            known = node.id in self.program.declarations.inputs or node.id in self.program.definitions
            return not known and not self.is_index(node.id)
        return all(self.is_static(child) for child in children(node))

    def work(self, node: Node) -> _Work:
        if self.is_static(node):
            return _Work()
        match node:
            case Reduce():
                return self.reduce(node)
            case Cond(test=test, then=then, otherwise=otherwise):
                branches = self.work(then) + self.work(otherwise)
                # A test that only sizes decide: the branches may even be static, but which one is unknown here.
                return self.work(test) + (
                    replace(branches, dense=True) if self.is_static(test) else branches.as_dense()
                )
            case Logic(operands=operands):
                first, *others = (self.work(operand) for operand in operands)
                rest = sum(others, _Work()).as_dense()
                return first + (replace(rest, dense=True) if any(map(self.is_static, operands)) else rest)
            case Call(function="present"):
                return _Work()
        below = sum((self.work(child) for child in children(node)), _Work())
        if isinstance(node, Call) and node.function in EXPONENTIALS:
            return below + _Work(exponentials=sympy.Integer(1))
        if isinstance(node, Binary):
            return below + self.binary(node)
        return below

    def binary(self, node: Binary) -> _Work:
        if node.op not in ("*", "/", "**"):
            return _Work()
        if kind_of(node, self.program) == "int":
            return _Work()
        if node.op == "**":
            small = isinstance(node.right, Num) and node.right.value in SMALL_POWERS and type(node.right.value) is int
            if not small:
                return _Work(exponentials=sympy.Integer(1))
        count = node.right.value - 1 if node.op == "**" and isinstance(node.right, Num) else 1
        return _Work(multiplies=sympy.Integer(count))

    def reduce(self, node: Reduce) -> _Work:
        one = sympy.Integer(1)
        zero = sympy.Integer(0)
        body = self.work(node.body)
        condition = _Work() if node.condition is None else self.work(node.condition)
        if node.op in NORMALIZERS:
            # The normalizer's own indices are bound outside: each element of the row is one evaluation.
            own = _Work(one, one) if node.op == "softmax" else _Work()
            every = body + condition + own
            return every if node.condition is None else every.as_dense()
        elements = self.points(node.indices)
        per_element = _Work(one if node.op == "prod" else zero, one if node.op == "logsumexp" else zero) + body
        once = _Work(one if node.op == "mean" else zero, one if node.op == "logsumexp" else zero)
        outer, self.left = self.left, self.left - frozenset(node.indices)
        triangle = self.triangle(node)
        self.left = outer
        if triangle is not None:
            return per_element.times(triangle) + condition.times(elements) + once
        inner = per_element if node.condition is None else per_element.as_dense()
        return (inner + condition).times(elements) + once

    def triangle(self, node: Reduce) -> Expr | None:
        """The mean number of included elements for `j < i` or `j <= i` with `i` on the left, over the same size."""
        condition = node.condition
        if not isinstance(condition, Compare) or len(condition.ops) != 1 or condition.ops[0] in ("==", "!="):
            return None
        names = [operand.id for operand in condition.operands if isinstance(operand, Name)]
        inner = [name for name in names if name in node.indices]
        outer = [name for name in names if name in self.left]
        if len(inner) != 1 or len(outer) != 1:
            return None
        indices = self.program.declarations.indices
        if indices[inner[0]] != indices[outer[0]]:
            return None
        length = self.size(indices[inner[0]])
        half = (length + (1 if condition.ops[0] in ("<=", ">=") else -1)) / sympy.Integer(2)
        return half * self.points([index for index in node.indices if index != inner[0]])
