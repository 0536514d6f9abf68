"""The names that the language reserves: functions with their arity and kinds, constants, reductions.

Used by the reader (which names may be called) and the checker (which kinds they take and give).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnspec.spec.language.syntax import NORMALIZERS, REDUCTIONS


@dataclass(frozen=True)
class Function:
    """An elementwise function: arguments allowed (`most` None: any number) and the kind of its value.

    `gives` "same": int when all arguments are int, else real.
    """

    least: int
    most: int | None
    gives: Literal["real", "int", "same"]


_REAL_UNARY = (
    "exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "softplus",
    "elu", "gelu", "silu", "erf",
)  # fmt: skip

FUNCTIONS: dict[str, Function] = {
    **{name: Function(1, 1, "real") for name in _REAL_UNARY},
    "abs": Function(1, 1, "same"),
    "sign": Function(1, 1, "same"),
    "relu": Function(1, 1, "same"),
    "floor": Function(1, 1, "int"),
    "ceil": Function(1, 1, "int"),
    "pow": Function(2, 2, "real"),
    "min": Function(1, None, "same"),
    "max": Function(1, None, "same"),
    "clip": Function(3, 3, "same"),
    "logaddexp": Function(2, 2, "real"),
    "atan2": Function(2, 2, "real"),
}

CONSTANTS = ("inf", "pi")
REDUCERS = REDUCTIONS + NORMALIZERS
RESERVED = frozenset(FUNCTIONS) | frozenset(REDUCERS) | frozenset(CONSTANTS) | {"present", "True", "False"}
