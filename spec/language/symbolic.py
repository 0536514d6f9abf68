"""Equations on SymPy expressions: every element of the result is the formula that the paper's equations give.

Used to prove identities between mechanisms at tiny sizes (`prove.prove_equal`). Results are exact: float literals and
options become the rational numbers that they show (`0.1` is 1/10), and `softmax` and `logsumexp` are plain sums of
exponentials without a maximum subtracted. It refuses conditions, ranks and subscripts that SymPy cannot decide.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sympy

from attnspec.spec.language.errors import EvaluationError
from attnspec.spec.language.sizes import index_size, infer_sizes, resolve_options
from attnspec.spec.language.symbolic_functions import (
    FUNCTIONS,
    RELATIONS,
    SAME_KIND,
    Value,
    exact,
    logsumexp,
    quotient,
    same_kind,
)
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

MAX_ELEMENTS = 20_000


def sympy_evaluate(
    program: Program,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Evaluate symbolically.

    Args:
        program: checked equations.
        inputs: object arrays of SymPy expressions or numbers, shape `[*batch, *axes]`; symbols should be real.
        options: option values; a SymPy expression may stand for an int or float option.
        sizes: sizes that the inputs' shapes do not determine.
        outputs: names of definitions; the declared outputs by default.

    Returns:
        Object arrays by name, shape `[*batch, *axes]`.

    Raises:
        EvaluationError: bad arguments, a subscript outside its tensor, or a condition that SymPy cannot decide.
    """
    return _Evaluator(program, inputs, options or {}, sizes).run(outputs)


def symbols(name: str, *shape: int) -> Any:
    """An object array of real symbols `name_0_1`; a scalar symbol's array without a shape."""
    array = np.empty(shape, dtype=object)
    for place in itertools.product(*(range(length) for length in shape)):
        array[place] = sympy.Symbol("_".join([name, *map(str, place)]), real=True)
    return array


class _Evaluator:
    def __init__(
        self, program: Program, inputs: Mapping[str, Any], options: Mapping[str, Any], sizes: Mapping[str, int] | None
    ) -> None:
        self.program = program
        self.decl = program.declarations
        self.arrays = {name: np.asarray(value, dtype=object) for name, value in inputs.items()}
        free = {name: value for name, value in options.items() if isinstance(value, sympy.Basic)}
        numeric = {name: value for name, value in options.items() if name not in free}
        self.sizes = infer_sizes(self.decl, self.arrays, sizes, options=numeric, file=program.file)
        rest = dataclasses.replace(
            self.decl, options={name: entry for name, entry in self.decl.options.items() if name not in free}
        )
        resolved = resolve_options(rest, numeric, self.sizes, file=program.file)
        self.line: Definition | None = None
        self.options: dict[str, Value] = {**resolved, **free}
        for name, entry in self.decl.options.items():
            if entry.formula is not None and options.get(name) is None:
                self.options[name] = self.value(entry.formula, {})
            elif isinstance(self.options[name], float):
                self.options[name] = exact(self.options[name])
        self.memory: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Value] = {}

    def run(self, outputs: Sequence[str] | None) -> dict[str, Any]:
        names = list(self.decl.outputs if outputs is None else outputs)
        results: dict[str, Any] = {}
        for name in names:
            if name not in self.program.definitions:
                raise EvaluationError(f"{name!r} is not defined", file=self.program.file)
            order = [s.id for s in self.program.definitions[name].subscripts if isinstance(s, Name)]
            axes = self.decl.outputs[name].axes if name in self.decl.outputs else tuple(order)
            every = (*self.decl.batch, *axes)
            lengths = [self.length(index) for index in every]
            if math.prod(lengths) > MAX_ELEMENTS:
                raise EvaluationError(
                    f"{name!r} has {math.prod(lengths)} elements; symbolic evaluation takes at most {MAX_ELEMENTS}",
                    file=self.program.file,
                )
            results[name] = np.empty(lengths, dtype=object)
            for place in itertools.product(*(range(length) for length in lengths)):
                env = dict(zip(every, place))
                value = self.element(name, tuple(env[index] for index in order), env)
                results[name][place] = value if isinstance(value, bool) else sympy.sympify(value)
        return results

    def error(self, message: str, node: Node | None = None) -> EvaluationError:
        line = None if self.line is None else self.line.line
        column = node.at.column or None if node is not None and line is not None else None
        return EvaluationError(message, file=self.program.file, equation=line, column=column)

    def length(self, index: str) -> int:
        value = self.value(index_size(self.decl, index), {})
        return int(value)

    # Elements ---------------------------------------------------------------------------------------------------

    def element(self, name: str, place: tuple[int, ...], env: Mapping[str, int], node: Node | None = None) -> Value:
        if name in self.program.definitions:
            return self.defined(name, place, env, node)
        entry = self.decl.inputs[name]
        if name not in self.arrays:
            raise self.error(f"input {name!r} is absent here", node)
        for axis, subscript in zip(entry.axes, place):
            self.inside(name, subscript, self.length(axis), node)
        array = self.arrays[name]
        full = (*(env[axis] for axis in entry.batch), *place)
        value = array[tuple(0 if length == 1 else at for at, length in zip(full, array.shape))]
        if entry.kind == "real":
            return exact(value)
        return bool(value) if entry.kind == "bool" else int(value)

    def inside(self, name: str, subscript: int, length: int, node: Node | None) -> None:
        if not 0 <= subscript < length:
            raise self.error(f"subscript {subscript} of {name!r} is outside 0..{length - 1}", node)

    def defined(self, name: str, place: tuple[int, ...], env: Mapping[str, int], node: Node | None) -> Value:
        key = (name, tuple(env[index] for index in self.decl.batch), place)
        if key in self.memory:
            return self.memory[key]
        line = self.line_of(name, place)
        here = {index: env[index] for index in self.decl.batch}
        for subscript, at in zip(line.subscripts, place):
            if isinstance(subscript, Name) and subscript.id in self.decl.indices:
                self.inside(name, at, self.length(subscript.id), node)
                here[subscript.id] = at
        outer, self.line = self.line, line
        self.memory[key] = self.value(line.body, here)
        self.line = outer
        return self.memory[key]

    def line_of(self, name: str, place: tuple[int, ...]) -> Definition:
        main = self.program.definitions[name]
        for scan in self.program.scans:
            if name in scan.names and name in self.program.boundaries:
                axis = [s.id if isinstance(s, Name) else "" for s in main.subscripts].index(scan.index)
                if place[axis] == (-1 if scan.step > 0 else self.length(scan.index)):
                    return self.program.boundaries[name]
        return main

    # Expressions ------------------------------------------------------------------------------------------------

    def value(self, node: Node, env: Mapping[str, int]) -> Value:
        match node:
            case Num(value=number):
                return exact(number) if isinstance(number, float) else number
            case Bool(value=truth):
                return truth
            case Str(value=string):
                return string
            case Name(id=name):
                return self.named(name, env, node)
            case Ref(name=name, subscripts=subscripts):
                return self.element(name, tuple(self.integer(s, env) for s in subscripts), env, node)
            case Unary(op=op, operand=operand):
                part = self.value(operand, env)
                return (not part) if op == "not" else -part if op == "-" else part
            case Binary(op=op, left=left, right=right):
                return self.binary(op, self.value(left, env), self.value(right, env), node)
            case Compare(ops=ops, operands=operands):
                parts = [self.value(operand, env) for operand in operands]
                return all(self.decided(op, a, b, node) for op, a, b in zip(ops, parts, parts[1:]))
            case Logic(op=op, operands=operands):
                for operand in operands:
                    if self.value(operand, env) is (op == "or"):
                        return op == "or"
                return op == "and"
            case Cond(test=test, then=then, otherwise=otherwise):
                return self.value(then if self.value(test, env) else otherwise, env)
            case Call(function="present", arguments=(Name(id=name),)):
                return name in self.arrays or self.options.get(name) is not None
            case Call(function=function, arguments=arguments):
                return self.call(function, [self.value(argument, env) for argument in arguments], node)
            case Reduce():
                return self.normalized(node, env) if node.op in NORMALIZERS else self.reduced(node, env)
        raise TypeError(f"not a node of the tree: {type(node).__name__}")

    def named(self, name: str, env: Mapping[str, int], node: Node) -> Value:
        if name in env:
            return env[name]
        if name == "inf":
            return sympy.oo
        if name == "pi":
            return sympy.pi
        if name in self.sizes:
            return self.sizes[name]
        if name in self.decl.options:
            if self.options[name] is None:
                raise self.error(f"option {name!r} is not set here", node)
            return self.options[name]
        if name in self.decl.sizes:
            raise self.error(f"size {name!r} is not determined; give it in sizes=", node)
        return self.element(name, (), env, node)

    def integer(self, node: Node, env: Mapping[str, int]) -> int:
        value = self.value(node, env)
        if isinstance(value, int):
            return value
        if isinstance(value, sympy.Integer):
            return int(value)
        raise self.error(f"a subscript depends on a symbol: {value}", node)

    def binary(self, op: str, a: Value, b: Value, node: Node) -> Value:
        if op in ("//", "%"):
            if b == 0:
                raise self.error(f"'{op}' by zero", node)
            return a // b if op == "//" else a % b
        if op == "/":
            return quotient(sympy.sympify(a), sympy.sympify(b))
        if op == "**":
            return a**b if isinstance(a, int) and isinstance(b, int) and b >= 0 else sympy.sympify(a) ** b
        return a + b if op == "+" else a - b if op == "-" else a * b

    def decided(self, op: str, a: Value, b: Value, node: Node) -> bool:
        if isinstance(a, str | bool) or isinstance(b, str | bool):
            return (a == b) is (op == "==")
        left, right = sympy.sympify(a), sympy.sympify(b)
        if sympy.nan in (left, right):
            return op == "!="
        relation = RELATIONS[op](left, right)
        if relation in (sympy.true, sympy.false):
            return bool(relation)
        raise self.error(f"SymPy cannot decide the condition {relation}", node)

    def call(self, function: str, arguments: list[Value], node: Node) -> Value:
        if function in ("floor", "ceil"):
            rounded = (sympy.floor if function == "floor" else sympy.ceiling)(sympy.sympify(arguments[0]))
            if not rounded.is_Integer:
                raise self.error(f"{function} of {arguments[0]} is no number", node)
            return int(rounded)
        value = FUNCTIONS[function](*(sympy.sympify(argument) for argument in arguments))
        return int(value) if all(isinstance(a, int) for a in arguments) and function in SAME_KIND else value

    # Reductions -------------------------------------------------------------------------------------------------

    def places(self, node: Reduce, env: Mapping[str, int]) -> Iterator[tuple[tuple[int, ...], dict[str, int], bool]]:
        for place in itertools.product(*(range(self.length(index)) for index in node.indices)):
            inner = {**env, **dict(zip(node.indices, place))}
            yield place, inner, node.condition is None or bool(self.value(node.condition, inner))

    def reduced(self, node: Reduce, env: Mapping[str, int]) -> Value:
        included = [(place, self.value(node.body, inner)) for place, inner, keep in self.places(node, env) if keep]
        values = [value for _, value in included]
        match node.op:
            case "sum":
                return sum(values) if all(isinstance(v, int) for v in values) else sympy.Add(*values)
            case "prod":
                return math.prod(values)
            case "max":
                return same_kind(sympy.Max(-sympy.oo, *values), values)
            case "min":
                return same_kind(sympy.Min(sympy.oo, *values), values)
            case "mean":
                return sympy.Add(*values) / len(values) if values else sympy.Integer(0)
            case "any":
                return any(values)
            case "all":
                return all(values)
            case "logsumexp":
                return logsumexp(values)
        best = -1
        for k, (_, value) in enumerate(included):
            if best < 0 or self.decided(">", value, included[best][1], node):
                best = k
        return included[best][0][0] if included else -1

    def normalized(self, node: Reduce, env: Mapping[str, int]) -> Value:
        outer = tuple(env[index] for index in node.indices)
        places = list(self.places(node, env))
        included = {place: self.value(node.body, inner) for place, inner, keep in places if keep}
        if node.op == "softmax":
            weights = {place: sympy.exp(value) for place, value in included.items()}
            total = sympy.Add(*weights.values())
            return weights[outer] / total if outer in weights and total != 0 else sympy.Integer(0)
        order: list[tuple[int, ...]] = []
        for place, value in included.items():
            before = [k for k, other in enumerate(order) if self.decided(">", value, included[other], node)]
            order.insert(before[0] if before else len(order), place)
        order += [place for place, _, keep in places if not keep]
        return order.index(outer) if node.op == "rank" else order[outer[0]][0]
