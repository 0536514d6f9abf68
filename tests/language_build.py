"""Short ways to declare what test equations refer to.

`declared("i:N j:M d", "Q:id K:jd bias?:ij mask?bool:ij", "O:ie")`: an index without a size has the upper-case letter;
`?` marks an optional input, `bool` or `int` after it the kind; axes are single letters, `.` stands for none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

from attnspec.spec.language import (
    Declarations,
    InputDecl,
    OptionDecl,
    OutputDecl,
    Program,
    SizeDecl,
    read,
    read_expression,
)
from attnspec.spec.language.syntax import Kind

_INPUT = re.compile(r"(\w+?)(\?)?(?:!(bool|int))?:([a-z.1-9]*)$")


def declared(
    indices: str,
    inputs: str,
    outputs: str,
    *,
    options: Sequence[OptionDecl] = (),
    sizes: Mapping[str, str] | None = None,
    batch: str = "",
    broadcast: Mapping[str, str] | None = None,
) -> Declarations:
    """Declarations from short strings; `sizes` maps further sizes to formulas ('' for a free one)."""
    formulas = {name: size or name.upper() for name, _, size in (entry.partition(":") for entry in indices.split())}
    known = {size: SizeDecl(size) for size in formulas.values() if size.isidentifier()}
    for name, formula in (sizes or {}).items():
        known[name] = SizeDecl(name, 0, read_expression(formula) if formula else None)
    given = {}
    for entry in inputs.split():
        match = _INPUT.match(entry)
        assert match is not None, entry
        name, optional, kind, axes = match.groups()
        given[name] = InputDecl(
            name,
            tuple(axes.replace(".", "")),
            batch=tuple(batch),
            kind=cast(Kind, kind or "real"),
            optional=bool(optional),
            broadcast=tuple((broadcast or {}).get(name, "")),
        )
    results = {}
    for entry in outputs.split():
        name, _, axes = entry.partition(":")
        results[name] = OutputDecl(name, tuple(axes.replace(".", "")))
    return Declarations(
        sizes=known,
        indices={name: read_expression(size) for name, size in formulas.items()},
        inputs=given,
        options={option.name: option for option in options},
        outputs=results,
        batch=tuple(batch),
    )


ATTENTION = """
scale = D ** -0.5
allowed[i,j] = j <= i + M - N if causal else True
P[i,j] = softmax[j : allowed[i,j]](
    scale * sum[d](Q[i,d] * K[j,d])
    + (bias[i,j] if present(bias) else 0))
O[i,e] = sum[j](P[i,j] * V[j,e])
"""


def attention(batch: str = "") -> Program:
    """Softmax attention with a causal option and an optional, broadcastable bias."""
    indices = "i:N j:M d e" + "".join(f" {axis}" for axis in batch)
    declarations = declared(
        indices,
        "Q:id K:jd V:je bias?:ij",
        "O:ie",
        options=[OptionDecl("causal", "bool", False)],
        batch=batch,
        broadcast={"bias": f"{batch}i"},
    )
    return read(ATTENTION, declarations)
