"""From a case to its arrays: `build` draws the values, hides sentinels, adds cotangents and further calls.

What a candidate declares changes the data only where judging would otherwise be meaningless: NaN behind a mask becomes
a large finite sentinel where weights of zero are multiplied, and rows without a defined gradient get no cotangent.

`CaseData.extra` holds `shapes` (of the outputs, in the mechanism's axes), `resolved` (every option with its default),
`calls` (further calls to make after this one in the same process, each a CaseData of its own, judged like it) and
`same` (check "perturb": by output, where the second call's result must equal the first's bit for bit).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance import probes, semantics, shapes, values
from attnspec.conformance.case_id import CaseError
from attnspec.conformance.exhaustive import SCOPES, scope
from attnspec.conformance.recipes import RECIPES
from attnspec.conformance.types import Case, CaseData
from attnspec.spec.language import SpecError, static_value
from attnspec.spec.language.syntax import Name
from attnspec.spec.mechanism import Mechanism, load

HIDDEN = {
    "unseen_nan": ("unseen", "nan"), "unseen_big": ("unseen", "big"),
    "future_nan": ("future", "nan"), "future_inf": ("future", "inf"), "future_big": ("future", "big"),
    "neighbour_nan": ("neighbour", "nan"),
}  # fmt: skip
"""Values that hide something: where (keys that no query sees, the last keys, another batch entry), and what."""
REFUSALS = ("bad_features", "bad_keys", "bad_heads", "bad_mask", "bad_batch")
KEY_SENTINEL = 2.0**8
VALUE_SENTINEL = 2.0**8


def recipes() -> tuple[str, ...]:
    """Every name that may stand in the values part of a case id."""
    return (*RECIPES, *HIDDEN, *REFUSALS, *probes.RECIPES, *SCOPES)


def build(case: Case, declares: Mapping[str, Any] | None = None, *, mechanism: Mechanism | None = None) -> CaseData:
    """The arrays of a case, in the spec's conventions (`semantics.to_candidate` converts them).

    Raises:
        CaseError: unknown values, or a case that the mechanism does not have.
    """
    spec = mechanism or load(case.mechanism)
    if case.values not in recipes():
        raise CaseError(f"case id: unknown values {case.values!r}; known: {', '.join(recipes())}")
    present = tuple(name for name, decl in spec.inputs.items() if not decl.optional or name in case.inputs)
    options = dict(case.options)
    if case.values in SCOPES:
        return finish(case, spec, scope(spec, case), declares)
    base = "normal" if case.values in HIDDEN or case.values in REFUSALS else case.values
    inputs = values.draw(
        spec, shapes.roles(spec), sizes=shapes.derived(spec, case.sizes), options=options, present=present,
        broadcast=case.params.get("broadcast", {}), values="normal" if base in probes.RECIPES else base,
        dtype=case.dtype, seed=case.seed,
    )  # fmt: skip
    data = CaseData(inputs=inputs, options=options)
    if case.values in REFUSALS:
        data.extra = {"resolved": resolved_options(spec, data, declares), "shapes": output_shapes(spec, data)}
        data.inputs = _spoiled(spec, case.values, inputs, case.dtype)
        data.extra["calls"] = []
        return data
    if case.values in probes.RECIPES:
        data.inputs = {
            name: values.rounded(value, case.dtype)
            for name, value in probes.fill(spec, case, inputs, oracle_options(spec, data, declares)).items()
        }
    if case.values in HIDDEN:
        _hide(spec, case, data, declares)
    return finish(case, spec, data, declares)


def finish(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> CaseData:
    """Cotangents, output shapes and further calls."""
    calls = list(data.extra.get("calls", []))
    data.extra["shapes"] = output_shapes(spec, data)
    data.extra["resolved"] = resolved_options(spec, data, declares)
    if case.direction == "backward":
        data.cotangents = _cotangents(case, spec, data, declares)
    calls += FOLLOW.get(case.check, _no_calls)(case, spec, data, declares)
    for call in calls:
        call.extra.setdefault("shapes", output_shapes(spec, call))
        call.extra.setdefault("resolved", resolved_options(spec, call, declares))
        if case.direction == "backward":
            call.cotangents = _cotangents(case, spec, call, declares)
    data.extra["calls"] = calls
    return data


def oracle_options(spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options by which the oracle judges these data."""
    return semantics.fixed_options(spec, data.options, declares)


def resolved_options(spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every option with its value: the case's, the declared, or the default."""
    return spec.resolve(data.inputs, oracle_options(spec, data, declares))[1]


def output_shapes(spec: Mechanism, data: CaseData) -> dict[str, tuple[int, ...]]:
    """The shape `[*batch, *axes]` of every output."""
    sizes, options = spec.resolve(data.inputs, data.options)
    found = {}
    for name, decl in spec.outputs.items():
        axes = (*spec.batch, *decl.axes)
        lengths = (static_value(spec.indices[axis], sizes=sizes, options=options) for axis in axes)
        found[name] = tuple(int(length or 0) for length in lengths)
    return found


def visible(spec: Mechanism, data: CaseData, options: Mapping[str, Any], rows: Any = None) -> Any:
    """`keep[b,h,i,j]`: which query may see which key; None for a mechanism that defines no `keep`."""
    if "keep" not in spec.program.definitions:
        return None
    return np.asarray(spec.evaluate(data.inputs, options, outputs=["keep"], rows=rows)["keep"], dtype=bool)


def empty_rows(spec: Mechanism, data: CaseData, options: Mapping[str, Any], rows: Any = None) -> Any:
    """`[b,h,i]`: queries that may attend to nothing; None for a mechanism that defines no `keep`."""
    keep = visible(spec, data, options, rows)
    return None if keep is None else ~keep.any(axis=-1)


# Hidden values ---------------------------------------------------------------------------------------------------


def _hide(spec: Mechanism, case: Case, data: CaseData, declares: Mapping[str, Any] | None) -> None:
    where, what = HIDDEN[case.values]
    big = values.HUGE[case.dtype]
    if where != "neighbour" and semantics.declared(declares, "unseen_values") == "multiplied":
        what = "big"
        if case.direction == "backward":
            # dP of a masked pair is a sum over the features that an honest eager backward pass stores in the dtype.
            big = min(big, VALUE_SENTINEL)
    parts = shapes.roles(spec)
    if where == "neighbour":
        for name in data.inputs:
            decl = spec.inputs[name]
            if decl.role in ("query", "key", "value") and decl.batch and data.inputs[name].shape[0] > 1:
                data.inputs[name] = data.inputs[name].copy()
                data.inputs[name][-1] = np.nan
        return
    options = oracle_options(spec, data, declares)
    keep = visible(spec, data, options)
    if keep is None:
        return
    for name in list(data.inputs):
        decl = spec.inputs[name]
        if decl.role == "query" and where == "unseen" and "real_q" in spec.program.definitions:
            padded = ~np.asarray(spec.evaluate(data.inputs, options, outputs=["real_q"])["real_q"], dtype=bool)
            rows = np.broadcast_to(padded, (data.inputs[name].shape[0], padded.shape[-1]))
            data.inputs[name] = np.where(
                rows[:, None, :, None], np.nan if what == "nan" else KEY_SENTINEL, data.inputs[name]
            )
        if decl.role not in ("key", "value"):
            continue
        fill = {"nan": np.nan, "inf": np.inf, "big": big}[what]
        if what != "nan" and decl.role == "key":
            fill = KEY_SENTINEL
        axes = (*decl.batch, *decl.axes)
        array = data.inputs[name] = data.inputs[name].copy()
        if parts.key_index in axes:
            hidden = _hidden_keys(keep, where, [axis for axis in axes if axis in parts.heads], array, axes)
            array[_over(hidden, axes, parts.key_index, array.shape)] = fill
        elif "block_table" in data.inputs:
            array[~_used_slots(data, array.shape)] = fill


def _hidden_keys(keep: Any, where: str, heads: list[str], array: Any, axes: tuple[str, ...]) -> Any:
    """`[b,g,j]` (g has length 1 where the keys have no heads): keys that no query of the group sees; for "future" the
    last quarter of the keys too.
    """
    batch, query_heads, rows, keys = keep.shape
    groups = array.shape[axes.index(heads[0])] if heads else 1
    grouped = keep.reshape(batch, groups, query_heads // groups * rows, keys) if keep.size else keep[:, :groups]
    hidden = ~grouped.any(axis=2)
    if where == "future" and keys:
        hidden[..., keys - max(1, keys // 4) :] = True
    return hidden


def _over(hidden: Any, axes: tuple[str, ...], key: str, shape: tuple[int, ...]) -> Any:
    """`hidden[b,g,j]` as a mask over the whole array, whose axes between the batch and the key axis are the heads."""
    place = axes.index(key)
    lead = hidden if place == 2 else hidden.all(axis=1) if place == 1 else hidden.all(axis=(0, 1))
    return np.broadcast_to(lead.reshape(lead.shape + (1,) * (len(shape) - lead.ndim)), shape)


def _used_slots(data: CaseData, shape: tuple[int, ...]) -> Any:
    """`[p, o]`: slots of pages that hold a key of some sequence."""
    table = data.inputs["block_table"]
    lengths = data.inputs.get("kv_length")
    used = np.zeros(shape[:2], dtype=bool)
    for row in range(table.shape[0]):
        count = table.shape[1] * shape[1] if lengths is None else int(lengths[row])
        for key in range(count):
            used[table[row, key // shape[1]], key % shape[1]] = True
    return used


def _spoiled(spec: Mechanism, what: str, inputs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Inputs that contradict each other, which a candidate must refuse."""
    found = dict(inputs)
    role = {decl.role: name for name, decl in reversed(list(spec.inputs.items())) if name in inputs}
    if what == "bad_features":
        found[role["key"]] = inputs[role["key"]][..., :-1]
    elif what == "bad_keys":
        found[role["value"]] = inputs[role["value"]][..., :-1, :]
    elif what == "bad_heads":
        for name in (role["key"], role["value"]):
            found[name] = np.concatenate([inputs[name]] * 2, axis=1)[:, : inputs[role["query"]].shape[1] - 1]
    elif what == "bad_batch":
        found[role["key"]] = np.concatenate([inputs[role["key"]], inputs[role["key"]][:1]])
    elif what == "bad_mask":
        found[role["mask"]] = inputs[role["mask"]][..., :-1]
    return found


# Cotangents and further calls --------------------------------------------------------------------------------------


def _cotangents(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> dict[str, Any]:
    names = list(spec.outputs) if case.group.endswith("_all") else list(spec.outputs)[:1]
    if semantics.declared(declares, "lse_sink") == "excluded" and "sink" in data.inputs:
        names = [name for name in names if name != "LSE"]
    empty = None
    if semantics.declared(declares, "empty_rows") != "zero":
        empty = empty_rows(spec, data, oracle_options(spec, data, declares))
    found = {}
    for name in names:
        array = values.cotangent(spec, name, data.extra["shapes"][name], case.dtype, case.seed)
        if empty is not None:
            array = np.where(empty.reshape(empty.shape + (1,) * (array.ndim - empty.ndim)), 0.0, array)
        found[name] = array
    return found


def _no_calls(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> list[CaseData]:
    return []


def _other_options(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> list[CaseData]:
    """The same arrays without each option, and with all of them again: a kernel cached under too short a key shows."""
    calls = []
    for name in data.options:
        rest = {key: value for key, value in data.options.items() if key != name}
        if shapes.admissible(spec, case.sizes, rest, data.inputs):
            calls.append(CaseData(dict(data.inputs), rest))
    return [*calls, CaseData(dict(data.inputs), dict(data.options))]


def _other_batch(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> list[CaseData]:
    """One batch entry alone, and all of them in reverse order."""

    def picked(entries: slice) -> CaseData:
        chosen = {}
        for name, value in data.inputs.items():
            batched = spec.inputs[name].batch and value.shape[0] > 1
            chosen[name] = value[entries] if batched else value
        return CaseData(chosen, dict(data.options))

    return [picked(slice(1, 2)), picked(slice(None, None, -1))]


def _decode(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> list[CaseData]:
    """Single queries, and a chunk of three, over the keys up to their own position."""
    parts = shapes.roles(spec)
    options = oracle_options(spec, data, declares)
    top_left = spec.resolve(data.inputs, options)[1].get("causal_alignment") == "top_left"
    rows = data.extra["shapes"][next(iter(spec.outputs))][-2]
    calls = []
    spans = [(0, 1), (rows // 2, rows // 2 + 1), (rows - 1, rows)] + ([] if top_left else [(rows - 4, rows - 1)])
    for first, last in spans:
        chosen = {}
        for name, value in data.inputs.items():
            decl = spec.inputs[name]
            for place, axis in enumerate((*decl.batch, *decl.axes)):
                if value.shape[place] == 1:
                    continue
                if axis == parts.query_index:
                    value = np.take(value, range(first, last), axis=place)
                elif axis == parts.key_index:
                    value = np.take(value, range(last), axis=place)
            chosen[name] = value
        # Aligned at the top left, a single query would see the first key only: decoding is then not causal.
        own = {name: value for name, value in data.options.items() if not (top_left and name.startswith("causal"))}
        try:
            spec.resolve(chosen, semantics.fixed_options(spec, own, declares))
        except SpecError:
            continue  # the mechanism wants its inputs whole
        calls.append(CaseData(chosen, own))
    return calls


def _perturbed(case: Case, spec: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> list[CaseData]:
    """The same call with the last quarter of the keys changed; rows that see none of them must not change."""
    keep = visible(spec, data, oracle_options(spec, data, declares))
    if keep is None or not keep.size:
        return []
    left = spec.program.definitions["keep"].subscripts
    seen = tuple(part.id for part in left[:-1] if isinstance(part, Name))
    keys = keep.shape[-1]
    first = keys - max(1, keys // 4)
    unaffected = ~keep[..., first:].any(axis=-1)
    chosen = dict(data.inputs)
    parts = shapes.roles(spec)
    for name, value in data.inputs.items():
        decl = spec.inputs[name]
        axes = (*decl.batch, *decl.axes)
        if decl.role in ("key", "value") and parts.key_index in axes:
            changed = np.array(value)
            tail = [slice(None)] * changed.ndim
            tail[axes.index(parts.key_index)] = slice(first, None)
            changed[tuple(tail)] = values.rounded(-8.0 * changed[tuple(tail)] + 1.0, case.dtype)
            chosen[name] = changed
    data.extra["same"] = {
        name: np.broadcast_to(unaffected.reshape(unaffected.shape + (1,) * (len(shape) - unaffected.ndim)), shape)
        for name, shape in data.extra["shapes"].items()
        if (*spec.batch, *spec.outputs[name].axes)[: unaffected.ndim] == (*spec.batch, *seen)
    }
    return [dataclasses.replace(CaseData(chosen, dict(data.options)))]


FOLLOW = {
    "sequence": _other_options,
    "batch": _other_batch,
    "decode": _decode,
    "perturb": _perturbed,
}
"""Further calls by check."""

__all__ = ["CaseError", "SpecError", "build", "empty_rows", "output_shapes", "recipes", "visible"]
