"""Sizes of cases, from the roles of a mechanism's inputs.

`roles` finds which size is the number of queries, of keys, of heads, and which are the features, by the roles query,
key and value alone; `families` then gives the shapes that break kernels: 0, 1, primes, powers of two and their
neighbours, N != M, one query, odd head sizes, different features of keys and values, grouped heads. A mechanism that
lacks one of the roles gets the same list with what it lacks left out, and sizes without a role take small values.
Used by `cases`, `values` and `data`; it evaluates nothing but the file's constraints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from attnspec.spec.language import SpecError, static_value, subexpressions
from attnspec.spec.language.syntax import InputDecl, Name, Reduce
from attnspec.spec.mechanism import Mechanism

T = TypeVar("T")

CLASSES = ("batch", "heads", "kv_heads", "queries", "keys", "feature", "value_feature")
OTHER = {"Ps": 4, "Kg": 1}
"""Sizes without a role that have a customary value; the others take 3."""


@dataclass(frozen=True)
class Roles:
    """Which size and index plays which part. `names` maps a class from `CLASSES` to the size's name."""

    names: Mapping[str, str]
    query_index: str
    key_index: str
    heads: tuple[str, ...]


def per_mechanism(function: Callable[..., T]) -> Callable[..., T]:
    """Remember a function of a mechanism (and further hashable arguments): mechanisms hold dicts and cannot be keys."""
    found: dict[Any, tuple[Mechanism, T]] = {}

    @functools.wraps(function)
    def remembered(mechanism: Mechanism, *arguments: Any) -> T:
        key = (id(mechanism), *arguments)
        if key not in found or found[key][0] is not mechanism:
            found[key] = mechanism, function(mechanism, *arguments)
        return found[key][1]

    return remembered


@per_mechanism
def operators(mechanism: Mechanism) -> frozenset[str]:
    """The reductions and normalizers that the equations use: `sum`, `softmax`, `rank`, ..."""
    tables = mechanism.program.definitions, mechanism.program.boundaries
    nodes = (node for table in tables for line in table.values() for node in subexpressions(line.body))
    return frozenset(node.op for node in nodes if isinstance(node, Reduce))


@per_mechanism
def roles(mechanism: Mechanism) -> Roles:
    """The parts that sizes play, from the first query, key and value input."""
    return _roles(mechanism)


def _first(mechanism: Mechanism, role: str) -> InputDecl | None:
    usual = [name for name in mechanism.inputs if not mechanism.inputs[name].optional or name in mechanism.usual]
    return next((mechanism.inputs[name] for name in usual if mechanism.inputs[name].role == role), None)


def _size(mechanism: Mechanism, index: str) -> str | None:
    node = mechanism.indices.get(index)
    return node.id if isinstance(node, Name) else None


def _roles(mechanism: Mechanism) -> Roles:
    query, key, value = (_first(mechanism, role) for role in ("query", "key", "value"))
    names: dict[str, str] = {}
    heads: list[str] = []
    index = {"query": "", "key": ""}

    def put(part: str, axis: str) -> None:
        size = _size(mechanism, axis)
        if size is not None and size not in names.values():
            names[part] = size

    for axis in mechanism.batch[:1]:
        put("batch", axis)
    for decl, place, head, feature in (
        (query, "queries", "heads", "feature"),
        (key, "keys", "kv_heads", "feature"),
        (value, "keys", "kv_heads", "value_feature"),
    ):
        if decl is None or not decl.axes:
            continue
        # Axes are [head, token, feature], unless an index named `i` (`j` for keys) says that tokens stand further left.
        named = "i" if place == "queries" else "j"
        token = decl.axes.index(named) if named in decl.axes[:-1] else len(decl.axes) - 2
        if token >= len(decl.axes) - 2:
            put(feature, decl.axes[-1])
        if token >= 0:
            put(place, decl.axes[token])
            which = "query" if place == "queries" else "key"
            index[which] = index[which] or decl.axes[token]
        if token >= 1:
            put(head, decl.axes[token - 1])
            heads.append(decl.axes[token - 1])
    return Roles(names, index["query"], index["key"] or index["query"], tuple(dict.fromkeys(heads)))


def admissible(
    mechanism: Mechanism, sizes: Mapping[str, int], options: Mapping[str, object], present: Iterable[str]
) -> bool:
    """Whether the file's constraints allow this combination of sizes, options and inputs."""
    return broken_constraint(mechanism, sizes, options, present) is None


def broken_constraint(
    mechanism: Mechanism, sizes: Mapping[str, int], options: Mapping[str, object], present: Iterable[str]
) -> str | None:
    """The message of the first constraint that does not hold; None: all hold."""
    full = derived(mechanism, sizes)
    values: dict[str, Any] = {name: d.default for name, d in mechanism.options.items() if d.formula is None}
    values |= dict(options)
    given = frozenset(present) | {name for name, value in values.items() if value is not None}
    for name, size in full.items():
        decl = mechanism.sizes.get(name)
        if decl is not None and size < decl.minimum:
            return f"size {name} = {size} is below its minimum {decl.minimum}"
    for constraint in mechanism.constraints:
        if static_value(constraint.rule, sizes=full, options=values, present=given) is False:
            return constraint.message
    return None


def derived(mechanism: Mechanism, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes with those that formulas give filled in."""
    full = dict(sizes)
    for _ in range(len(mechanism.sizes)):
        for name, decl in mechanism.sizes.items():
            rule = decl.value if decl.value is not None else mechanism.otherwise.get(name)
            if name in full or rule is None:
                continue
            try:
                value = static_value(rule, sizes=full)
            except (SpecError, ZeroDivisionError):
                value = None
            if value is not None:
                full[name] = int(value)
    return full


def sizes_of(
    mechanism: Mechanism, wanted: Mapping[str, int], present: Iterable[str], fallback: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Values for every size that the present inputs' axes need.

    Args:
        wanted: by class ("queries") or by the size's own name; the latter wins.
        fallback: used where `wanted` is silent; `BASE` by default.
    """
    parts = roles(mechanism).names
    by_name = {parts[part]: value for part, value in {**BASE, **(fallback or {}), **wanted}.items() if part in parts}
    by_name |= {name: value for name, value in wanted.items() if name in mechanism.sizes}
    needed: list[str] = []
    for name in present:
        decl = mechanism.inputs[name]
        for axis in (*decl.batch, *decl.axes):
            size = _size(mechanism, axis)
            if size is not None and size not in needed:
                needed.append(size)
    order = [name for name in mechanism.sizes if name in needed and mechanism.sizes[name].value is None]
    found = {name: by_name.get(name, OTHER.get(name, 3)) for name in order}
    if {"Kt", "Ps", "Np"} <= set(found) and "keys" in parts:
        # Pages: a table long enough for the keys, every entry of the batch with pages of its own, and one to spare.
        keys = by_name[parts["keys"]]
        if "Kt" not in wanted:
            found["Kt"] = -(-keys // found["Ps"])
        if parts["keys"] in found:
            found[parts["keys"]] = found["Kt"] * found["Ps"]
        if "Np" not in wanted:
            found["Np"] = found.get(parts.get("batch", ""), 1) * found["Kt"] + 1
    return found


def alternatives(wanted: Mapping[str, int]) -> Iterable[dict[str, int]]:
    """The sizes as wanted, and where a mechanism's constraints forbid those: with as many keys as queries (an even
    number), with the numbers of query and key heads exchanged (groups of the queries), and with as many key heads.
    """
    even = 2 * ((wanted.get("queries", BASE["queries"]) + 1) // 2)
    square = {"queries": even, "keys": even}
    turned = {
        "heads": wanted.get("kv_heads", BASE["kv_heads"]), "kv_heads": wanted.get("heads", BASE["heads"])
    }  # fmt: skip
    alike = {"kv_heads": wanted.get("heads", BASE["heads"])}
    yield dict(wanted)
    for change in (square, turned, alike, {**square, **turned}, {**square, **alike}):
        yield {**wanted, **change}


BASE: dict[str, int] = {
    "batch": 2, "heads": 4, "kv_heads": 2, "queries": 19, "keys": 23, "feature": 16, "value_feature": 16
}  # fmt: skip
TINY: dict[str, int] = {
    "batch": 2, "heads": 2, "kv_heads": 1, "queries": 5, "keys": 7, "feature": 4, "value_feature": 3
}  # fmt: skip
TILES: dict[str, int] = {
    "batch": 1, "heads": 2, "kv_heads": 1, "queries": 67, "keys": 131, "feature": 16, "value_feature": 16
}  # fmt: skip
WIDE: dict[str, int] = {
    "batch": 1, "heads": 2, "kv_heads": 2, "queries": 31, "keys": 300, "feature": 16, "value_feature": 16
}  # fmt: skip


def _shape(b: int, h: int, hk: int, n: int, m: int, d: int, e: int) -> dict[str, int]:
    return dict(zip(CLASSES, (b, h, hk, n, m, d, e), strict=True))


SMOKE: tuple[dict[str, int], ...] = (
    _shape(2, 4, 2, 19, 23, 16, 16),
    _shape(1, 2, 1, 67, 131, 32, 32),
    _shape(2, 4, 2, 1, 37, 16, 16),
    _shape(1, 1, 1, 1, 1, 1, 1),
    _shape(1, 2, 2, 29, 11, 40, 40),
    _shape(2, 4, 2, 19, 23, 16, 8),
)
STANDARD: tuple[dict[str, int], ...] = (
    *SMOKE,
    _shape(1, 2, 1, 0, 5, 8, 8),
    _shape(1, 2, 1, 3, 0, 8, 8),
    _shape(2, 3, 1, 13, 17, 7, 7),
    _shape(1, 3, 1, 13, 17, 7, 5),
    _shape(1, 2, 2, 16, 17, 16, 16),
    _shape(1, 2, 2, 15, 16, 16, 16),
    _shape(1, 1, 1, 33, 31, 33, 33),
    _shape(1, 2, 1, 64, 65, 24, 24),
    _shape(1, 2, 1, 63, 128, 16, 16),
    _shape(1, 1, 1, 129, 127, 16, 16),
    _shape(1, 2, 2, 31, 300, 16, 16),
    _shape(1, 1, 1, 9, 19, 48, 48),
    _shape(1, 2, 1, 9, 19, 64, 64),
    _shape(1, 1, 1, 9, 19, 80, 80),
    _shape(1, 2, 2, 9, 19, 96, 96),
    _shape(1, 2, 1, 9, 35, 128, 128),
    _shape(1, 2, 1, 131, 150, 64, 64),
    _shape(1, 2, 1, 70, 131, 128, 128),
    _shape(1, 1, 1, 5, 17, 160, 160),
    _shape(1, 1, 1, 5, 17, 256, 256),
    _shape(1, 2, 1, 9, 19, 64, 32),
    _shape(1, 2, 1, 9, 19, 16, 136),
    _shape(1, 6, 1, 7, 21, 8, 8),
    _shape(2, 6, 3, 7, 21, 8, 8),
    _shape(1, 7, 7, 7, 21, 8, 8),
    _shape(3, 8, 2, 1, 131, 16, 16),
)
EDGES = (1, 2, 31, 32, 65, 127, 128, 257)
EXHAUSTIVE: tuple[dict[str, int], ...] = (
    *STANDARD,
    _shape(0, 2, 1, 3, 5, 8, 8),
    *(_shape(1, 2, 1, n, m, 16, 16) for n in EDGES for m in EDGES),
    *(_shape(1, 2, 1, 9, 35, d, d) for d in (1, 2, 3, 15, 17, 31, 56, 63, 65, 72, 112, 127, 129, 192, 255)),
    _shape(1, 2, 1, 17, 1025, 64, 64),
    _shape(1, 2, 1, 520, 513, 64, 64),
    _shape(5, 12, 4, 33, 47, 32, 32),
)
FAMILIES = {"smoke": SMOKE, "standard": STANDARD, "exhaustive": EXHAUSTIVE}


def families(mechanism: Mechanism, level: str, present: Iterable[str]) -> list[dict[str, int]]:
    """The shapes of a level that the mechanism's constraints allow, without repetition."""
    inputs = tuple(present)
    found: list[dict[str, int]] = []
    for wanted in FAMILIES[level]:
        for sizes in (sizes_of(mechanism, other, inputs) for other in alternatives(wanted)):
            if admissible(mechanism, sizes, {}, inputs):
                if sizes not in found:
                    found.append(sizes)
                break
    return found
