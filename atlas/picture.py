"""Patterns as inline SVG: a row per output position, a column per input position.

Three shades tell the size of the derivative. Colours come from the page's style sheet, so that a picture follows the
reader's light or dark mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnspec.atlas.markup import Html, el
from attnspec.atlas.pattern import Axis, Pattern

SIDE = 288
"""Pixels that a side of the picture takes about."""
SMALLEST, LARGEST = 3, 16
SHADES = (1e-2, 1e-4)
"""Shares of the largest derivative at which the next lighter shade begins."""
LEFT, TOP, END = 46, 40, 10
STROKED = 6
"""Cells from this size on are set apart by lines."""


def figure(pattern: Pattern, number: int) -> Html:
    """A pattern with its caption. `number` makes the ids unique on the page."""
    title, text = name(pattern), words(pattern)
    return el(
        "figure", svg(pattern, f"pattern{number}", title, text), el("figcaption", el("b", title), " ", text + ".")
    )


def name(pattern: Pattern) -> str:
    """What depends on what, and under which setting: `O[i] on V[j]; causal = true`."""
    setting = [f"{option} = {_value(value)}" for option, value in pattern.options.items()]
    if pattern.given:
        setting.append("with " + ", ".join(pattern.given))
    return f"{_shown(pattern.rows)} on {_shown(pattern.columns)}; {', '.join(setting) or 'default options'}"


def words(pattern: Pattern) -> str:
    """The pattern in a sentence, for those who do not see the picture."""
    reads = pattern.reads
    rows, columns = reads.shape
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    known: list[tuple[str, Any]] = [
        ("every row depends on every column", row >= 0),
        ("each row depends on its own column alone", row == column),
        ("row i depends on columns 0 to i", column <= row),
        ("row i depends on columns 0 to i - 1", column < row),
        (f"row i depends on columns 0 to i + {columns - rows}", column <= row + columns - rows),
    ]
    count = f"{int(reads.sum())} of {reads.size} pairs"
    for text, mask in known:
        if np.array_equal(reads, np.broadcast_to(mask, reads.shape)):
            return f"{count}: {text}"
    each = reads.sum(1)
    if each.min() == each.max():
        return f"{count}: each row depends on {each.max()} column{'s' if each.max() != 1 else ''}"
    return f"{count}: a row depends on {each.min()} to {each.max()} columns"


def svg(pattern: Pattern, identity: str, title: str, text: str) -> Html:
    """The picture alone."""
    wide, high = (_cell(axis.size) for axis in (pattern.columns, pattern.rows))
    width, height = wide * pattern.columns.size, high * pattern.rows.size
    at_right, at_bottom = LEFT + width, TOP + height
    right, bottom = max(at_right, LEFT + 120) + END, max(at_bottom, TOP + 60) + END
    middle = TOP + height // 2
    shapes = [
        el("title", title, id=f"{identity}t"),
        el("desc", text, id=f"{identity}d"),
        el("rect", x=LEFT, y=TOP, width=width, height=height, class_="empty"),
        *(el("path", d=path, class_=f"shade{shade}") for shade, path in enumerate(_paths(pattern, wide, high)) if path),
        *_grid(pattern, wide, high),
        el("rect", x=LEFT, y=TOP, width=width, height=height, class_="frame"),
        el("text", _label(pattern.columns), x=LEFT, y=14),
        *_ticks(pattern.columns, [{"x": LEFT, "y": TOP - 6}, {"x": at_right, "y": TOP - 6, "text_anchor": "end"}]),
        el("text", _label(pattern.rows), x=-middle, y=14, transform="rotate(-90)", text_anchor="middle"),
        *_ticks(pattern.rows, [{"x": LEFT - 6, "y": y, "text_anchor": "end"} for y in (TOP + 10, at_bottom - 2)]),
    ]
    return el(
        "svg", *shapes, viewBox=f"0 0 {right} {bottom}", width=right, height=bottom, role="img",
        aria_labelledby=f"{identity}t {identity}d",
    )  # fmt: skip


def shades(pattern: Pattern) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Per cell: 0 for the largest derivatives, one more for each step down, -1 where there is none."""
    share = pattern.strength / max(float(pattern.strength.max(initial=0)), np.finfo(float).tiny)
    steps = sum((share < bound).astype(np.int64) for bound in SHADES)
    return np.where(pattern.reads, steps, -1)


def _paths(pattern: Pattern, wide: int, high: int) -> list[str]:
    """Per shade, the rectangles of its cells; neighbours in a row are one rectangle."""
    found = [""] * (len(SHADES) + 1)
    for row, line in enumerate(shades(pattern)):
        begins = [0, *(np.flatnonzero(np.diff(line)) + 1), len(line)]
        for start, stop in itertools.pairwise(begins):
            if stop > start and line[start] >= 0:
                length = (stop - start) * wide
                found[line[start]] += f"M{LEFT + start * wide} {TOP + row * high}h{length}v{high}h-{length}z"
    return found


def _grid(pattern: Pattern, wide: int, high: int) -> list[Html]:
    """Lines between cells, and stronger ones where an outer index of a position moves on."""
    width, height = wide * pattern.columns.size, high * pattern.rows.size
    down = [f"M{LEFT + n * wide} {TOP}v{height}" for n in range(1, pattern.columns.size) if wide >= STROKED]
    across = [f"M{LEFT} {TOP + n * high}h{width}" for n in range(1, pattern.rows.size) if high >= STROKED]
    lines = [el("path", d="".join(down + across), class_="cells")] if down or across else []
    outer = [f"M{LEFT + n * wide} {TOP}v{height}" for n in _steps(pattern.columns)]
    outer += [f"M{LEFT} {TOP + n * high}h{width}" for n in _steps(pattern.rows)]
    return [*lines, el("path", d="".join(outer), class_="groups")] if outer else lines


def _steps(axis: Axis) -> range:
    inner = axis.lengths[-1] if len(axis.lengths) > 1 else axis.size
    return range(inner, axis.size, max(inner, 1))


def _ticks(axis: Axis, places: Sequence[Mapping[str, str | int]]) -> list[Html]:
    """The first and the last position, as the indices that they are."""
    ends = (0, axis.size - 1) if axis.size > 1 else (0,)
    return [
        el("text", ", ".join(str(int(n)) for n in np.unravel_index(end, axis.lengths)), class_="tick", **place)
        for end, place in zip(ends, places)
    ]


def _cell(count: int) -> int:
    return max(SMALLEST, min(LARGEST, SIDE // max(count, 1)))


def _label(axis: Axis) -> str:
    return f"{axis.tensor} at {', '.join(axis.indices)}"


def _shown(axis: Axis) -> str:
    return f"{axis.tensor}[{', '.join(axis.indices)}]"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
