"""Proofs of identities between symbolic results: `prove_equal` proves, refutes with numbers, or says that it cannot.

Used by the property tests for the identities of mechanism files. A difference of rational functions of exponentials is
decided exactly: exponents are split into monomials, each exponential of a monomial becomes a variable of its own (an
identity that holds for independent variables holds for these), and the numerator is expanded.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

POINTS = 3
DIGITS = 40


@dataclass(frozen=True)
class Counterexample:
    """Values of the symbols at which one element differs; false in a condition.

    `place` is the element (preceded by its name for dicts), `left` and `right` are its two values.
    """

    place: tuple[Any, ...]
    values: Mapping[str, Any]
    left: Any
    right: Any

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        given = ", ".join(f"{name} = {value}" for name, value in self.values.items())
        where = ", ".join(map(str, self.place)) or "the value"
        return f"at {where}: {self.left} and {self.right} differ for {given or 'all values'}"


def prove_equal(a: Any, b: Any, *, seed: int = 0) -> bool | Counterexample:
    """Whether `a` and `b` are equal for all real values of their symbols.

    Args:
        a, b: SymPy expressions, object arrays of them, or dicts of such arrays with the same keys and shapes.
        seed: of the rational points at which a counterexample is sought first.

    Returns:
        True if every element is proved equal; a `Counterexample` if some element differs at a point; False if neither
        was found (the difference holds functions that the method does not know).

    Raises:
        ValueError: keys or shapes differ.
    """
    pairs = list(_pairs(a, b, ()))
    generator = random.Random(seed)
    for place, left, right in pairs:
        if left != right:
            found = _refute(place, left, right, generator)
            if found is not None:
                return found
    return all(left == right or _is_zero(left - right) for _, left, right in pairs)


def _pairs(a: Any, b: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    if isinstance(a, Mapping):
        if not isinstance(b, Mapping) or a.keys() != b.keys():
            raise ValueError(f"different names: {sorted(a)} and {sorted(b) if isinstance(b, Mapping) else b}")
        for key in a:
            yield from _pairs(a[key], b[key], (*place, key))
        return
    left, right = np.asarray(a, dtype=object), np.asarray(b, dtype=object)
    if left.shape != right.shape:
        raise ValueError(f"different shapes: {left.shape} and {right.shape}")
    for index in itertools.product(*(range(length) for length in left.shape)):
        yield (*place, *index), sympy.sympify(left[index]), sympy.sympify(right[index])


def _refute(place: tuple[Any, ...], left: Any, right: Any, generator: random.Random) -> Counterexample | None:
    names = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: str(symbol.name))
    for _ in range(POINTS):
        point = {name: sympy.Rational(generator.randint(-24, 24), 16) for name in names}
        one, other = left.subs(point).evalf(DIGITS), right.subs(point).evalf(DIGITS)
        values = {str(name): value for name, value in point.items()}
        if one == other:
            continue
        finite = bool(one.is_finite) and bool(other.is_finite)
        scale = sympy.Max(1, abs(one), abs(other)) if finite else 1
        if not finite or bool(abs(one - other) > scale * sympy.Float(10) ** (-DIGITS // 2)):
            return Counterexample(place, values, one.evalf(8), other.evalf(8))
    return None


def _is_zero(difference: Any) -> bool:
    """Whether an expression is identically zero; False also means that it could not be decided."""
    if difference == 0:
        return True
    expression = difference.rewrite([sympy.tanh, sympy.sinh, sympy.cosh], sympy.exp)
    if expression.has(sympy.log):
        # A real number is zero exactly if its exponential is one; the exponential of a sum of logarithms is rational.
        expression = sympy.exp(sympy.expand(expression)) - 1
    expression = _independent(expression)
    try:
        numerator = sympy.polys.fields.sfield(expression)[1]
        if numerator == 0:
            return True
    except (sympy.PolynomialError, NotImplementedError, ValueError, TypeError):
        pass
    return bool(sympy.expand(sympy.fraction(sympy.together(expression))[0]) == 0)


def _independent(expression: Any) -> Any:
    """`expression` with every exponential written in independent variables, one for each monomial in the exponents."""
    exponents = {atom: sympy.expand(atom.args[0]).as_coefficients_dict() for atom in expression.atoms(sympy.exp)}
    denominators: dict[Any, int] = {}
    for terms in exponents.values():
        for monomial, coefficient in terms.items():
            denominators[monomial] = sympy.ilcm(denominators.get(monomial, 1), coefficient.q)
    bases = {monomial: sympy.Dummy("u", positive=True) for monomial in denominators}
    replaced = {}
    for atom, terms in exponents.items():
        powers = [bases[m] ** (coefficient * denominators[m]) for m, coefficient in terms.items()]
        replaced[atom] = sympy.Mul(*powers)
    if sympy.S.One in bases:
        replaced[sympy.E] = bases[sympy.S.One] ** denominators[sympy.S.One]
    return expression.xreplace(replaced)
