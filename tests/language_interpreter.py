"""A second evaluator of the equation language, written from docs/language.md: loops, one element at a time.

It shares nothing with the array evaluator but the checked `Program`. Every element of every needed definition is one
Python call; excluded places are never visited, so nothing that stands there can leak. The tests compare the array
evaluator against it and count operations with it. It refuses nothing that the language allows, and is slow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnspec.spec.language.errors import EvaluationError
from attnspec.spec.language.syntax import (
    NORMALIZERS,
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Definition,
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
from attnspec.tests.language_scalars import (
    COMPARE,
    CONSTANTS,
    EXPONENTIALS,
    FUNCTIONS,
    SAME_KIND,
    Value,
    all_finite,
    divide,
    logsumexp,
    power,
    softmax,
)

Env = Mapping[str, int]


class NotStaticError(Exception):
    """The expression is not static."""


@dataclass
class Counts:
    """Operations performed, by the rules of the cost model."""

    multiplies: int = 0
    exponentials: int = 0


def interpret(
    program: Program,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
    counts: Counts | None = None,
) -> dict[str, np.ndarray]:
    """Evaluate by loops; same arguments and results as `attnspec.spec.language.evaluate`."""
    return Interpreter(program, inputs, options or {}, sizes or {}, counts).run(outputs, rows or {})


@dataclass
class Interpreter:
    program: Program
    inputs: Mapping[str, Any]
    given_options: Mapping[str, Any]
    given_sizes: Mapping[str, int]
    counts: Counts | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    memory: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Value] = field(default_factory=dict)
    line: int = 0

    def __post_init__(self) -> None:
        decl = self.program.declarations
        self.arrays = {name: np.asarray(value) for name, value in self.inputs.items()}
        self.sizes = dict(self.given_sizes)
        loose: list[str] = []
        for name, array in self.arrays.items():
            axes = (*decl.inputs[name].batch, *decl.inputs[name].axes)
            for axis, length in zip(axes, array.shape, strict=True):
                size = decl.indices.get(axis, Name(axis))
                one = length == 1 and axis in decl.inputs[name].broadcast
                if isinstance(size, Name) and size.id not in self.sizes and not one:
                    self.sizes[size.id] = length
                if isinstance(size, Name) and one:
                    loose.append(size.id)
        for name in loose:
            self.sizes.setdefault(name, 1)
        for name, size_decl in decl.sizes.items():
            if size_decl.value is not None and name not in self.sizes:
                self.sizes[name] = int(self.value(size_decl.value, {}))
        for name, option in decl.options.items():
            self.options[name] = self.given_options.get(name, option.default)
            if self.options[name] is None and option.formula is not None:
                self.options[name] = self.value(option.formula, {})
            if option.type == "float" and self.options[name] is not None:
                self.options[name] = float(self.options[name])

    # -- the whole ------------------------------------------------------------------------------------------------

    def run(self, outputs: Sequence[str] | None, rows: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        decl = self.program.declarations
        names = list(decl.outputs if outputs is None else outputs)
        if not rows:
            for name in self.needed(names):
                self.table(name, self.axes_of(name), {})
                if name in self.program.boundaries and self.counts is not None:
                    self.initial_line(name)
        result = {}
        for name in names:
            axes = decl.outputs[name].axes if name in decl.outputs else self.axes_of(name)
            result[name] = self.table(name, axes, rows)
        return result

    def axes_of(self, name: str) -> tuple[str, ...]:
        return tuple(node.id for node in self.program.definitions[name].subscripts if isinstance(node, Name))

    def needed(self, names: Sequence[str]) -> list[str]:
        """The names and every definition that they refer to after static folding."""
        found: list[str] = []
        queue = list(names)
        while queue:
            name = queue.pop()
            if name in found or name not in self.program.definitions:
                continue
            found.append(name)
            for table in (self.program.definitions, self.program.boundaries):
                if name in table:
                    queue += self.references(table[name].body)
        return found

    def references(self, node: Node) -> Iterator[str]:
        node = self.fold(node)
        if isinstance(node, Name):
            yield node.id
        if isinstance(node, Ref):
            yield node.name
        if isinstance(node, Call) and node.function == "present":
            return
        for child in children(node):
            yield from self.references(child)

    def fold(self, node: Node) -> Node:
        """Static choices made: the chosen branch, the operands that are left."""
        if isinstance(node, Cond):
            test = self.static(node.test)
            if test is not None:
                return self.fold(node.then if test else node.otherwise)
        if isinstance(node, Logic):
            values = [self.static(operand) for operand in node.operands]
            decides = node.op == "or"
            if decides in values:
                return Bool(decides)
            kept = [self.fold(operand) for operand, value in zip(node.operands, values, strict=True) if value is None]
            return Logic(node.op, tuple(kept)) if kept else Bool(not decides)
        return node

    def static(self, node: Node) -> bool | None:
        """The value of a static condition, None if it is not static."""
        counts, self.counts = self.counts, None
        try:
            return bool(self.value(node, None))
        except NotStaticError:
            return None
        finally:
            self.counts = counts

    def length(self, index: str) -> int:
        return int(self.value(self.program.declarations.indices.get(index, Name(index)), {}))

    def table(self, name: str, axes: Sequence[str], rows: Mapping[str, Sequence[int]]) -> np.ndarray:
        batch = self.program.declarations.batch
        order = self.axes_of(name)
        ranges = [list(range(self.length(index))) for index in batch]
        ranges += [list(rows[index]) if index in rows else list(range(self.length(index))) for index in axes]
        dtype = {"real": np.float64, "int": np.int64, "bool": np.bool_}[self.program.kinds[name]]
        result: np.ndarray[Any, Any] = np.zeros([len(values) for values in ranges], dtype)
        for place in itertools.product(*(range(len(values)) for values in ranges)):
            env = {index: values[k] for index, values, k in zip((*batch, *axes), ranges, place, strict=True)}
            result[place] = self.element(name, tuple(env[index] for index in order), env)
        return result

    def initial_line(self, name: str) -> None:
        """Evaluate a whole initial line, used or not: the cost model counts it."""
        decl = self.program.declarations
        scan = next(scan for scan in self.program.scans if name in scan.names)
        order = self.axes_of(name)
        ranges = [range(self.length(index)) for index in decl.batch]
        edge = -1 if scan.step > 0 else self.length(scan.index)
        ranges += [range(edge, edge + 1) if index == scan.index else range(self.length(index)) for index in order]
        for place in itertools.product(*ranges):
            env = dict(zip(decl.batch, place, strict=False))
            self.element(name, place[len(decl.batch) :], env)

    # -- elements -------------------------------------------------------------------------------------------------

    def element(self, name: str, subscripts: tuple[int, ...], env: Env) -> Value:
        if name in self.program.definitions:
            return self.defined(name, subscripts, env)
        decl = self.program.declarations.inputs[name]
        if name not in self.arrays:
            raise EvaluationError(f"input {name!r} is absent", equation=self.line)
        for axis, subscript in zip(decl.axes, subscripts, strict=True):
            self.inside(name, subscript, self.length(axis))
        array = self.arrays[name]
        place = (*(env[axis] for axis in decl.batch), *subscripts)
        value = array[tuple(0 if length == 1 else at for at, length in zip(place, array.shape, strict=True))].item()
        return float(value) if decl.kind == "real" else value

    def inside(self, name: str, subscript: int, length: int) -> None:
        if not 0 <= subscript < length:
            raise EvaluationError(f"subscript {subscript} of {name!r} outside 0..{length - 1}", equation=self.line)

    def defined(self, name: str, subscripts: tuple[int, ...], env: Env) -> Value:
        batch = self.program.declarations.batch
        key = (name, tuple(env[index] for index in batch), subscripts)
        if key not in self.memory:
            here = {index: env[index] for index in batch}
            definition = self.line_for(name, subscripts)
            for node, subscript in zip(definition.subscripts, subscripts, strict=True):
                if isinstance(node, Name) and node.id in self.program.declarations.indices:
                    self.inside(name, subscript, self.length(node.id))
                    here[node.id] = subscript
            outer, self.line = self.line, definition.line
            value = self.value(definition.body, here)
            self.line = outer
            self.memory[key] = float(value) if self.program.kinds[name] == "real" else value
        return self.memory[key]

    def line_for(self, name: str, subscripts: tuple[int, ...]) -> Definition:
        """The definition, or its initial line where the scan subscript stands at the boundary."""
        for scan in self.program.scans:
            if name in scan.names and name in self.program.boundaries:
                axes = [node.id if isinstance(node, Name) else "" for node in self.program.definitions[name].subscripts]
                boundary = -1 if scan.step > 0 else self.length(scan.index)
                if subscripts[axes.index(scan.index)] == boundary:
                    return self.program.boundaries[name]
        return self.program.definitions[name]

    # -- expressions ----------------------------------------------------------------------------------------------

    def value(self, node: Node, env: Env | None) -> Value:
        """The value of `node`; with `env` None only static expressions have one (NotStaticError otherwise)."""
        if isinstance(node, Num | Str | Bool):
            return node.value
        if isinstance(node, Name):
            return self.named(node.id, env)
        if isinstance(node, Unary):
            operand = self.value(node.operand, env)
            return (not operand) if node.op == "not" else -operand if node.op == "-" else operand
        if isinstance(node, Binary):
            return self.binary(node, env)
        if isinstance(node, Compare):
            operands = [self.value(operand, env) for operand in node.operands]
            return all(COMPARE[op](a, b) for op, a, b in zip(node.ops, operands, operands[1:], strict=False))
        if isinstance(node, Logic):
            decides = node.op == "or"
            if env is not None and any(self.static(operand) is decides for operand in node.operands):
                return decides
            for operand in node.operands:
                if self.value(operand, env) is decides:
                    return decides
            return not decides
        if isinstance(node, Cond):
            value = self.value(node.then if self.value(node.test, env) else node.otherwise, env)
            return float(value) if type(value) is int and not self.is_int(node) else value
        if isinstance(node, Call):
            return self.call(node, env)
        if env is None:
            if isinstance(node, Ref):
                return self.static_definition(node.name, node.subscripts)
            raise NotStaticError
        if isinstance(node, Ref):
            return self.element(node.name, tuple(self.value(sub, env) for sub in node.subscripts), env)
        assert isinstance(node, Reduce)
        return self.normalized(node, env) if node.op in NORMALIZERS else self.reduced(node, env)

    def named(self, name: str, env: Env | None) -> Value:
        if env is not None and name in env:
            return env[name]
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in self.sizes:
            return self.sizes[name]
        if name in self.options:
            if self.options[name] is None:
                raise (
                    NotStaticError if env is None else EvaluationError(f"option {name!r} is absent", equation=self.line)
                )
            return self.options[name]
        if env is None:
            return self.static_definition(name, ())
        return self.element(name, (), env)

    def static_definition(self, name: str, subscripts: tuple[Node, ...]) -> Value:
        """The value of a definition whose right side is static, referred to with the indices of its left side."""
        definition = self.program.definitions.get(name)
        if definition is None or name in self.program.boundaries or definition.subscripts != subscripts:
            raise NotStaticError
        value = self.value(definition.body, None)
        return float(value) if self.program.kinds[name] == "real" else value

    def binary(self, node: Binary, env: Env | None) -> Value:
        a, b = self.value(node.left, env), self.value(node.right, env)
        if node.op in ("//", "%"):
            if b == 0:
                raise EvaluationError(f"{node.op} by zero", equation=self.line)
            return a // b if node.op == "//" else a % b
        if node.op == "**":
            static_power = type(a) is int and type(b) is int and b >= 0
            if self.counts is not None and not static_power and not self.is_static(node):
                if type(b) is int and 2 <= b <= 4 and self.is_static(node.right):
                    self.counts.multiplies += b - 1
                else:
                    self.counts.exponentials += 1
            return a**b if static_power else power(a, b)
        counted = self.counts is not None and not self.is_int(node) and not self.is_static(node)
        if node.op in ("*", "/") and counted and self.counts is not None:
            self.counts.multiplies += 1
        if node.op == "/":
            return divide(a, b)
        return a + b if node.op == "+" else a - b if node.op == "-" else a * b

    def is_int(self, node: Node) -> bool:
        """Whether an expression is of kind int (bools are asked about nowhere)."""
        decl = self.program.declarations
        if isinstance(node, Num):
            return type(node.value) is int
        if isinstance(node, Name | Ref):
            name = node.id if isinstance(node, Name) else node.name
            if name in decl.options:
                return decl.options[name].type == "int"
            if name in decl.inputs:
                return decl.inputs[name].kind == "int"
            if name in self.program.kinds:
                return self.program.kinds[name] == "int"
            return name not in CONSTANTS
        if isinstance(node, Binary) and node.op == "/":
            return False
        if isinstance(node, Binary) and node.op == "**" and isinstance(node.right, Unary) and node.right.op == "-":
            return False
        if isinstance(node, Cond):
            return self.is_int(node.then) and self.is_int(node.otherwise)
        if isinstance(node, Call):
            if node.function in ("floor", "ceil"):
                return True
            return node.function in SAME_KIND and all(self.is_int(argument) for argument in node.arguments)
        if isinstance(node, Reduce):
            if node.op in ("rank", "argsort", "argmax"):
                return True
            return node.op in ("sum", "prod", "max", "min") and self.is_int(node.body)
        return all(self.is_int(child) for child in children(node))

    def is_static(self, node: Node) -> bool:
        """Whether an expression is static once choices are made (the cost model does not look into definitions)."""
        node = self.fold(node)
        if isinstance(node, Ref | Reduce):
            return False
        if isinstance(node, Name):
            return node.id in self.sizes or node.id in self.options or node.id in CONSTANTS
        return all(self.is_static(child) for child in children(node))

    def call(self, node: Call, env: Env | None) -> Value:
        if node.function == "present":
            (argument,) = node.arguments
            assert isinstance(argument, Name)
            if argument.id in self.program.declarations.inputs:
                return argument.id in self.arrays
            return self.options[argument.id] is not None
        arguments = [self.value(argument, env) for argument in node.arguments]
        if self.counts is not None and node.function in EXPONENTIALS and not self.is_static(node):
            self.counts.exponentials += 1
        try:
            return FUNCTIONS[node.function](*arguments)
        except EvaluationError as error:
            raise EvaluationError(error.message, equation=self.line) from None

    # -- reductions -----------------------------------------------------------------------------------------------

    def places(self, node: Reduce, env: Env) -> Iterator[tuple[tuple[int, ...], dict[str, int], bool]]:
        for place in itertools.product(*(range(self.length(index)) for index in node.indices)):
            inner = {**env, **dict(zip(node.indices, place, strict=True))}
            yield place, inner, node.condition is None or self.value(node.condition, inner)

    def reduced(self, node: Reduce, env: Env) -> Value:
        included = [(place, self.value(node.body, inner)) for place, inner, keep in self.places(node, env) if keep]
        values = [value for _, value in included]
        if self.counts is not None:
            self.counts.multiplies += len(values) if node.op == "prod" else int(node.op == "mean")
            self.counts.exponentials += len(values) + 1 if node.op == "logsumexp" else 0
        if node.op == "sum":
            return math.fsum(values) if all_finite(values) else sum(values)
        if node.op == "prod":
            result: Value = 1
            for value in values:
                result = result * value
            return result
        if node.op in ("max", "min"):
            if not values:
                if self.is_int(node.body):
                    return -(2**63) if node.op == "max" else 2**63 - 1
                return -math.inf if node.op == "max" else math.inf
            return FUNCTIONS[node.op](*values)
        if node.op == "mean":
            total = math.fsum(values) if all_finite(values) else float(sum(values))
            return total / len(values) if values else 0.0
        if node.op == "any":
            return any(values)
        if node.op == "all":
            return all(values)
        if node.op == "logsumexp":
            return logsumexp(values)
        assert node.op == "argmax"
        self.no_nan(node.op, values)
        best = max(values, default=None)
        return next((place[0] for place, value in included if value == best), -1)

    def normalized(self, node: Reduce, env: Env) -> Value:
        outer = tuple(env[index] for index in node.indices)
        counts, self.counts = self.counts, None
        places = list(self.places(node, env))
        included = {place: self.value(node.body, inner) for place, inner, keep in places if keep}
        self.counts = counts
        if self.counts is not None and outer in included:
            # One element of the row is asked for at a time, so only its own share is counted.
            self.value(node.body, env)
            self.counts.exponentials += node.op == "softmax"
            self.counts.multiplies += node.op == "softmax"
        if node.op == "softmax":
            return softmax(included).get(outer, 0.0)
        self.no_nan(node.op, list(included.values()))
        order = self.in_order(included)
        order += [place for place, _, keep in places if not keep]
        if node.op == "rank":
            return order.index(outer)
        return order[outer[0]][0]

    def in_order(self, included: Mapping[tuple[int, ...], Value]) -> list[tuple[int, ...]]:
        """Places from the largest value to the smallest; the lower index first on ties."""
        return sorted(included, key=lambda place: (-included[place], place))

    def no_nan(self, op: str, values: Sequence[Value]) -> None:
        if any(value != value for value in values):
            raise EvaluationError(f"NaN in {op}", equation=self.line)


def children(node: Node) -> list[Node]:
    """The nodes directly below."""
    below: dict[type, Callable[[Any], list[Node]]] = {
        Ref: lambda n: list(n.subscripts),
        Unary: lambda n: [n.operand],
        Binary: lambda n: [n.left, n.right],
        Compare: lambda n: list(n.operands),
        Logic: lambda n: list(n.operands),
        Cond: lambda n: [n.test, n.then, n.otherwise],
        Call: lambda n: list(n.arguments),
        Reduce: lambda n: [n.body] if n.condition is None else [n.condition, n.body],
    }
    return below[type(node)](node) if type(node) in below else []
