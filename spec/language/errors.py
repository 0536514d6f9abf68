"""The errors of the equation language: where, what came, what was wanted, in one line.

Every reader, checker and evaluator of `spec.language` raises these and nothing else for bad input.
"""

from __future__ import annotations


class SpecError(ValueError):
    """A specification (or a use of it) is wrong.

    Attributes:
        file: name of the mechanism file, or `<text>`.
        equation: line of the equation in its equations text, from 1; None when no equation is concerned.
        column: column in that line, from 1; None when unknown.
        message: what came and what was wanted, without the position.
    """

    def __init__(
        self, message: str, *, file: str = "<text>", equation: int | None = None, column: int | None = None
    ) -> None:
        self.message = message
        self.file = file
        self.equation = equation
        self.column = column
        super().__init__(message)

    def __str__(self) -> str:
        place = self.file
        if self.equation is not None:
            place += f": equation {self.equation}"
            if self.column is not None:
                place += f", column {self.column}"
        return f"{place}: {self.message}"


class EvaluationError(SpecError):
    """The equations are well formed, but these inputs or options cannot be evaluated."""
