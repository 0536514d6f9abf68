"""Seeded values: what stands in the arrays of a case, by the role of each input.

`draw` fills every input of a case by role (queries, keys, masks, lengths, segments, page tables, ...), then a named
recipe bends the values to a purpose: large logits, one dominant key in the last tile, NaN behind the mask. Everything
is float64 already rounded to the case's dtype; booleans and int64 otherwise. The random stream of an input depends on
the seed, the sizes and the input's name, not on the dtype, so that dtypes differ by rounding alone. Used by `data`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance.shapes import Roles
from attnspec.spec.language import InputDecl, SpecError, static_value
from attnspec.spec.language.formats import round_to
from attnspec.spec.mechanism import Mechanism

Array = np.ndarray[Any, Any]
Recipe = Callable[["Draw"], None]

HUGE = {"fp16": 2.0**14, "bf16": 2.0**40, "fp32": 2.0**40, "fp64": 2.0**40}
"""A sentinel that stands far above every honest value and is exact in the dtype."""
SMALL = {"fp16": 2.0**-10, "bf16": 2.0**-100, "fp32": 2.0**-100, "fp64": 2.0**-900}
"""Far below every ordinary value, and well above the numbers that hardware may flush to zero."""
DENORMAL = {"fp16": 2.0**-18, "bf16": 2.0**-130, "fp32": 2.0**-130, "fp64": 2.0**-1030}
"""Below the dtype's smallest normal number."""


@dataclass
class Draw:
    """The arrays of a case while they are drawn. `inputs` is filled by role and then changed by the recipe."""

    mechanism: Mechanism
    roles: Roles
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    present: tuple[str, ...]
    broadcast: Mapping[str, str]
    dtype: str
    seed: int
    inputs: dict[str, Any]

    def rng(self, name: str) -> np.random.Generator:
        """The stream of one input: the same on every machine, for every dtype."""
        text = f"{self.mechanism.name}|{sorted(self.sizes.items())}|{self.seed}|{name}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))

    def shape(self, decl: InputDecl) -> tuple[int, ...]:
        """The shape `[*batch, *axes]` of an input, 1 along the axes that the case broadcasts."""
        single = self.broadcast.get(decl.name, "")
        axes = (*decl.batch, *decl.axes)
        return tuple(1 if axis in single else self.length(axis) for axis in axes)

    def length(self, axis: str) -> int:
        """The length of an index."""
        value = static_value(self.mechanism.indices[axis], sizes=self.sizes)
        if value is None:
            raise SpecError(f"the size of index {axis!r} is not known", file=self.mechanism.name)
        return int(value)

    def of_role(self, *roles: str) -> list[str]:
        return [name for name in self.present if self.mechanism.inputs[name].role in roles]

    def axis(self, name: str, index: str) -> int:
        decl = self.mechanism.inputs[name]
        return (*decl.batch, *decl.axes).index(index)

    def dense_keys(self) -> list[tuple[str, int, str]]:
        """(input, place of the key axis, role) of the key and value inputs that have a key axis."""
        found = []
        for name in self.of_role("key", "value"):
            decl = self.mechanism.inputs[name]
            axes = (*decl.batch, *decl.axes)
            if self.roles.key_index in axes:
                found.append((name, axes.index(self.roles.key_index), decl.role))
        return found


def draw(
    mechanism: Mechanism,
    roles: Roles,
    *,
    sizes: Mapping[str, int],
    options: Mapping[str, Any],
    present: Sequence[str],
    broadcast: Mapping[str, str],
    values: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """The inputs of a case by name.

    Args:
        sizes: every size that the present inputs need.
        present: names of the inputs that are given.
        broadcast: axes (as a string of index names) along which an input has length 1.
        values: the name of a recipe from `RECIPES`.

    Raises:
        ValueError: an unknown recipe.
    """
    if values not in RECIPES:
        raise ValueError(f"unknown values {values!r}; known: {', '.join(RECIPES)}")
    it = Draw(mechanism, roles, sizes, options, tuple(present), broadcast, dtype, seed, {})
    for name in present:
        it.inputs[name] = _by_role(it, mechanism.inputs[name])
    RECIPES[values](it)
    return {name: rounded(value, dtype) for name, value in it.inputs.items()}


def rounded(value: Any, dtype: str) -> Any:
    """A real array rounded to the dtype, others as they are."""
    array = np.asarray(value)
    return round_to(array, dtype) if array.dtype.kind == "f" else array


def cotangent(mechanism: Mechanism, name: str, shape: Sequence[int], dtype: str, seed: int) -> Array:
    """A random cotangent of an output."""
    text = f"{mechanism.name}|cotangent|{name}|{tuple(shape)}|{seed}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
    return np.asarray(round_to(rng.standard_normal(tuple(shape)), dtype))


def _by_role(it: Draw, decl: InputDecl) -> Any:
    rng, shape = it.rng(decl.name), it.shape(decl)
    if decl.role == "segment":
        return _segments(it, decl, shape)
    if decl.role == "page_table":
        return _page_table(it, decl, shape)
    if decl.role == "length":
        return _lengths(it, decl, shape)
    if decl.kind == "bool":
        keep = rng.random(shape) < 0.7
        if decl.role == "mask" and keep.ndim and keep.shape[-1]:
            # Every row keeps a key here; rows that keep none have a recipe of their own.
            first = np.zeros_like(keep)
            first[..., 0] = ~keep.any(axis=-1)
            keep = keep | first
        return keep
    if decl.kind == "int":
        low, high = _bounds(it, decl)
        return rng.integers(low, high + 1, shape)
    return rng.standard_normal(shape)


def _bounds(it: Draw, decl: InputDecl) -> tuple[int, int]:
    """The bounds that a domain like `0 <= kv_length <= M` states; 0 and 1 without one."""
    match = re.fullmatch(rf"\s*(\w+)\s*<=\s*{re.escape(decl.name)}\s*<=\s*(\w+)\s*", decl.domain)
    if match is None:
        return 0, 1
    low, high = (int(text) if text.isdigit() else int(it.sizes.get(text, 1)) for text in match.groups())
    return low, high


def _lengths(it: Draw, decl: InputDecl, shape: tuple[int, ...]) -> Array:
    """Different lengths along the batch: somewhere inside, full, one, and (from four entries on) none."""
    low, high = _bounds(it, decl)
    rng = it.rng(decl.name)
    count = int(np.prod(shape, dtype=int))
    inner = rng.integers(low + (high - low) // 3, max(low + (high - low) // 3, high - 1) + 1, count)
    if "pad" in decl.name:
        inner = inner // 2
    typical = [int(value) for value in inner]
    if count >= 2:
        typical[1] = high if "pad" not in decl.name else low
    if count >= 3:
        typical[2] = min(high, low + 1)
    if count >= 4:
        typical[3] = low
    return np.array(typical, dtype=np.int64).reshape(shape)


def _segments(it: Draw, decl: InputDecl, shape: tuple[int, ...]) -> Array:
    """Packed sequences 0, 1, 2, ... in order, of unequal lengths, with padding (-1) at the end of some rows."""
    length = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=int))
    rng = it.rng(f"{decl.name} of {length}")
    found = np.full((rows, length), -1, dtype=np.int64)
    for row in range(rows):
        padding = int(length > 3) * (row % 2) * max(1, length // 8)
        cuts = np.sort(rng.integers(0, length - padding + 1, 2))
        found[row, : length - padding] = np.searchsorted(cuts, np.arange(length - padding), side="right")
    return found.reshape(shape)


def _page_table(it: Draw, decl: InputDecl, shape: tuple[int, ...]) -> Array:
    """Pages in random order, different ones for every batch entry; -1 where the sequence has no more keys."""
    pages = max(it.length(axis) for axis in _page_axes(it))
    slots = it.sizes.get("Ps", 1)
    rows, width = int(np.prod(shape[:-1], dtype=int)), shape[-1]
    rng = it.rng(decl.name)
    order = rng.permutation(pages)
    table = np.array([order[(np.arange(width) + row * width) % pages] for row in range(rows)]).reshape(rows, width)
    for name in it.of_role("length"):
        if it.mechanism.inputs[name].domain.rstrip().endswith("M"):
            lengths = _lengths(it, it.mechanism.inputs[name], it.shape(it.mechanism.inputs[name])).reshape(-1)
            for row in range(rows):
                table[row, -(-int(lengths[row]) // slots) :] = -1
    return table.reshape(shape).astype(np.int64)


def _page_axes(it: Draw) -> list[str]:
    paged = [name for name in it.of_role("key", "value") if it.roles.key_index not in it.mechanism.inputs[name].axes]
    return [it.mechanism.inputs[name].axes[0] for name in paged] or [it.roles.key_index]


# Recipes ---------------------------------------------------------------------------------------------------------


def _normal(it: Draw) -> None:
    """As drawn: independent standard normal numbers."""


def _direction(it: Draw, name: str) -> Array:
    """A unit vector along the feature axis of a query or key input."""
    width = it.inputs[name].shape[-1]
    return np.full(width, width**-0.5)


def _steer(it: Draw, strength: float, pull: Callable[[Array], Array]) -> None:
    """Give keys logits that depend on their place: logit of key j = strength * pull(j / M), plus noise.

    Queries get the component `sqrt(strength)` along a common direction, keys `pull * sqrt(strength) / scale`; the rest
    is small noise, so that rows differ.
    """
    queries = it.of_role("query")
    for name in queries:
        query = it.inputs[name]
        unit = _direction(it, name)
        it.inputs[name] = 0.5 * query + (strength**0.5) * unit
    for name, place, role in it.dense_keys():
        if role != "key":
            continue
        key = it.inputs[name]
        width = key.shape[-1]
        scale = it.options.get("scale", width**-0.5) or width**-0.5
        where = np.arange(key.shape[place]) / max(1, key.shape[place] - 1)
        amount = pull(where).reshape([-1 if axis == place else 1 for axis in range(key.ndim)])
        it.inputs[name] = 0.5 * key + amount * strength**0.5 / scale * _direction(it, name)


def _large(it: Draw) -> None:
    """Logits of standard deviation 30, with rows beyond 100: exp overflows without subtracting the maximum."""
    for name in it.of_role("query"):
        it.inputs[name] = 30.0 * it.inputs[name]


def _equal(it: Draw) -> None:
    """Queries of zero: all logits are equal."""
    for name in it.of_role("query"):
        it.inputs[name] = np.zeros_like(it.inputs[name])


def _rising(it: Draw) -> None:
    """Logits that rise along the keys, so that a running maximum grows in every tile."""
    _steer(it, 12.0, lambda where: where)


def _falling(it: Draw) -> None:
    """Logits that fall along the keys: the first tile holds the maximum."""
    _steer(it, 12.0, lambda where: 1.0 - where)


def _last_key(it: Draw) -> None:
    """One dominant key, the last: it stands in the last, partial tile."""
    _steer(it, 9.0, lambda where: (where == where.max(initial=0.0)).astype(float))


def _needles(it: Draw) -> None:
    """Each query finds one key, at a random place: weights are nearly one-hot."""
    queries, keys = it.of_role("query"), [entry for entry in it.dense_keys() if entry[2] == "key"]
    if not queries or not keys:
        return
    name, place, _ = keys[0]
    key = it.inputs[name]
    width = key.shape[-1]
    scale = it.options.get("scale", width**-0.5) or width**-0.5
    key = key / np.maximum(np.linalg.norm(key, axis=-1, keepdims=True), 1e-9)
    it.inputs[name] = 4.0 * key
    query = it.inputs[queries[0]]
    rng = it.rng("needles")
    if not key.size or not query.size:
        return
    rows, count = query.shape[-2], key.shape[place]
    aim = np.minimum(rng.permutation(max(rows, count))[:rows], count - 1)
    group = max(1, query.shape[-3] // key.shape[-3]) if query.ndim > 2 else 1
    found = np.take(key, aim, axis=place)
    it.inputs[queries[0]] = 6.0 / scale * np.repeat(found, group, axis=-3) if query.ndim > 2 else 6.0 / scale * found


def _constant_v(it: Draw) -> None:
    """Values that do not vary along the keys: the output is that value whatever the weights are."""
    for name, place, role in it.dense_keys():
        if role == "value":
            value = it.inputs[name]
            it.inputs[name] = (
                np.broadcast_to(np.take(value, [0], axis=place), value.shape).copy() if value.size else value
            )


def _positive(it: Draw) -> None:
    """Positive values and nearly equal logits: sums of many terms of one sign stall in half precision."""
    for name in it.of_role("query"):
        it.inputs[name] = 0.25 * it.inputs[name]
    for name in it.of_role("value"):
        it.inputs[name] = 0.5 + 0.5 * it.rng(f"{name} uniform").random(it.inputs[name].shape)


def _tiny(it: Draw) -> None:
    """Values so small that an absolute tolerance would see nothing, and small keys."""
    for name in it.of_role("value"):
        it.inputs[name] = SMALL[it.dtype] * it.inputs[name]
    for name in it.of_role("key"):
        it.inputs[name] = 2.0**-8 * it.inputs[name]


def _denormal(it: Draw) -> None:
    """Values below the smallest normal number: they may be flushed to zero, and must not become anything else."""
    for name in it.of_role("value"):
        it.inputs[name] = DENORMAL[it.dtype] * it.inputs[name]


def _heads_apart(it: Draw) -> None:
    """A huge dynamic range across heads: each value head, and each query head, has a magnitude of its own."""
    span = 5 if it.dtype == "fp16" else 30
    for name in it.of_role("value", "query"):
        decl = it.mechanism.inputs[name]
        axes = (*decl.batch, *decl.axes)
        place = next((axes.index(axis) for axis in axes if axis in it.roles.heads), None)
        if place is None:
            continue
        count = it.inputs[name].shape[place]
        powers = np.array([(-1) ** h * (span * (h + 1) // max(count, 1)) for h in range(count)])
        if decl.role == "query":
            powers = np.clip(powers, -4, 3)
        shape = [-1 if axis == place else 1 for axis in range(len(axes))]
        it.inputs[name] = it.inputs[name] * np.exp2(powers.astype(float)).reshape(shape)


def _bias_inf(it: Draw) -> None:
    """A bias with -inf entries; every row keeps its first key."""
    for name in it.of_role("bias"):
        bias = it.inputs[name]
        gone = it.rng(f"{name} gone").random(bias.shape) < 0.3
        if bias.shape[-1]:
            gone[..., 0] = False
        it.inputs[name] = np.where(gone, -np.inf, bias)


def _empty_rows(it: Draw) -> None:
    """Every third query (from the second on) may attend to nothing, by mask or by a bias of -inf."""
    for name in it.of_role("mask", "bias"):
        array = it.inputs[name]
        decl = it.mechanism.inputs[name]
        axes = (*decl.batch, *decl.axes)
        place = axes.index(it.roles.query_index) if it.roles.query_index in axes else None
        rows = np.arange(array.shape[place]) % 3 == 1 if place is not None and array.shape[place] > 1 else None
        if rows is None or place is None:
            continue
        rows = rows.reshape([-1 if axis == place else 1 for axis in range(array.ndim)])
        it.inputs[name] = array & ~rows if array.dtype == bool else np.where(rows, -np.inf, array)
        return


def _leading_masked(it: Draw) -> None:
    """The first keys are masked for every second query, more of them than fit a tile: live keys come late."""
    for name in it.of_role("mask"):
        array = it.inputs[name]
        if array.ndim < 2 or array.shape[-2] == 0:
            continue
        cut = (array.shape[-1] * 3) // 4
        rows = (np.arange(array.shape[-2]) % 2 == 0)[:, None]
        it.inputs[name] = array & ~(rows & (np.arange(array.shape[-1]) < cut)[None, :])


def _low_logits(it: Draw) -> None:
    """All logits far below the finite numbers that are used in place of -inf (-1e4)."""
    for name in it.of_role("query", "key"):
        width = it.inputs[name].shape[-1]
        sign = 1.0 if it.mechanism.inputs[name].role == "query" else -1.0
        size = (2.0e4 * width**-0.5) ** 0.5
        it.inputs[name] = sign * size + 0.05 * it.inputs[name]


def _same_batch(it: Draw) -> None:
    """Keys and values that are the same in every batch entry and head, as a broadcast cache would be."""
    for name in it.of_role("key", "value"):
        array = it.inputs[name]
        lead = array.ndim - 2
        if lead > 0 and array.size:
            it.inputs[name] = np.broadcast_to(array[(slice(0, 1),) * lead], array.shape).copy()


def _big_sink(it: Draw) -> None:
    """Sinks far above all logits (100, exp of which overflows single precision, and -100)."""
    for name in it.of_role("sink"):
        it.inputs[name] = np.where(np.arange(it.inputs[name].size) % 2 == 0, 100.0, -100.0)


def _absent_sink(it: Draw) -> None:
    """Every second head's sink is -inf: as if it had none."""
    for name in it.of_role("sink"):
        it.inputs[name] = np.where(np.arange(it.inputs[name].size) % 2 == 0, -np.inf, it.inputs[name])


RECIPES: dict[str, Recipe] = {
    "normal": _normal,
    "large": _large,
    "equal": _equal,
    "rising": _rising,
    "falling": _falling,
    "last_key": _last_key,
    "needles": _needles,
    "constant_v": _constant_v,
    "positive": _positive,
    "tiny": _tiny,
    "denormal": _denormal,
    "heads_apart": _heads_apart,
    "bias_inf": _bias_inf,
    "empty_rows": _empty_rows,
    "leading_masked": _leading_masked,
    "low_logits": _low_logits,
    "same_batch": _same_batch,
    "big_sink": _big_sink,
    "absent_sink": _absent_sink,
}
"""Recipes by name. `hidden` and `probes` add their own."""
