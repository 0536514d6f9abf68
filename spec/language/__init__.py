"""The equation language: read equations, check them, evaluate them.

`read` turns text into a checked `Program`; `evaluate` runs it on NumPy or torch arrays; `sympy_evaluate`, `to_latex`,
`cost`, `to_json`, `from_json` and `mutants` walk the same tree. Importing this needs NumPy only: what needs SymPy is
imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnspec.spec.language.arithmetic import EXACT, SAMPLES, Arithmetic
from attnspec.spec.language.check import check, kind_of
from attnspec.spec.language.errors import EvaluationError, SpecError
from attnspec.spec.language.evaluate import evaluate
from attnspec.spec.language.formats import round_to, unit_roundoff
from attnspec.spec.language.macros import children, rebuild
from attnspec.spec.language.noise import RoundingModel, sigma
from attnspec.spec.language.reader import parse_node as read_expression
from attnspec.spec.language.reader import read
from attnspec.spec.language.sizes import infer_sizes, resolve_options
from attnspec.spec.language.static import static_value
from attnspec.spec.language.syntax import (
    Declarations,
    Definition,
    InputDecl,
    OptionDecl,
    OutputDecl,
    Program,
    SizeDecl,
)

_LAZY: dict[str, str] = {}

__all__ = [
    "EXACT",
    "SAMPLES",
    "Arithmetic",
    "Declarations",
    "Definition",
    "EvaluationError",
    "InputDecl",
    "OptionDecl",
    "OutputDecl",
    "Program",
    "RoundingModel",
    "SizeDecl",
    "SpecError",
    "check",
    "children",
    "evaluate",
    "infer_sizes",
    "kind_of",
    "read",
    "read_expression",
    "rebuild",
    "resolve_options",
    "round_to",
    "sigma",
    "static_value",
    "unit_roundoff",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"attnspec.spec.language.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
