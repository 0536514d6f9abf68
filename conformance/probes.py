"""Exact probes that reveal indices: the output names the keys that were read.

Random inputs cannot see the edge of a mask in a long row: one key of 65,536 more or less changes the output by less
than its rounding. These inputs can, because what they expect is 0 or not 0, a small count, or one exact value:

- `key_set`: queries of zero make all logits equal (where they do not, the file names constants that do) and V[j] is 1
  in the column j mod E, so that a row of the output counts the keys it read, by residue;
- `visible`: queries of zero, and values that are 0 except at a few keys, each with a column (and a head) of its own: at
  tile edges, at the ends, around every sampled query's diagonal, at window and chunk edges. A column is exactly 0 for
  the queries that must not see its key, and far from 0 for the others;
- `aim`: every query finds one key, at such a place, with all the weight: the output is that key's value, exactly.

What is right comes from evaluating the equations on these inputs, so every option, length, segment and page table is
covered without a rule of its own here. `sigma` is what honest arithmetic may differ by. Used by `data` and `oracle`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance import shapes
from attnspec.conformance.case_id import CaseError
from attnspec.conformance.types import Case
from attnspec.spec.language import static_value
from attnspec.spec.language.formats import format_of, unit_roundoff
from attnspec.spec.mechanism import Mechanism

CHECK = "exact"
TILE_SIZES = (16, 32, 64, 128)
NEEDLE = 2.0**10
GAP = 45.0
"""Difference of logits beyond which a weight is below float32's rounding of 1 even when summed over 2**20 keys."""


def fill(spec: Mechanism, case: Case, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a probe: `inputs` as drawn, with queries, keys and values replaced."""
    return RECIPES[case.values](spec, case, dict(inputs), options)


def places(spec: Mechanism, case: Case, options: Mapping[str, Any], limit: int) -> list[int]:
    """Keys at which kernels go wrong, at most `limit`, without repetition.

    Edges of masks (each middle row's diagonal in both alignments, window edges, chunk edges) and ends of tiles take
    turns, so that few places still hold some of each.
    """
    parts = shapes.roles(spec)
    sizes = shapes.derived(spec, case.sizes)
    keys = sizes.get(parts.names.get("keys", parts.names.get("queries", "")), 0)
    rows = sizes.get(parts.names.get("queries", parts.names.get("keys", "")), 0)
    sampled = (case.rows or {}).get(parts.query_index)
    chosen = list(sampled) if sampled else sorted({0, rows // 3, rows // 2, rows - 1} & set(range(rows)))
    # The middle rows first: at either end a wrong edge coincides with the end of the keys.
    chosen.sort(key=lambda row: abs(2 * row - rows))
    wide = [int(value) for name, value in options.items() if name.startswith("window") and value is not None]
    steps = [0, 1, -1]
    for width in wide:
        steps += [-width, -width - 1, width, width + 1]
    edges = []
    for row in chosen[:3]:
        # Both alignments.
        edges += [row + keys - rows + step for step in steps] + [row + step for step in steps[:3]]
    chunk = options.get("chunk")
    if chunk:
        edges += [keys // chunk * chunk, keys // chunk * chunk - 1, chunk - 1, chunk]
    tiles = [keys - 1, 0, keys - 2, 1]
    for tile in TILE_SIZES[::-1]:
        tiles += [keys // tile * tile, keys // tile * tile - 1, tile, tile - 1]
    rng = np.random.default_rng([case.seed, keys])
    found = []
    for two, one in itertools.zip_longest(zip(edges[::2], edges[1::2], strict=False), tiles):
        found += [*(two or ()), *([one] if one is not None else [])]
    found += [int(value) for value in rng.integers(0, max(keys, 1), limit)]
    return list(dict.fromkeys(key for key in found if 0 <= key < keys))[:limit]


def fits(spec: Mechanism) -> bool:
    """Whether the mechanism has such probes: its file states constants, or a softmax turns equal logits to weights."""
    return bool(spec.probe) or _softmax(spec)


def aims(spec: Mechanism) -> bool:
    """Whether a query can find one key by its logit: a softmax over products of queries and keys of one width.

    Not where a product has a second key among its factors, which would change what the first one is worth.
    """
    one, two = (next((d for d in spec.inputs.values() if d.role == role), None) for role in ("query", "key"))
    factors = [d for d in spec.inputs.values() if d.role == "key" and not d.optional]
    return (
        not spec.probe and _softmax(spec) and len(factors) <= 1
        and bool(one and two and one.axes[-1:] == two.axes[-1:])
    )  # fmt: skip


def _softmax(spec: Mechanism) -> bool:
    return bool(shapes.operators(spec) & {"softmax", "logsumexp"})


def _level(spec: Mechanism, case: Case, inputs: dict[str, Any]) -> None:
    """Equal weights: the constants of the mechanism's file, or queries of zero, which make all logits equal."""
    sizes = shapes.derived(spec, case.sizes)
    for name in inputs:
        if name in spec.probe:
            constant = static_value(spec.probe[name], sizes=sizes)
            if not isinstance(constant, (int, float)):
                raise CaseError(f"{spec.name}: probe.{name} is no number at sizes {dict(case.sizes)}")
            inputs[name] = np.full_like(inputs[name], float(constant))
        elif not spec.probe and spec.inputs[name].role == "query":
            inputs[name] = np.zeros_like(inputs[name])


def _keyed(spec: Mechanism, inputs: Mapping[str, Any], role: str) -> tuple[str, int] | None:
    """The input of a role that has the key axis, with that axis' place."""
    index = shapes.roles(spec).key_index
    for name in inputs:
        decl = spec.inputs[name]
        axes = (*decl.batch, *decl.axes)
        if decl.role == role and index in axes:
            return name, axes.index(index)
    return None


def _key_set(spec: Mechanism, case: Case, inputs: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    _level(spec, case, inputs)
    for name in inputs:
        if spec.inputs[name].role == "value":
            value = inputs[name]
            found = _keyed(spec, {name: value}, "value")
            # Pages: the code is that of the slot within the whole cache.
            count = value.shape[found[1]] if found else value.shape[0] * value.shape[1]
            code = np.eye(value.shape[-1])[np.arange(count) % value.shape[-1]]
            inputs[name] = np.broadcast_to(code if found else code.reshape(*value.shape[:2], 1, -1), value.shape).copy()
    return inputs


def _visible(spec: Mechanism, case: Case, inputs: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    _level(spec, case, inputs)
    found = _keyed(spec, inputs, "value")
    if found is None:
        return _key_set(spec, case, inputs, options)
    name, place = found
    value = np.zeros_like(inputs[name])
    moved = np.moveaxis(value, place, -2)
    lead = moved.shape[:-2]
    width = moved.shape[-1]
    heads = int(np.prod(lead, dtype=int))
    needles = places(spec, case, options, width * max(heads, 1))
    flat = moved.reshape(heads, *moved.shape[-2:]) if heads else moved
    for number, key in enumerate(needles):
        flat[number // width % heads, key, number % width] = NEEDLE
    inputs[name] = np.moveaxis(flat.reshape(moved.shape), -2, place)
    return inputs


def _aim(spec: Mechanism, case: Case, inputs: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    found = _keyed(spec, inputs, "key")
    queries = [name for name in inputs if spec.inputs[name].role == "query"]
    if found is None or not queries or not inputs[found[0]].size or not inputs[queries[0]].size:
        return inputs
    name, place = found
    key, query = inputs[name], inputs[queries[0]]
    count, width = key.shape[place], key.shape[-1]
    bits = np.arange(count)[:, None] >> (np.arange(width)[None, :] % max(1, (count - 1).bit_length())) & 1
    code = 2.0 * bits - 1.0
    inputs[name] = np.broadcast_to(code, key.shape).copy()
    scale = float(options.get("scale") or width**-0.5)
    rows = query.shape[-2]
    aims = places(spec, case, options, max(rows, 8))
    # Row i aims at the places that it may see in turn; which those are, the equations say.
    target = [seen[row % len(seen)] for row, seen in enumerate(_seen(spec, inputs, options, aims, rows))]
    inputs[queries[0]] = np.broadcast_to(GAP / 2 / scale * code[target], query.shape).copy()
    return inputs


def _seen(
    spec: Mechanism, inputs: Mapping[str, Any], options: Mapping[str, Any], aims: list[int], rows: int
) -> list[list[int]]:
    """For every row, those of the places that it may see in every head; [0] where there are none."""
    if "keep" not in spec.program.definitions:
        return [aims] * rows
    keep = np.asarray(spec.evaluate(inputs, options, outputs=["keep"])["keep"], dtype=bool)
    shared = np.asarray(keep.reshape(-1, *keep.shape[-2:]).all(axis=0))
    return [[aim for aim in aims if shared[row, aim]] or [0] for row in range(rows)]


RECIPES: dict[str, Callable[[Mechanism, Case, dict[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "key_set": _key_set,
    "visible": _visible,
    "aim": _aim,
}


def unsigned(spec: Mechanism, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs with values without their signs, whose output is what its terms add up to; None: no sign to lose."""
    values = [name for name in inputs if spec.inputs[name].role == "value"]
    if not any((inputs[name] < 0).any() for name in values):
        return None
    return {**inputs, **{name: np.abs(inputs[name]) for name in values}}


def sigma(
    exact: Mapping[str, Any], main: str, dtype: str, keys: int, summed: Mapping[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """What honest arithmetic may differ by, in closed form: no sampling, so that probes run at any length.

    Args:
        main: the output in the inputs' dtype; the others are judged as float32.
        keys: the number of keys: weights may be as small as 1/keys, where fp16 is subnormal.
        summed: the outputs of `unsigned` inputs, which are larger where terms of both signs cancel.
    """
    found = {}
    unit, single = unit_roundoff(dtype), unit_roundoff("fp32" if dtype != "fp64" else "fp64")
    # Weights of exactly 1/n, rounded once; a sum of n terms of one sign in float32; the output rounded once.
    relative = np.sqrt(2.0) * unit + single * np.sqrt(max(keys, 1)) + format_of(dtype).smallest * keys / 2
    for name, value in exact.items():
        size = np.where(np.isfinite(value), np.abs(value), 0.0)
        if summed is not None:
            size = np.fmax(size, np.where(np.isfinite(summed[name]), np.abs(summed[name]), 0.0))
        # Keys that lose by GAP in the exponent may be rounded away.
        floor = single**2 * float(size.max(initial=0.0))
        found[name] = relative * size + floor if name == main else single * (size + 2.0)
    return found
