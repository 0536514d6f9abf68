"""How many elements the equations gather at once, which bounds the length of a case that is judged in float64.

A subscript that is more than an index, as in `Q[(t + u) % N,d]`, makes the evaluator lay out one element for every
combination of the indices in it; plain subscripts are contracted and need no such room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from attnspec.conformance.shapes import derived, roles
from attnspec.spec.language import SpecError, static_value, subexpressions
from attnspec.spec.language.check import left_indices
from attnspec.spec.language.syntax import Name, Num, Ref
from attnspec.spec.mechanism import Mechanism

MOST = 1 << 27
"""Elements: a gibibyte in float64."""


def gathered(mechanism: Mechanism, sizes: Mapping[str, int]) -> int:
    """Elements of the largest gather of all equations at these sizes; an index of unknown size counts as one.

    Where a definition has the queries' index on its left side, only the few rows that a long case looks at count.
    """
    full = derived(mechanism, sizes)
    defaults = {name: decl.default for name, decl in mechanism.options.items() if decl.formula is None}
    lengths: dict[str, int] = {}
    for index, size in mechanism.program.declarations.indices.items():
        try:
            value = static_value(size, sizes=full, options=defaults)
        except SpecError:
            value = None
        lengths[index] = max(1, int(value)) if isinstance(value, int | float) else 1
    largest = 0
    rows = roles(mechanism).query_index
    for line in mechanism.program.definitions.values():
        by_row = rows in left_indices(line)
        for node in subexpressions(line.body):
            if not isinstance(node, Ref) or all(isinstance(at, Name | Num) for at in node.subscripts):
                continue
            used = {at.id for subscript in node.subscripts for at in subexpressions(subscript) if isinstance(at, Name)}
            decl = mechanism.inputs.get(node.name)
            used |= set(decl.batch) if decl is not None else set(mechanism.batch)
            used -= {rows} if by_row else set()
            largest = max(largest, math.prod(lengths[name] for name in used if name in lengths))
    return largest
