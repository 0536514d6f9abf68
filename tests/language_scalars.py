"""Arithmetic on Python numbers with IEEE results instead of exceptions: the functions of the loop interpreter.

Written from the tables in docs/language.md, one value at a time, with the `math` module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attnspec.spec.language.errors import EvaluationError

Value = Any  # a Python int, float, bool or str


def all_finite(values: Sequence[Value]) -> bool:
    return any(type(v) is float for v in values) and all(math.isfinite(v) for v in values)


def divide(a: Value, b: Value) -> float:
    top, bottom = float(a), float(b)
    if bottom != 0:
        return top / bottom
    if top == 0 or top != top:
        return math.nan
    return math.copysign(math.inf, top) * math.copysign(1.0, bottom)


def guarded(function: Callable[..., float]) -> Callable[..., float]:
    """`function` with NaN for a domain error and infinity for an overflow."""

    def call(*arguments: Value) -> float:
        if any(argument != argument for argument in arguments):
            return math.nan
        try:
            return float(function(*(float(argument) for argument in arguments)))
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf

    return call


def power(a: Value, b: Value) -> float:
    with np.errstate(all="ignore"):
        return float(np.power(np.float64(a), np.float64(b)))


def log(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def log1p(x: float) -> float:
    return -math.inf if x == -1 else math.log1p(x)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def floor(x: Value) -> int:
    if not math.isfinite(x):
        raise EvaluationError(f"floor or ceil of {x}")
    floored: int = math.floor(x)
    return floored


def smallest(*values: Value) -> Value:
    return math.nan if any(v != v for v in values) else promoted(min(values), values)


def largest(*values: Value) -> Value:
    return math.nan if any(v != v for v in values) else promoted(max(values), values)


def promoted(value: Value, among: Sequence[Value]) -> Value:
    return float(value) if any(isinstance(v, float) for v in among) else value


def logsumexp(values: Sequence[Value]) -> float:
    top = largest(-math.inf, *values)
    if not math.isfinite(top):
        return float(top)
    return float(top + math.log(math.fsum(math.exp(value - top) for value in values)))


def softmax(included: Mapping[tuple[int, ...], Value]) -> dict[tuple[int, ...], float]:
    top = largest(-math.inf, *included.values())
    if top == -math.inf:
        return {}
    if not math.isfinite(top):
        return dict.fromkeys(included, math.nan)
    weights = {place: math.exp(value - top) for place, value in included.items()}
    total = math.fsum(weights.values())
    return {place: weight / total for place, weight in weights.items()}


def sign(x: Value) -> Value:
    return x if x != x else type(x)((x > 0) - (x < 0))


def clip(x: Value, low: Value, high: Value) -> Value:
    return promoted(smallest(largest(x, low), high), (x, low, high))


CONSTANTS: dict[str, Value] = {"inf": math.inf, "pi": math.pi, "True": True, "False": False}
COMPARE: dict[str, Callable[[Value, Value], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
FUNCTIONS: dict[str, Callable[..., Value]] = {
    "exp": guarded(math.exp),
    "exp2": guarded(math.exp2),
    "log": guarded(log),
    "log2": guarded(lambda x: -math.inf if x == 0 else math.log2(x)),
    "log1p": guarded(log1p),
    "sqrt": guarded(math.sqrt),
    "rsqrt": guarded(lambda x: divide(1.0, math.sqrt(x))),
    "abs": abs,
    "sign": sign,
    "floor": floor,
    "ceil": lambda x: -floor(-x),
    "sin": guarded(math.sin),
    "cos": guarded(math.cos),
    "tanh": guarded(math.tanh),
    "sigmoid": guarded(sigmoid),
    "softplus": guarded(softplus),
    "relu": lambda x: largest(x, 0),
    "elu": guarded(lambda x: x if x > 0 else math.expm1(x)),
    "gelu": guarded(lambda x: 0.0 if x == -math.inf else x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "silu": guarded(lambda x: 0.0 if x == -math.inf else x * sigmoid(x)),
    "erf": guarded(math.erf),
    "pow": power,
    "min": smallest,
    "max": largest,
    "clip": clip,
    "logaddexp": lambda a, b: logsumexp((a, b)),
    "atan2": guarded(lambda y, x: math.atan2(y + 0.0, x + 0.0)),
}
SAME_KIND = frozenset(["abs", "sign", "relu", "min", "max", "clip"])
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
