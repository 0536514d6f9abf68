"""Cuts a text into logical lines: comments off, lines joined inside open brackets, hostile text refused
early.

Used by `reader` (equations) and `macros` (macro definitions). It refuses control characters, non-ASCII
characters outside comments, backslashes, unbalanced or too deeply nested brackets, and texts, lines or names
that are too long, so that Python's own parser only ever sees short and tame text.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.syntax import Place

MAX_EQUATION = 4000
MAX_EQUATIONS = 400
MAX_TEXT = 400_000
MAX_NESTING = 60
MAX_NAME = 64

_PAIRS = {")": "(", "]": "[", "}": "{"}
_LONG_NAME = re.compile(rf"\w{{{MAX_NAME + 1},}}", re.ASCII)


@dataclass(frozen=True)
class Line:
    """A logical line: the physical line it starts at (from 1) and its text, which may hold newlines."""

    number: int
    text: str

    def place(self, offset: int) -> Place:
        """The position of a character of `text`."""
        before = self.text[:offset]
        return Place(self.number + before.count("\n"), offset - (before.rfind("\n") + 1) + 1)


def fail(message: str, at: Place, file: str) -> SpecError:
    """A SpecError at a place."""
    return SpecError(message, file=file, equation=at.line or None, column=at.column or None)


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a name close to a known one, else nothing."""
    match = difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def logical_lines(text: str, file: str) -> list[Line]:
    """The logical lines of `text` without comments and blank lines.

    Raises:
        SpecError: for characters, lengths and brackets that no equation may have.
    """
    if not isinstance(text, str):
        raise SpecError(f"equations must be text, got {type(text).__name__}", file=file)
    if len(text) > MAX_TEXT:
        raise SpecError(f"text of {len(text)} characters; at most {MAX_TEXT} are read", file=file)
    lines: list[Line] = []
    pending: list[str] = []
    start = length = 0
    stack: list[tuple[str, Place]] = []
    physical = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, raw in enumerate(physical, 1):
        code = _without_comment(raw, number, stack, file)
        if not pending:
            start, length = number, 0
        pending.append(code)
        length += len(code) + 1
        if length > MAX_EQUATION + 1:
            raise fail(f"equation longer than {MAX_EQUATION} characters", Place(start, 1), file)
        if stack:
            continue
        joined = "\n".join(pending)
        pending = []
        if joined.strip():
            lines.append(Line(start, joined))
            if len(lines) > MAX_EQUATIONS:
                raise fail(f"more than {MAX_EQUATIONS} equations", Place(start, 1), file)
    if stack:
        bracket, at = stack[-1]
        raise fail(f"bracket '{bracket}' is never closed", at, file)
    return lines


def _without_comment(raw: str, number: int, stack: list[tuple[str, Place]], file: str) -> str:
    """The code part of a physical line; `stack` (open brackets) is updated."""
    quote = ""
    for position, char in enumerate(raw):
        if position > MAX_EQUATION:
            raise fail(f"equation longer than {MAX_EQUATION} characters", Place(number, 1), file)
        if quote:
            if char == quote:
                quote = ""
        elif char == "#":
            raw = raw[:position]
            break
        elif char in "'\"":
            quote = char
        elif char in "([{":
            stack.append((char, Place(number, position + 1)))
            if len(stack) > MAX_NESTING:
                raise fail(f"brackets nested deeper than {MAX_NESTING}", Place(number, position + 1), file)
        elif char in ")]}":
            if not stack:
                raise fail(f"bracket '{char}' closes nothing", Place(number, position + 1), file)
            opened, opened_at = stack.pop()
            if opened != _PAIRS[char]:
                raise fail(
                    f"bracket '{char}' does not match '{opened}' of line {opened_at.line}, column {opened_at.column}",
                    Place(number, position + 1),
                    file,
                )
        if char == "\\" or not (char == "\t" or " " <= char <= "~"):
            at = Place(number, position + 1)
            raise fail(f"character {char!a} is not part of the language; write plain ASCII", at, file)
    if quote:
        raise fail(f"string is not closed on its line, expected {quote}", Place(number, len(raw) + 1), file)
    found = _LONG_NAME.search(raw)
    if found and not re.fullmatch(r"[0-9]+", found.group()):
        raise fail(f"name or number longer than {MAX_NAME} characters", Place(number, found.start() + 1), file)
    return raw


def split_equation(line: Line, file: str) -> int:
    """The offset of the one top-level `=` of a line."""
    depth = 0
    quote = ""
    text = line.text
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "=" and depth == 0:
            before = text[position - 1] if position else " "
            after = text[position + 1 : position + 2]
            if after == "=" or before in "<>!=":
                continue
            if before in "+-*/%:@&|^":
                raise fail(
                    f"'{before}=' is not part of the language; an equation is `name[indices] = expression`",
                    line.place(position - 1),
                    file,
                )
            return position
    indent = len(text) - len(text.lstrip())
    raise fail("no '=' found; an equation is `name[indices] = expression`", line.place(indent), file)


def parse_expression(line: Line, start: int, end: int, file: str) -> ast.expr:
    """Python's syntax tree of `line.text[start:end]`, with columns as in the line (from 0, offset by one)."""
    source = "".join(c if c == "\n" else " " for c in line.text[:start]) + line.text[start:end]
    if not source.strip():
        raise fail("expected an expression, found nothing", line.place(start), file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(f"({source}\n)", mode="eval").body
    except SyntaxError as error:
        at = line.place(start)
        if error.lineno is not None and error.offset is not None:
            row = min(error.lineno, source.count("\n") + 1)
            shift = 1 if row == 1 else 0
            at = Place(line.number + row - 1, max(1, error.offset - shift))
        reason = (error.msg or "invalid syntax").split("\n")[0]
        raise fail(f"not an expression: {reason[:120]}", at, file) from None
    except (RecursionError, MemoryError):
        raise fail(f"expression nested deeper than {MAX_NESTING}", line.place(start), file) from None
    except (ValueError, OverflowError) as error:
        raise fail(f"not an expression: {str(error)[:120]}", line.place(start), file) from None


def node_place(node: ast.expr, line: Line) -> Place:
    """The place of a Python node that `parse_expression` returned."""
    shift = 1 if node.lineno == 1 else 0
    return Place(line.number + node.lineno - 1, max(1, node.col_offset + 1 - shift))
