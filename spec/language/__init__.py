"""The equation language: read equations, check them, evaluate them.

`read` turns text into a checked `Program`; `evaluate` runs it on NumPy or torch arrays; `sympy_evaluate`,
`to_latex`, `to_mathml`, `cost`, `to_json`, `from_json` and `mutants` walk the same tree. Importing this needs NumPy
only: what needs SymPy is imported on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attnspec.spec.language.arithmetic import EXACT, SAMPLES, Arithmetic
from attnspec.spec.language.check import check, kind_of
from attnspec.spec.language.errors import EvaluationError, SpecError
from attnspec.spec.language.evaluate import evaluate
from attnspec.spec.language.formats import round_to, unit_roundoff
from attnspec.spec.language.macros import children, rebuild, subexpressions
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
from attnspec.spec.language.unparse import unparse, unparse_definition

if TYPE_CHECKING:
    from attnspec.spec.language.cost import Cost, CostModel, cost
    from attnspec.spec.language.export import from_json, to_json
    from attnspec.spec.language.latex import to_latex
    from attnspec.spec.language.latex_layout import latex_block
    from attnspec.spec.language.mathml import expression_to_mathml, to_mathml
    from attnspec.spec.language.mutate import Mutant, mutants
    from attnspec.spec.language.prove import Counterexample, prove_equal
    from attnspec.spec.language.symbolic import sympy_evaluate

_LAZY = {
    "Cost": "cost",
    "CostModel": "cost",
    "Counterexample": "prove",
    "Mutant": "mutate",
    "cost": "cost",
    "expression_to_mathml": "mathml",
    "from_json": "export",
    "latex_block": "latex_layout",
    "mutants": "mutate",
    "prove_equal": "prove",
    "sympy_evaluate": "symbolic",
    "to_json": "export",
    "to_latex": "latex",
    "to_mathml": "mathml",
}

__all__ = [
    "EXACT",
    "SAMPLES",
    "Arithmetic",
    "Cost",
    "CostModel",
    "Counterexample",
    "Declarations",
    "Definition",
    "EvaluationError",
    "InputDecl",
    "Mutant",
    "OptionDecl",
    "OutputDecl",
    "Program",
    "RoundingModel",
    "SizeDecl",
    "SpecError",
    "check",
    "children",
    "cost",
    "evaluate",
    "expression_to_mathml",
    "from_json",
    "infer_sizes",
    "kind_of",
    "latex_block",
    "mutants",
    "prove_equal",
    "read",
    "read_expression",
    "rebuild",
    "resolve_options",
    "round_to",
    "sigma",
    "static_value",
    "subexpressions",
    "sympy_evaluate",
    "to_json",
    "to_latex",
    "to_mathml",
    "unit_roundoff",
    "unparse",
    "unparse_definition",
]


class _Package(ModuleType):
    """This package. Importing its module `cost` would bind that name to the module; it stays the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.cost if name == "cost" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"attnspec.spec.language.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
