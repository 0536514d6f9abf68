"""Domains of inputs: `0 <= kv_length <= M`, `a <= 0`, `0 < beta < 1`, read once for drawing and for checking.

`domain` is what a mechanism accepts, `drawn` where the suite's values lie: in a recurrence that diverges on legal data
the file states what callers keep to.

A domain is a chain of comparisons around the input's own name; anything else is prose for readers. Bounds are static
expressions of the sizes. Used by `mechanism` (which refuses data outside) and by everything that draws inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.spec.language import EvaluationError, InputDecl, read_expression, static_value
from attnspec.spec.language.syntax import Node

Array = np.ndarray[Any, Any]
_LOW = r"\s*(?:(?P<low>[^<>=]+?)\s*(?P<low_op><=?)\s*)?"
_HIGH = r"\s*(?:(?P<op><=?|>=?)\s*(?P<high>[^<>=]+?)\s*)?"


@dataclass(frozen=True)
class Domain:
    """Bounds of an input; None where it has none. `open_low` and `open_high` exclude the bound itself."""

    text: str
    low: Node | None
    high: Node | None
    open_low: bool = False
    open_high: bool = False

    def bounds(self, sizes: Mapping[str, int]) -> tuple[float | None, float | None]:
        """The bounds as numbers; None where there is none, or where the sizes do not determine it."""
        return _value(self.low, sizes), _value(self.high, sizes)

    def integers(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Smallest and largest integer allowed; 0 and 1 stand for what is not bounded."""
        low, high = self.bounds(sizes)
        first = 0 if low is None else int(low) + self.open_low
        return first, first + 1 if high is None else int(high) - self.open_high

    def map(self, normal: Array, sizes: Mapping[str, int]) -> Array:
        """Standard normal numbers moved into the domain, away from its open ends."""
        low, high = self.bounds(sizes)
        if low is not None and high is not None:
            margin = 0.03
            return np.asarray(low + (high - low) * (margin + (1 - 2 * margin) / (1 + np.exp(-1.5 * normal))))
        if low is not None:
            return np.asarray(low + 0.01 + np.abs(normal))
        if high is not None:
            return np.asarray(high - 0.01 - np.abs(normal))
        return normal

    def check(self, name: str, value: Any, sizes: Mapping[str, int]) -> None:
        """Refuse an array with an element outside; NaN passes.

        Raises:
            EvaluationError: names the input, the element and the domain.
        """
        array = np.asarray(value.detach() if hasattr(value, "detach") else value)
        if array.dtype == object or not array.size:
            return
        low, high = self.bounds(sizes)
        for bound, is_open, sign in ((low, self.open_low, 1), (high, self.open_high, -1)):
            if bound is None:
                continue
            with np.errstate(invalid="ignore"):
                beyond = sign * (array - bound) <= 0 if is_open else sign * (array - bound) < 0
            if beyond.any():
                symbols = [key for key in sizes if re.search(rf"\b{key}\b", self.text)]
                where = f" with {', '.join(f'{key} = {sizes[key]}' for key in symbols)}" if symbols else ""
                raise EvaluationError(f"input '{name}' holds {array[beyond].flat[0]}, expected {self.text}{where}")


UNIT = "unit"
"""`drawn` of an input whose vectors have length 1 along its last axis; `unit unless OPTION`: of any under that flag."""
_UNIT = re.compile(rf"{UNIT}(?: unless (?P<flag>\w+))?")


def of_unit_length(decl: InputDecl, options: Mapping[str, Any]) -> bool:
    """Whether vectors of the input are drawn of length 1 under these options (those that are not given are false)."""
    found = _UNIT.fullmatch(decl.drawn)
    return found is not None and not (found["flag"] and options.get(found["flag"]))


def domain(decl: InputDecl) -> Domain | None:
    """The domain that a declaration states, or None where it states none or only describes it."""
    return _read(decl.name, decl.domain)


def drawn(decl: InputDecl) -> Domain | None:
    """Where drawn values of an input lie: what the declaration says that callers give, else its domain."""
    return _read(decl.name, decl.drawn) or domain(decl)


def readable(name: str, text: str) -> bool:
    """Whether a declaration of this name may have this text as its `drawn`."""
    return _UNIT.fullmatch(text) is not None or _read(name, text) is not None


def unit(array: Array) -> Array:
    """Vectors of length 1 along the last axis; zeros stay."""
    length = np.sqrt((array * array).sum(axis=-1, keepdims=True))
    return np.asarray(array / np.where(length > 0, length, 1.0))


def _read(name: str, text: str) -> Domain | None:
    match = re.fullmatch(f"{_LOW}{re.escape(name)}{_HIGH}", text)
    if match is None or not (match["low"] or match["high"]):
        return None
    low, high, op = match["low"], match["high"], match["op"] or ""
    open_low, open_high = match["low_op"] == "<", op == "<"
    if op.startswith(">"):
        if low is not None:
            return None
        low, high, open_low, open_high = high, None, op == ">", False
    return Domain(
        text, read_expression(low) if low else None, read_expression(high) if high else None, open_low, open_high
    )


def _value(node: Node | None, sizes: Mapping[str, int]) -> float | None:
    value = None if node is None else static_value(node, sizes=sizes)
    return value if isinstance(value, (int, float)) else None
