"""What decides which keys a query sees: the options that the definition `keep` reads, and whether it hides by default.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attnspec.conformance import shapes
from attnspec.conformance.case_id import CaseError, make
from attnspec.conformance.data import build
from attnspec.spec.language import subexpressions
from attnspec.spec.language.static import Setting, plan_for
from attnspec.spec.language.syntax import Name, Node, Ref
from attnspec.spec.mechanism import Mechanism

USUAL = frozenset({"causal", "causal_alignment", "window_left", "window_right", "chunk", "sink_tokens"})
"""Options that decide it where a mechanism defines no `keep`."""
SCORING = ("query", "key", "value")


def _read(bodies: Mapping[str, object], name: str) -> set[str]:
    """What a definition reads, itself or through others."""
    found: set[str] = set()
    todo = [name]
    while todo:
        body = bodies.get(todo.pop())
        for node in subexpressions(body) if isinstance(body, Node) else ():
            used = node.id if isinstance(node, Name) else node.name if isinstance(node, Ref) else ""
            if used and used not in found:
                found.add(used)
                todo.append(used)
    return found


def _scored(mechanism: Mechanism, read: set[str]) -> bool:
    """Whether scores decide, where a hidden NaN would change who sees whom."""
    return any(mechanism.inputs[name].role in SCORING for name in read if name in mechanism.inputs)


@shapes.per_mechanism
def deciding(mechanism: Mechanism) -> frozenset[str]:
    """The options that decide which keys a query sees."""
    definitions = mechanism.program.definitions
    if "keep" not in definitions:
        return USUAL & set(mechanism.options)
    read = _read({name: line.body for name, line in definitions.items()}, "keep")
    return frozenset() if _scored(mechanism, read) else frozenset(read & set(mechanism.options))


@shapes.per_mechanism
def hides_by_default(mechanism: Mechanism) -> bool:
    """Whether some query does not see some key without any option or optional input, whatever the scores."""
    if "keep" not in mechanism.program.definitions:
        return False
    for wanted in shapes.alternatives(shapes.BASE):
        try:
            data = build(make(mechanism, "shapes", sizes=wanted))
            break
        except CaseError:
            continue
    else:
        return False
    sizes, options = mechanism.resolve(data.inputs, data.options)
    given = {name: value for name, value in options.items() if value is not None}
    present = frozenset(given) | {name for name, value in data.inputs.items() if value is not None}
    if _scored(mechanism, _read(plan_for(mechanism.program, Setting(sizes, given, present)).bodies, "keep")):
        return False
    return not np.all(mechanism.evaluate(data.inputs, data.options, outputs=["keep"])["keep"])
