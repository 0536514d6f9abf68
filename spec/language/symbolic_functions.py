"""Functions and comparisons of the equation language on SymPy expressions, by name; used by `symbolic`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy

Value = Any
"""A Python int or bool, or a SymPy expression."""


def exact(value: Any) -> Any:
    """A number as a SymPy expression: floats become the rational number that they show."""
    if isinstance(value, sympy.Basic):
        return value
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, float):
        if math.isnan(number):
            return sympy.nan
        if math.isinf(number):
            return sympy.oo if number > 0 else -sympy.oo
        return sympy.Rational(repr(number))
    return sympy.sympify(number)


def quotient(a: Any, b: Any) -> Any:
    """`a / b`; a signed infinity where SymPy has a complex one."""
    if b != 0:
        return a / b
    if a == 0 or a.is_positive is None:
        return sympy.nan
    return sympy.oo if a.is_positive else -sympy.oo


def logsumexp(values: Sequence[Any]) -> Any:
    """`log(sum(exp(x)))`; -oo over nothing."""
    total = sympy.Add(*(sympy.exp(value) for value in values))
    return -sympy.oo if total == 0 else sympy.log(total)


def same_kind(value: Any, among: Sequence[Value]) -> Value:
    return int(value) if among and all(isinstance(v, int) for v in among) else value


def _log(x: Any) -> Any:
    return -sympy.oo if x == 0 else sympy.log(x)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + sympy.exp(-x))


RELATIONS = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "==": sympy.Eq, "!=": sympy.Ne}
SAME_KIND = frozenset({"abs", "sign", "relu", "min", "max", "clip"})
FUNCTIONS: dict[str, Any] = {
    "exp": sympy.exp,
    "exp2": lambda x: 2**x,
    "log": _log,
    "log2": lambda x: _log(x) / sympy.log(2),
    "log1p": lambda x: _log(1 + x),
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: quotient(sympy.Integer(1), sympy.sqrt(x)),
    "abs": sympy.Abs,
    "sign": sympy.sign,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tanh": sympy.tanh,
    "sigmoid": _sigmoid,
    "softplus": lambda x: sympy.log(1 + sympy.exp(x)),
    "relu": lambda x: sympy.Max(x, 0),
    "elu": lambda x: sympy.Piecewise((x, x > 0), (sympy.exp(x) - 1, True)),
    "gelu": lambda x: x * (1 + sympy.erf(x / sympy.sqrt(2))) / 2,
    "silu": lambda x: x * _sigmoid(x),
    "erf": sympy.erf,
    "pow": lambda x, y: x**y,
    "min": sympy.Min,
    "max": sympy.Max,
    "clip": lambda x, low, high: sympy.Min(sympy.Max(x, low), high),
    "logaddexp": lambda a, b: logsumexp((a, b)),
    "atan2": lambda y, x: sympy.Integer(0) if y == 0 and x == 0 else sympy.atan2(y, x),
}
