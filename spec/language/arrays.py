"""The array evaluator: equations on NumPy or torch arrays, computed on demand.

`evaluate` runs it. A definition is computed when an output needs it, only for the values of its indices
that are needed, and once. Nothing is written into inputs, no warning is emitted, and gathers outside a tensor
are errors unless a condition around them excludes the element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attnspec.spec.language import elementwise, reductions
from attnspec.spec.language.arithmetic import Arithmetic
from attnspec.spec.language.backend import Backend
from attnspec.spec.language.check import kind_of, left_indices
from attnspec.spec.language.errors import EvaluationError
from attnspec.spec.language.indexing import select
from attnspec.spec.language.named import Named, combine, conjunction, is_scalar, kind_of_array, lift
from attnspec.spec.language.references import reference
from attnspec.spec.language.scope import Domain, Scope
from attnspec.spec.language.static import Plan
from attnspec.spec.language.sums import sum_of
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
    Reduce,
    Ref,
    Unary,
)

EMPTY: dict[str, float | bool] = {
    "sum": 0.0, "prod": 1.0, "max": -math.inf, "min": math.inf, "mean": 0.0, "any": False, "all": True,
    "logsumexp": -math.inf, "argmax": -1, "softmax": 0.0, "rank": 0, "argsort": 0,
}  # fmt: skip


class Evaluator:
    """Evaluates the definitions of one plan on given inputs."""

    def __init__(self, plan: Plan, inputs: Mapping[str, Named], backend: Backend, arithmetic: Arithmetic) -> None:
        self.plan = plan
        self.program = plan.program
        self.inputs = inputs
        self.backend = backend
        self.arithmetic = arithmetic
        self.done: dict[tuple[str, tuple[Domain, ...]], Named] = {}
        self.scans = {name: scan for scan in self.program.scans for name in scan.names}
        self.scanned: dict[str, tuple[Named, int, int]] = {}
        self.ranges: dict[str, Named] = {}

    def error(self, message: str, node: Node) -> EvaluationError:
        return EvaluationError(
            message, file=self.program.file, equation=node.at.line or None, column=node.at.column or None
        )

    def size(self, index: str) -> int:
        """The size of an index."""
        size = self.plan.size_of.get(index)
        if size is None:
            raise EvaluationError(
                f"the size of index '{index}' is not determined by the inputs' shapes; give it in sizes=",
                file=self.program.file,
            )
        if size < 0:
            raise EvaluationError(f"index '{index}' has the negative size {size}", file=self.program.file)
        return size

    # Definitions
    # -------------------------------------------------------------------------------------------------

    def tensor(self, name: str, domains: tuple[Domain, ...]) -> Named:
        """A definition for some values of its indices; axes are its left side's (those it depends on)."""
        key = (name, domains)
        if key in self.done:
            return self.done[key]
        left = left_indices(self.program.definitions[name])
        full = self.done.get((name, (None,) * len(left)))
        shape = [len(d) if d is not None else self.plan.size_of.get(axis) for axis, d in zip(left, domains)]
        if 0 in shape:
            # Without an element there is nothing to evaluate, and nothing that could be an error.
            empty = [axis for axis, length in zip(left, shape) if length == 0]
            value = Named(self.backend.full([0] * len(empty), 0, self.program.kinds[name]), tuple(empty))
        elif full is not None:
            value = full
            for axis, domain in zip(left, domains):
                if domain is not None and axis in value.axes:
                    value = Named(self.backend.take(value.array, domain, value.axes.index(axis)), value.axes)
        else:
            scope = Scope(dict(zip(left, domains)))
            body = self.plan.body(name)
            value = self.finish(name, body, self.value(body, scope))
        self.done[key] = value
        return value

    def finish(self, name: str, body: Node, value: Named) -> Named:
        """A computed definition in its kind, as the arithmetic stores it."""
        kind = self.program.kinds[name]
        if kind_of_array(self.backend, value.array) != kind or is_scalar(value.array):
            value = lift(self.backend, value, kind)
        if kind != "real":
            return value
        return self.arithmetic.tensor(name, value, not isinstance(body, Ref | Name | Num), self.backend)

    # Expressions
    # -------------------------------------------------------------------------------------------------

    def value(self, node: Node, scope: Scope) -> Named:
        """The value of an expression; its axes are bound indices and batch axes."""
        match node:
            case Num(value=number) | Bool(value=number):
                return Named(number)
            case Name(id=name):
                return self.name(node, name, scope)
            case Ref():
                return reference(self, node, scope)
            case Binary():
                return self.binary(node, scope)
            case Unary(op=op, operand=operand):
                value = self.value(operand, scope)
                if op == "not":
                    return Named(~lift(self.backend, value, "bool").array, value.axes)
                return value if op == "+" else Named(-value.array, value.axes)
            case Compare():
                return self.compare(node, scope)
            case Logic():
                return self.logic(node, scope)
            case Cond():
                return self.cond(node, scope)
            case Call():
                return self.call(node, scope)
            case Reduce():
                return self.reduce(node, scope)
        raise self.error("strings are only compared with options", node)

    def name(self, node: Node, name: str, scope: Scope) -> Named:
        if name in scope.domains:
            domain = scope.domains[name]
            if isinstance(domain, int):
                return Named(domain)
            if domain is not None:
                return Named(self.backend.asarray(domain, "int"), (name,))
            if name not in self.ranges:
                self.ranges[name] = Named(self.backend.arange(self.size(name)), (name,))
            return self.ranges[name]
        if name in self.program.definitions:
            return self.tensor(name, ())
        if name in self.program.declarations.inputs:
            return self.input(name, node)
        raise self.error(f"size '{name}' is not determined by the inputs' shapes; give it in sizes=", node)

    def input(self, name: str, node: Node) -> Named:
        if name not in self.inputs:
            raise self.error(f"optional input '{name}' is absent here; guard its use with present({name})", node)
        return self.inputs[name]

    def binary(self, node: Binary, scope: Scope) -> Named:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if node.op in ("//", "%"):
            self.check(lambda: self._bad(right, lambda x: x == 0), node.right, scope, f"'{node.op}' by zero")
            right = self._where_bad(right, lambda x: x == 0, 1)
        elif node.op == "**" and kind_of_array(self.backend, left.array) == "int" == kind_of_array(
            self.backend, right.array
        ):
            if isinstance(node.right, Unary) or (is_scalar(right.array) and right.array < 0 and _negative(node.right)):
                left = lift(self.backend, left, "real")
            else:
                self.check(
                    lambda: self._bad(right, lambda x: x < 0),
                    node.right,
                    scope,
                    "an integer to a negative power; write a real base",
                )
                right = self._where_bad(right, lambda x: x < 0, 0)
        elif node.op in elementwise.SINGULAR:
            right = self.safe(right, scope)
            if node.op == "**":
                left = self.safe(left, scope)
        return elementwise.binary(self.backend, node.op, left, right)

    def _bad(self, value: Named, test: Any) -> Named:
        return Named(test(lift(self.backend, value).array), value.axes)

    def _where_bad(self, value: Named, test: Any, instead: int) -> Named:
        if is_scalar(value.array):
            return Named(instead) if test(value.array) else value
        return Named(self.backend.where(test(value.array), instead, value.array), value.axes)

    def compare(self, node: Compare, scope: Scope) -> Named:
        values = [self.value(operand, scope) for operand in node.operands]
        parts = [elementwise.comparison(self.backend, op, a, b) for op, a, b in zip(node.ops, values, values[1:])]
        result = conjunction(self.backend, parts)
        assert result is not None
        return result

    def logic(self, node: Logic, scope: Scope) -> Named:
        """`and`, `or`: an operand is guarded by those before it, as in Python."""
        result: Named | None = None
        for operand in node.operands:
            inner = scope
            if result is not None:
                guard = result if node.op == "and" else self.negated(result)
                inner = replace(scope, guards=(*scope.guards, guard))
            value = lift(self.backend, self.value(operand, inner), "bool")
            if result is None:
                result = value
            elif node.op == "and":
                result = combine(self.backend, lambda a, b: a & b, result, value)
            else:
                result = combine(self.backend, lambda a, b: a | b, result, value)
        assert result is not None
        return result

    def negated(self, value: Named) -> Named:
        return Named(~lift(self.backend, value, "bool").array, value.axes)

    def cond(self, node: Cond, scope: Scope) -> Named:
        test = self.value(node.test, scope)
        if is_scalar(test.array):
            return self.value(node.then if test.array else node.otherwise, scope)
        then = self.value(node.then, replace(scope, guards=(*scope.guards, test)))
        otherwise = self.value(node.otherwise, replace(scope, guards=(*scope.guards, self.negated(test))))
        kinds = {kind_of_array(self.backend, then.array), kind_of_array(self.backend, otherwise.array)}
        kind = "real" if "real" in kinds else kinds.pop()
        return combine(
            self.backend,
            self.backend.where,
            test,
            lift(self.backend, then, kind),
            lift(self.backend, otherwise, kind),
        )

    def call(self, node: Call, scope: Scope) -> Named:
        arguments = [self.value(argument, scope) for argument in node.arguments]
        if node.function in elementwise.SINGULAR:
            arguments = [self.safe(argument, scope) for argument in arguments]
        if node.function in ("floor", "ceil"):
            arguments = [self.rounded(arguments[0], node, scope)]
        kinds = {kind_of_array(self.backend, argument.array) for argument in arguments}
        value = elementwise.function(self.backend, node.function, arguments, "int" if kinds == {"int"} else "real")
        if node.function in elementwise.INEXACT:
            value = self.arithmetic.elementwise(node.function, value, arguments, self.backend)
        return value

    def rounded(self, value: Named, node: Call, scope: Scope) -> Named:
        """The argument of floor or ceil, which must be finite where no condition excludes it."""
        value = lift(self.backend, value, "real")
        bad = Named(~self.backend.isfinite(value.array), value.axes)
        if not self.backend.truth(bad.array):
            return value
        self.check(lambda: bad, node, scope, f"{node.function} of a number that is not finite")
        return Named(self.backend.where(bad.array, 0.0, value.array), value.axes)

    def safe(self, value: Named, scope: Scope) -> Named:
        """The value with 1 in places that conditions exclude, where gradients may be taken."""
        if not self.backend.differentiable or not scope.guards or is_scalar(value.array):
            return value
        guard = conjunction(self.backend, scope.guards)
        if guard is None or kind_of_array(self.backend, value.array) != "real":
            return value
        return combine(self.backend, lambda g, x: self.backend.where(g, x, 1.0), guard, value)

    # Conditions that exclude errors
    # ------------------------------------------------------------------------------

    def check(self, bad: Any, node: Node, scope: Scope, message: str, detail: Any = None) -> None:
        """Raises EvaluationError when `bad()` is true somewhere that the conditions around do not exclude."""
        found: Named = bad()
        if not self.backend.truth(found.array):
            return
        guard = conjunction(self.backend, scope.guards)
        if guard is not None:
            found = combine(self.backend, lambda a, b: a & b, found, guard)
            if not self.backend.truth(found.array):
                return
        place = ""
        if found.axes:
            flags = self.backend.to_numpy(found.array)
            first = [int(k[0]) for k in flags.nonzero()]
            at = []
            for axis, k in zip(found.axes, first):
                domain = scope.domains.get(axis)
                at.append(f"{axis}={domain[k] if isinstance(domain, tuple) else k}")
            place = f" at {', '.join(at)}"
            if detail is not None:
                place += detail(dict(zip(found.axes, first)))
        elif detail is not None:
            place = detail({})
        raise self.error(f"{message}{place}", node)

    def inside(self, value: Named, low: int, high: int, node: Node, scope: Scope, label: str) -> Named:
        """Integer positions checked to be in low..high, moved inside where a condition excludes them anyway."""
        backend = self.backend
        if is_scalar(value.array):
            if not low <= value.array <= high:
                self.check(
                    lambda: Named(backend.asarray(True, "bool")),
                    node,
                    scope,
                    f"{label} is {value.array}, outside {low}..{high}",
                )
                return Named(min(max(value.array, low), max(high, low)))
            return value

        def detail(at: Mapping[str, int]) -> str:
            shown = value.array[tuple(at.get(axis, 0) for axis in value.axes)]
            return f": it is {int(shown)}"

        flags = (value.array < low) | (value.array > high)
        if not backend.truth(flags):
            return value
        self.check(lambda: Named(flags, value.axes), node, scope, f"{label} is outside {low}..{high}", detail)
        return Named(backend.where(flags, low, value.array), value.axes)

    # Reductions
    # --------------------------------------------------------------------------------------------------

    def over_nothing(self, node: Reduce, scope: Scope) -> Named:
        """The value of a reduction over an index of size 0: nothing in it is evaluated."""
        whole = node.op in ("sum", "prod", "max", "min") and kind_of(node.body, self.program) == "int"
        if whole and node.op in ("max", "min"):
            true = Named(self.backend.asarray(True, "bool"))
            self.check(lambda: true, node, scope, f"{node.op} of integers over nothing")
        return Named(int(EMPTY[node.op]) if whole and node.op in ("sum", "prod") else EMPTY[node.op])

    def reduce(self, node: Reduce, scope: Scope) -> Named:
        """A reduction or a normalizer."""
        backend, indices = self.backend, node.indices
        lengths = {index: self.size(index) for index in indices}
        if 0 in lengths.values():
            return self.over_nothing(node, scope)
        domains = {**scope.domains, **dict.fromkeys(indices)}
        inner = Scope(domains, tuple(self.hidden(guard, indices) for guard in scope.guards), scope.step)
        condition: Named | None = None
        if node.condition is not None:
            condition = lift(backend, self.value(node.condition, inner), "bool")
            inner = replace(inner, guards=(*inner.guards, condition))
        if node.op in ("sum", "mean"):
            return sum_of(self, node, inner, condition, lengths)
        body = self.value(node.body, inner)
        match node.op:
            case "softmax":
                value = reductions.softmax(backend, body, condition, indices, lengths)
                source = value
                if self.arithmetic.logits:
                    source = reductions.masked(backend, lift(backend, body, "real"), condition, -math.inf)
                value = self.arithmetic.reduced("softmax", value, source, indices, backend)
                return self.at_outer(value, indices, scope)
            case "logsumexp":
                value = reductions.logsumexp(backend, body, condition, indices, lengths)
                if self.arithmetic.samples is None:
                    return value
                source = reductions.masked(backend, lift(backend, body, "real"), condition, -math.inf)
                return self.arithmetic.reduced("logsumexp", value, source, indices, backend)
            case "prod":
                value = reductions.product(backend, body, condition, indices, lengths)
                return self.arithmetic.reduced("prod", value, lift(backend, body), indices, backend)
            case "max" | "min":
                if kind_of_array(backend, body.array) == "int":
                    if kind_of(node.body, self.program) != "int":  # real, but these values happen to be whole
                        body = lift(backend, body, "real")
                        return reductions.extreme(backend, node.op, body, condition, indices, lengths)
                    number = reductions.count(backend, condition, indices, lengths)
                    self.check(
                        lambda: self._bad(number, lambda x: x == 0),
                        node,
                        scope,
                        f"{node.op} of integers over nothing",
                    )
                return reductions.extreme(backend, node.op, body, condition, indices, lengths)
            case "any" | "all":
                return reductions.quantifier(backend, node.op, body, condition, indices, lengths)
        bad = reductions.has_nan(backend, body, condition)
        if bad is not None:
            self.check(lambda: bad, node.body, inner, f"NaN in the operand of {node.op}")
            body = Named(backend.where(backend.isnan(body.array), 0.0, body.array), body.axes)
        if node.op == "argmax":
            return reductions.argmax(backend, body, condition, indices[0], lengths)
        return self.at_outer(reductions.order(backend, node.op, body, condition, indices[0], lengths), indices, scope)

    def hidden(self, guard: Named, indices: tuple[str, ...]) -> Named:
        """A condition as seen from inside a reduction that binds some of its indices anew: true where any value is."""
        if is_scalar(guard.array) or not set(guard.axes) & set(indices):
            return guard
        lengths = guard.lengths()
        return reductions.quantifier(self.backend, "any", guard, None, [i for i in indices if i in guard.axes], lengths)

    def at_outer(self, value: Named, indices: tuple[str, ...], scope: Scope) -> Named:
        """A normalizer's value at the outer value of its indices."""
        for index in indices:
            domain = scope.domains[index]
            if domain is None or index not in value.axes:
                continue
            axis = value.axes.index(index)
            if isinstance(domain, int):
                value = select(self.backend, value, {index: domain})
            else:
                value = Named(self.backend.take(value.array, domain, axis), value.axes)
        return value


def _negative(node: Node) -> bool:
    return isinstance(node, Num) and node.value < 0
