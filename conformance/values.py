"""Seeded values: what stands in the arrays of a case, by the role of each input.

`draw` fills every input of a case by role (queries, keys, masks, lengths, segments, page tables, ...), then a named
recipe bends the values to a purpose: large logits, one dominant key in the last tile, NaN behind the mask. Everything
is float64 already rounded to the case's dtype; booleans and int64 otherwise. The random stream of an input depends on
the seed, the sizes and the input's name, not on the dtype, so that dtypes differ by rounding alone. Used by `data`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance.recipes import RECIPES
from attnspec.conformance.shapes import Roles
from attnspec.spec import domains
from attnspec.spec.language import InputDecl, SpecError, static_value
from attnspec.spec.language.formats import round_to
from attnspec.spec.mechanism import Mechanism

Array = np.ndarray[Any, Any]

HUGE = {"fp16": 2.0**14, "bf16": 2.0**40, "fp32": 2.0**40, "fp64": 2.0**40}
"""A sentinel that stands far above every honest value and is exact in the dtype."""


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
    for name in present:
        if domains.of_unit_length(mechanism.inputs[name], options):
            it.inputs[name] = domains.unit(it.inputs[name])
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
        return rng.integers(low, max(low, high) + 1, shape)
    found = domains.drawn(decl)
    normal = rng.standard_normal(shape)
    return normal if found is None else found.map(normal, it.sizes)


def _bounds(it: Draw, decl: InputDecl) -> tuple[int, int]:
    """The smallest and largest integer of the input's domain; 0 and 1 without one."""
    found = domains.drawn(decl)
    return found.integers(it.sizes) if found is not None else (0, 1)


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
