"""What formulas have in common, whether they are written as LaTeX or as MathML.

How tightly each form binds, which names are Greek letters, how a name with a number is read, and where a left operand
needs parentheses although its strength does not ask for them. Used by `latex` and `mathml`; it writes nothing itself.
"""

from __future__ import annotations

import re

from attnspec.spec.language.syntax import Binary, Cond, Node, Num, Reduce

# How tightly a form binds; a part that binds less tightly than its place asks for is put in parentheses.
COND, OR, AND, NOT, COMPARE, MOD, SUM, PRODUCT, SIGN, POWER, ATOM = range(11)

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ",
    "iota": "ι", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ",
    "tau": "τ", "upsilon": "υ", "phi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω", "Gamma": "Γ", "Delta": "Δ",
    "Theta": "Θ", "Lambda": "Λ", "Xi": "Ξ", "Pi": "Π", "Sigma": "Σ", "Upsilon": "Υ", "Phi": "Φ", "Psi": "Ψ",
    "Omega": "Ω",
}  # fmt: skip
SWALLOWING = frozenset({"sum", "prod", "any", "all"})
"""Reductions written with a large sign: what follows them would be read as part of their body."""
_NUMBERED = re.compile(r"([A-Za-z]+?)_?(\d+)")


def numbered(name: str) -> tuple[str, str] | None:
    """`S0` and `S_0` as (`S`, `0`); None for a name without a number at its end."""
    found = _NUMBERED.fullmatch(name)
    return (found[1], found[2]) if found else None


def is_open(node: Node) -> bool:
    """Whether a form ends in a large sign's body, which would swallow a factor written after it."""
    if isinstance(node, Binary) and node.op in ("*", "%"):
        return is_open(node.right)
    return isinstance(node, Reduce) and node.op in SWALLOWING


def is_bracket(node: Cond) -> bool:
    """Whether a choice is `1 if test else 0`: Iverson's bracket."""
    if not isinstance(node.then, Num) or not isinstance(node.otherwise, Num):
        return False
    return (node.then.value, node.otherwise.value) == (1, 0)


def branches(node: Cond) -> tuple[list[tuple[Node, Node]], Node]:
    """The rows of a choice as (value, condition), and the value otherwise."""
    rows = []
    rest: Node = node
    while isinstance(rest, Cond):
        rows.append((rest.then, rest.test))
        rest = rest.otherwise
    return rows, rest


def decimal(value: float) -> tuple[str, int | None]:
    """The digits of a number and its power of ten, if it is written with one."""
    digits, _, exponent = repr(value).partition("e")
    return digits.removesuffix(".0"), int(exponent) if exponent else None
