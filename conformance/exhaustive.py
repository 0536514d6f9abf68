"""Small scope, exhaustively: at tiny sizes every mask, window, split into sequences and block table.

Most bugs have a witness there. Everything that can stand in one call does (the batch axis holds all masks, all splits,
all tables); windows are options, so they are further calls of one case. A scope is a name in the values part of a case
id; `scope` builds its data, `available` says which scopes a mechanism has: they go by the roles of its inputs and the
names of window options. Used by `data` and `cases`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance import shapes, values
from attnspec.conformance.case_id import CaseError
from attnspec.conformance.types import Case, CaseData
from attnspec.spec.mechanism import Mechanism

TOKENS = 6
PAGES = 3
SLOTS = 2
WINDOWS = ("window_left", "window_right")


def _every_mask(spec: Mechanism, case: Case, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """All boolean masks over the queries and keys of the case, one per batch entry."""
    name = next(name for name in inputs if spec.inputs[name].role == "mask")
    batch = inputs[name].shape[0]
    rows, keys = inputs[name].shape[-2:]
    bits = np.arange(batch)[:, None] >> np.arange(rows * keys)[None, :] & 1
    inputs[name] = np.broadcast_to(bits.reshape(batch, 1, rows, keys).astype(bool), inputs[name].shape).copy()
    return []


def _every_split(spec: Mechanism, case: Case, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """All splits of 0 to 6 tokens into sequences, one per batch entry; the tokens beyond are padding."""
    splits = [ids for length in range(TOKENS + 1) for ids in _compositions(length)]
    for name in inputs:
        if spec.inputs[name].role == "segment":
            table = np.full(inputs[name].shape, -1, dtype=np.int64)
            for row, ids in enumerate(splits[: table.shape[0]]):
                table[row, : len(ids)] = ids
            inputs[name] = table
    return []


def _compositions(length: int) -> list[list[int]]:
    """Segment ids of all ways to cut `length` tokens into consecutive sequences: [0,0,0], [0,0,1], [0,1,1], ..."""
    if length == 0:
        return [[]]
    found = []
    for cuts in itertools.product((0, 1), repeat=length - 1):
        found.append([0, *np.cumsum(cuts).tolist()])
    return found


def _every_table(spec: Mechanism, case: Case, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """All block tables over three pages, each with every length; entries beyond the length are -1."""
    tables = list(itertools.product(range(PAGES), repeat=PAGES))
    pairs = list(itertools.product(tables, range(PAGES * SLOTS + 1)))
    table = next(name for name in inputs if spec.inputs[name].role == "page_table")
    length = next(name for name in inputs if spec.inputs[name].role == "length")
    count = inputs[table].shape[0]
    found = np.full(inputs[table].shape, -1, dtype=np.int64)
    lengths = np.zeros(count, dtype=np.int64)
    for row, (pages, keys) in enumerate(pairs[:count]):
        used = -(-keys // SLOTS)
        found[row, :used] = pages[:used]
        lengths[row] = keys
    inputs[table], inputs[length] = found, lengths
    return []


def _every_window(spec: Mechanism, case: Case, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Windows of no bound, 0, 1 and 3 on each side that the case sets."""
    return _windows(case, [None, 0, 1, 3])


def _every_window_full(spec: Mechanism, case: Case, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every window up to the number of keys."""
    return _windows(case, [None, 0, 1, 2, 3, 4, 5])


def _windows(case: Case, widths: list[int | None]) -> list[dict[str, Any]]:
    sides = [name for name in WINDOWS if name in case.options]
    return [
        {**case.options, **dict(zip(sides, pair, strict=True))} for pair in itertools.product(widths, repeat=len(sides))
    ]


SCOPES: dict[str, Callable[[Mechanism, Case, dict[str, Any]], list[dict[str, Any]]]] = {
    "every_mask": _every_mask,
    "every_split": _every_split,
    "every_table": _every_table,
    "every_window": _every_window,
    "every_window_full": _every_window_full,
}

SIZES: dict[str, dict[str, int]] = {
    "every_mask": {
        "batch": 4096, "heads": 1, "kv_heads": 1, "queries": 3, "keys": 4, "feature": 4, "value_feature": 4
    },
    "every_split": {
        "batch": 64, "heads": 1, "kv_heads": 1, "queries": TOKENS, "keys": TOKENS, "feature": 4, "value_feature": 4
    },
    "every_table": {
        "batch": PAGES**PAGES * (PAGES * SLOTS + 1), "heads": 1, "kv_heads": 1, "queries": 2, "keys": PAGES * SLOTS,
        "feature": 4, "value_feature": 4, "Ps": SLOTS, "Kt": PAGES, "Np": PAGES,
    },
    "every_window": {
        "batch": 1, "heads": 1, "kv_heads": 1, "queries": 4, "keys": 5, "feature": 4, "value_feature": 4
    },
    "every_window_full": {
        "batch": 1, "heads": 1, "kv_heads": 1, "queries": 5, "keys": 4, "feature": 4, "value_feature": 4
    },
}  # fmt: skip
"""Sizes of each scope, by class."""


def scope(spec: Mechanism, case: Case) -> CaseData:
    """The data of a scope's case."""
    present = tuple(name for name, decl in spec.inputs.items() if not decl.optional or name in case.inputs)
    inputs = values.draw(
        spec, shapes.roles(spec), sizes=shapes.derived(spec, case.sizes), options=case.options, present=present,
        broadcast=case.params.get("broadcast", {}), values="normal", dtype=case.dtype, seed=case.seed,
    )  # fmt: skip
    try:
        further = SCOPES[case.values](spec, case, inputs)
    except StopIteration:
        raise CaseError(f"case id: {case.values!r} needs an input that this case does not have") from None
    settings: list[Mapping[str, Any]] = list(further) or [case.options]
    data = CaseData(inputs, dict(settings[0]))
    data.extra["calls"] = [CaseData(dict(inputs), dict(options)) for options in settings[1:]]
    return data


def available(
    spec: Mechanism, inputs: set[str], options: set[str]
) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """The scopes that these inputs and options allow, each with the inputs and options of its case."""
    by_role: dict[str, list[str]] = {}
    for name in spec.inputs:
        if name in inputs:
            by_role.setdefault(spec.inputs[name].role, []).append(name)
    found: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}
    pair = {shapes.roles(spec).query_index, shapes.roles(spec).key_index}
    if "mask" in by_role and pair <= set(spec.inputs[by_role["mask"][0]].axes):
        found["every_mask"] = (tuple(by_role["mask"][:1]), {})
    if len(by_role.get("segment", [])) == 2:
        found["every_split"] = (tuple(by_role["segment"]), {})
    paged = [name for role in ("key", "value") for name in by_role.get(role, []) if name not in spec.usual]
    lengths = [name for name in by_role.get("length", []) if name.startswith("kv")]
    if "page_table" in by_role and paged and lengths:
        found["every_table"] = ((*paged, *by_role["page_table"], *lengths), {})
    sides = {name: 0 for name in WINDOWS if name in options}
    if sides:
        found["every_window"] = ((), sides)
        found["every_window_full"] = ((), sides)
    return found
