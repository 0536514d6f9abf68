"""Sums and means: which are contracted as products, and which are summed element by element.

Used by the array evaluator. `sum[j](a * b / c - d * e)` is split into signed terms and factors; terms whose
factors have different axes are contracted (`contraction`), so that the outer product of all axes is never
built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnspec.spec.language import elementwise, reductions
from attnspec.spec.language.contraction import contract
from attnspec.spec.language.named import Named, combine, is_scalar, kind_of_array, lift
from attnspec.spec.language.scope import Scope
from attnspec.spec.language.syntax import Binary, Node, Num, Reduce, Unary

if TYPE_CHECKING:
    from attnspec.spec.language.arrays import Evaluator


@dataclass(frozen=True)
class Term:
    """`sign * product(factors) / product(divisors)`."""

    sign: int
    factors: tuple[Node, ...]
    divisors: tuple[Node, ...]


def terms_of(node: Node, sign: int = 1) -> list[Term]:
    """The signed terms of a sum."""
    match node:
        case Binary(op="+", left=left, right=right):
            return terms_of(left, sign) + terms_of(right, sign)
        case Binary(op="-", left=left, right=right):
            return terms_of(left, sign) + terms_of(right, -sign)
        case Unary(op="-", operand=operand):
            return terms_of(operand, -sign)
    factors: list[Node] = []
    divisors: list[Node] = []
    sign = _factors(node, factors, divisors, sign)
    return [Term(sign, tuple(factors), tuple(divisors))]


def _factors(node: Node, factors: list[Node], divisors: list[Node], sign: int) -> int:
    match node:
        case Binary(op="*", left=left, right=right):
            sign = _factors(left, factors, divisors, sign)
            return _factors(right, factors, divisors, sign)
        case Binary(op="/", left=left, right=right):
            divisors.append(right)
            return _factors(left, factors, divisors, sign)
        case Unary(op="-", operand=operand):
            return _factors(operand, factors, divisors, -sign)
    factors.append(node)
    return sign


def sum_of(
    evaluator: Evaluator, node: Reduce, scope: Scope, condition: Named | None, lengths: Mapping[str, int]
) -> Named:
    """The value of `sum` or `mean`."""
    backend, indices = evaluator.backend, node.indices
    terms = terms_of(node.body)
    products = [_product(evaluator, term, scope) for term in terms]
    gains = any(_gains(factors, lengths) for _, factors in products)
    spread = any(_spread(factors, condition, lengths) for _, factors in products)
    if gains or (spread and all(_real(evaluator, product) for product in products)):
        parts = [_contracted(evaluator, scale, factors, condition, lengths) for scale, factors in products]
        value = parts[0]
        for part in parts[1:]:
            value = combine(backend, lambda a, b: a + b, lift(backend, value), lift(backend, part))
    else:
        body = _elementwise(evaluator, products)
        value = reductions.total(backend, body, condition, indices, lengths)
        if evaluator.arithmetic.samples is not None and backend.kind(value.array) == "real":
            source = reductions.masked(backend, body, condition, 0.0)
            value = evaluator.arithmetic.reduced("sum", value, source, indices, backend)
    if node.op == "sum":
        return value
    number = reductions.count(backend, condition, indices, lengths)
    value = lift(backend, value, "real")
    if is_scalar(number.array):
        divisor = float(number.array)
        return Named(
            value.array / divisor if divisor else backend.where(value.array != value.array, 0.0, 0.0 * value.array),
            value.axes,
        )
    return combine(
        backend,
        lambda x, n: backend.where(n == 0, 0.0, x / backend.where(n == 0, 1.0, n)),
        value,
        Named(backend.to_real(number.array), number.axes),
    )


def _product(evaluator: Evaluator, term: Term, scope: Scope) -> tuple[Named, list[Named]]:
    """A term's scalar factor (sign and literals) and its array factors, divisors applied where they fit."""
    backend = evaluator.backend
    scale = Named(term.sign)
    factors: list[Named] = []
    for node in term.factors:
        if isinstance(node, Num):
            scale = elementwise.binary(backend, "*", scale, Named(node.value))
        else:
            factors.append(evaluator.value(node, scope))
    for node in term.divisors:
        divisor = evaluator.safe(evaluator.value(node, scope), scope)
        host = min(
            (k for k, f in enumerate(factors) if set(divisor.axes) <= set(f.axes)),
            key=lambda k: len(factors[k].axes),
            default=None,
        )
        if host is None:
            factors.append(elementwise.binary(backend, "/", Named(1.0), divisor))
        else:
            factors[host] = elementwise.binary(backend, "/", factors[host], divisor)
    return scale, factors


def _gains(factors: Sequence[Named], lengths: Mapping[str, int]) -> bool:
    """Whether contracting a product needs less memory than building it."""
    wide = [set(factor.axes) for factor in factors if factor.axes]
    if len(wide) < 2:
        return False
    every = set().union(*wide)
    return all(axes != every for axes in wide) and any(axis in lengths for axis in every)


def _spread(factors: Sequence[Named], condition: Named | None, lengths: Mapping[str, int]) -> bool:
    """Whether the condition has an axis of its own and lacks one of the product's: a matrix product of the two."""
    axes = {axis for factor in factors for axis in factor.axes}
    own = set() if condition is None else set(condition.axes) - axes - set(lengths)
    return bool(own) and bool(axes - set(condition.axes if condition else ())) and bool(axes & set(lengths))


def _real(evaluator: Evaluator, product: tuple[Named, list[Named]]) -> bool:
    return any(kind_of_array(evaluator.backend, part.array) == "real" for part in (product[0], *product[1]))


def _elementwise(evaluator: Evaluator, products: Sequence[tuple[Named, list[Named]]]) -> Named:
    """The sum's operand, built in full."""
    backend = evaluator.backend
    total: Named | None = None
    for scale, factors in products:
        value = scale
        for factor in factors:
            whole = isinstance(value.array, int) or kind_of_array(backend, factor.array) == "real"
            if is_scalar(value.array) and value.array == 1 and whole:
                value = factor
            else:
                value = elementwise.binary(backend, "*", value, factor)
        total = value if total is None else elementwise.binary(backend, "+", total, value)
    assert total is not None
    return lift(backend, total)


def _contracted(
    evaluator: Evaluator,
    scale: Named,
    factors: Sequence[Named],
    condition: Named | None,
    lengths: Mapping[str, int],
) -> Named:
    """One term as a contraction, scaled afterwards by its factors without axes."""
    backend = evaluator.backend
    arrays: list[Named] = []
    for factor in factors:
        if factor.axes:
            arrays.append(lift(backend, factor, "real"))
        else:
            scale = elementwise.binary(backend, "*", scale, factor)
    summed = frozenset(lengths)
    if arrays and not math.isfinite(float(scale.array)):
        # Infinity times the sum is not the sum of infinity times each term, where terms are zero or differ in sign.
        arrays[0] = elementwise.binary(backend, "*", scale, arrays[0])
        scale = Named(1)
    if not arrays:
        return reductions.total(backend, lift(backend, scale, "real"), condition, tuple(lengths), lengths)

    def run(operands: Sequence[Named]) -> Named:
        return contract(backend, operands, summed, condition, lengths)

    value = evaluator.arithmetic.contract(arrays, run, math.prod(lengths.values()), backend)
    if is_scalar(scale.array) and scale.array == 1:
        return value
    return elementwise.binary(backend, "*", scale, value)
