"""Elementwise functions and operators on named arrays, with IEEE results and no warnings.

Kinds follow the checker: `//` and `%` stay integer, `/` and functions give reals. In places that a condition
excludes, arguments are replaced before a function with unbounded derivative is applied when gradients may be
taken, so that an excluded place never turns a gradient into NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnspec.spec.language.backend import Array, Backend, backend_for
from attnspec.spec.language.functions import FUNCTIONS
from attnspec.spec.language.named import Named, combine, is_scalar, kind_of_array, lift

# Functions whose derivative is unbounded somewhere: their excluded arguments are made safe under autograd.
SINGULAR = frozenset({"exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "pow", "logaddexp", "atan2", "/", "**"})


def function(backend: Backend, name: str, arguments: Sequence[Named], kind: str) -> Named:
    """The value of an elementwise function; `kind` is the one the checker gave it."""
    if name in ("min", "max"):
        minimum = name == "min"
        result = _as(backend, arguments[0], kind)
        for other in arguments[1:]:
            result = combine(backend, lambda a, b: _extreme(backend, a, b, minimum), result, _as(backend, other, kind))
        return result
    if name == "clip":
        value, low, high = (_as(backend, argument, kind) for argument in arguments)
        raised = combine(backend, lambda a, b: _extreme(backend, a, b, False), value, low)
        return combine(backend, lambda a, b: _extreme(backend, a, b, True), raised, high)
    if name in ("abs", "sign", "relu") and kind == "int":
        value = lift(backend, arguments[0])
        if name == "relu":
            return Named(backend.where(value.array > 0, value.array, 0 * value.array), value.axes)
        return Named(backend.function(name)(value.array), value.axes)
    real = [lift(backend, argument, "real") for argument in arguments]
    if name == "pow":
        return combine(backend, lambda a, b: a**b, *real)
    if name == "logaddexp":
        return combine(backend, lambda a, b: _logaddexp(backend, a, b), *real)
    if name == "atan2":  # adding 0 turns -0 into 0: the sign of a zero has no meaning here
        return combine(backend, lambda a, b: backend.function("atan2")(a + 0.0, b + 0.0), *real)
    value = real[0]
    array = _UNARY[name](backend, value.array) if name in _UNARY else backend.function(name)(value.array)
    return Named(array, value.axes)


def _as(backend: Backend, value: Named, kind: str) -> Named:
    return lift(backend, value, kind)


def _extreme(backend: Backend, a: Array, b: Array, minimum: bool) -> Array:
    return backend.function("minimum" if minimum else "maximum")(a, b)


def _logaddexp(backend: Backend, a: Array, b: Array) -> Array:
    """log(exp(a) + exp(b)); -inf when both are -inf, +inf when either is."""
    top = backend.function("maximum")(a, b)
    safe = backend.where(backend.isfinite(top), top, 0.0)
    total = backend.function("exp")(a - safe) + backend.function("exp")(b - safe)
    positive = total > 0
    value = backend.function("log")(backend.where(positive, total, 1.0)) + safe
    return backend.where(positive | backend.isnan(total), backend.where(backend.isnan(total), total, value), -math.inf)


def _softplus(backend: Backend, x: Array) -> Array:
    """log(1 + exp(x)) without overflow."""
    size = backend.function("abs")(x)
    return backend.function("maximum")(x, 0.0 * x) + backend.function("log1p")(backend.function("exp")(-size))


def _softplus_safe(backend: Backend, x: Array) -> Array:
    finite = backend.isfinite(x)
    inner = _softplus(backend, backend.where(finite, x, 0.0))
    edge = backend.where(x > 0, x, backend.where(x < 0, 0.0, x))
    return backend.where(finite, inner, edge)


def _sigmoid(backend: Backend, x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow on either side."""
    decay = backend.function("exp")(-backend.function("abs")(x))
    return backend.where(x >= 0, 1.0 / (1.0 + decay), decay / (1.0 + decay))


def _elu(backend: Backend, x: Array) -> Array:
    negative = backend.function("expm1")(backend.where(x < 0, x, 0.0))
    return backend.where(x < 0, negative, x)


def _relu(backend: Backend, x: Array) -> Array:
    return backend.where(x <= 0, 0.0, x)


def _silu(backend: Backend, x: Array) -> Array:
    low = x == -math.inf
    return backend.where(low, 0.0, backend.where(low, 0.0, x) * _sigmoid(backend, x))


def _gelu(backend: Backend, x: Array) -> Array:
    low = x == -math.inf
    gate = 0.5 * (1.0 + backend.function("erf")(x / math.sqrt(2.0)))
    return backend.where(low, 0.0, backend.where(low, 0.0, x) * gate)


_UNARY: dict[str, Callable[[Backend, Array], Array]] = {
    "exp2": lambda b, x: b.function("exp2")(x) if hasattr(b.xp, "exp2") else b.function("exp")(x * math.log(2.0)),
    "rsqrt": lambda b, x: 1.0 / b.function("sqrt")(x),
    "sign": lambda b, x: b.where(x == x, b.function("sign")(x), x),  # torch gives 0 for NaN
    "floor": lambda b, x: b.to_int(b.function("floor")(x)),
    "ceil": lambda b, x: b.to_int(b.function("ceil")(x)),
    "sigmoid": _sigmoid,
    "softplus": _softplus_safe,
    "relu": _relu,
    "elu": _elu,
    "gelu": _gelu,
    "silu": _silu,
}


def binary(backend: Backend, op: str, left: Named, right: Named) -> Named:
    """`left op right`; `//` and `%` by zero are the evaluator's business."""
    kinds = kind_of_array(backend, left.array), kind_of_array(backend, right.array)
    if is_scalar(left.array) and is_scalar(right.array):
        from attnspec.spec.language.static import scalar_binary

        return Named(scalar_binary(op, left.array, right.array))
    if op == "/" or "real" in kinds:
        left, right = _real(backend, left), _real(backend, right)
    if op == "**" and not is_scalar(right.array) and kinds == ("int", "int"):
        return combine(backend, lambda a, b: a**b, lift(backend, left), right)
    return combine(backend, _OPERATORS[op], left, right)


def _real(backend: Backend, value: Named) -> Named:
    """Reals stay; integers become reals (a plain number stays plain, so that arrays are not allocated for it)."""
    if is_scalar(value.array):
        return Named(float(value.array), value.axes)
    return lift(backend, value, "real")


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: a**b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def scalar_function(name: str, values: Sequence[Any]) -> int | float:
    """An elementwise function of plain numbers, for static folding; the same code as for arrays."""
    backend = backend_for(None, ())
    whole = all(isinstance(value, int) for value in values)
    kind = "int" if whole else "real"
    with np.errstate(all="ignore"):
        result = function(backend, name, [Named(value) for value in values], kind).array
    return result.item()  # type: ignore[no-any-return]


INEXACT = frozenset(FUNCTIONS) - {"abs", "sign", "floor", "ceil", "relu", "min", "max", "clip"}


def comparison(backend: Backend, op: str, left: Named, right: Named) -> Named:
    """`left op right` as a condition."""
    if is_scalar(left.array) and is_scalar(right.array):
        from attnspec.spec.language.static import compare

        return Named(compare(op, left.array, right.array))
    if is_scalar(left.array) and kind_of_array(backend, right.array) == "bool":
        left = lift(backend, left)
    return combine(backend, _OPERATORS[op], left, right)
