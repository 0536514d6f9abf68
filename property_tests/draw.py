"""Drawing inputs, options and a law's extra quantities at small sizes, from a seed.

Sizes come from Hypothesis so that it can shrink them; the numbers come from a seeded generator, since their digits are
not what a counterexample is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from attnspec.conformance.shapes import derived
from attnspec.spec.domains import domain
from attnspec.spec.language import InputDecl, SpecError, read_expression, static_value
from attnspec.spec.language.syntax import Name
from attnspec.spec.laws import Draw, Law, Trial
from attnspec.spec.mechanism import Mechanism


def size_of(mechanism: Mechanism, index: str, sizes: Mapping[str, int]) -> int:
    """Length of the axis that `index` runs along."""
    value = static_value(mechanism.indices[index], sizes=sizes, options={}, present=frozenset())
    if value is None:
        raise SpecError(f"the size of index {index!r} is not fixed by {dict(sizes)}", file=mechanism.name)
    return int(value)


@st.composite
def trials(draw: st.DrawFn, mechanism: Mechanism, law: Law) -> Trial:
    """A law with everything that its first call needs."""
    sizes = draw(sizes_for(mechanism, law))
    options = {}
    for name, choices in law.options.items():
        value = draw(st.sampled_from(choices)) if isinstance(choices, list) else choices
        if value != "null":
            options[name] = value
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    present = [name for name, decl in mechanism.inputs.items() if not decl.optional]
    present += [name for name in mechanism.usual if name not in law.absent]
    present += [name for name in law.given if name not in present]
    for name, formula in mechanism.otherwise.items():
        axes = {axis for other in present for axis in mechanism.inputs[other].axes}
        if not any(getattr(mechanism.indices[axis], "id", "") == name for axis in axes):
            value = static_value(formula, sizes=sizes, options={}, present=frozenset(present))
            sizes[name] = sizes[name] if value is None else int(value)
    inputs: dict[str, Any] = {}
    sizes = derived(mechanism, sizes)
    for name in mechanism.inputs:
        if name in present:
            decl = mechanism.inputs[name]
            full = law.cotangents or law.other
            inputs[name] = draw_input(mechanism, decl, sizes, rng, law.values.get(name), inputs, broadcast=not full)
    try:
        first, resolved = mechanism.resolve(inputs, options)
    except SpecError:
        assume(False)
        raise
    if law.where:
        assume(static_value(read_expression(law.where), sizes=first, options=resolved, present=frozenset(inputs)))
    extra = {d.name: draw_extra(mechanism, law, d, {**sizes, **first}, rng) for d in law.draws}
    batch = [size_of(mechanism, index, first) for index in mechanism.batch]
    cotangents = {
        name: rng.normal(size=(*batch, *(size_of(mechanism, axis, first) for axis in mechanism.outputs[name].axes)))
        for name in law.cotangents
    }
    return Trial(mechanism, law, inputs, options, extra, cotangents)


@st.composite
def sizes_for(draw: st.DrawFn, mechanism: Mechanism, law: Law) -> dict[str, int]:
    """Small sizes that obey the declared minima and, for heads, the divisibility that grouped queries need."""
    sizes: dict[str, int] = {}
    for name, size in mechanism.sizes.items():
        if size.value is not None:
            continue
        low, high = law.sizes.get(name) or (1, 2 if name.startswith(("B", "H")) else 6)
        sizes[name] = draw(st.integers(max(low, size.minimum), high))
    if {"H", "Hk"} <= set(sizes) and "H" not in law.sizes:
        sizes["H"] = sizes["Hk"] * draw(st.integers(1, 2))
    if "N == M" in law.where:
        sizes["M"] = sizes["N"]
    if "E == M" in law.where:
        sizes["E"] = sizes["M"]
    return sizes


def draw_input(
    mechanism: Mechanism,
    decl: InputDecl,
    sizes: Mapping[str, int],
    rng: np.random.Generator,
    values: str | None,
    so_far: Mapping[str, Any],
    *,
    broadcast: bool,
) -> Any:
    """One input by its role: normal reals, masks that keep two thirds, sorted segment ids, lengths within the axis."""
    axes = (*decl.batch, *decl.axes)
    shape = tuple(
        1 if broadcast and axis in decl.broadcast and rng.random() < 0.3 else size_of(mechanism, axis, sizes)
        for axis in axes
    )
    if decl.role == "page_table":
        pages = sizes[_size_name(mechanism, "p")]
        return np.stack(
            [rng.permutation(np.resize(np.arange(pages), max(shape[-1], pages)))[: shape[-1]] for _ in range(shape[0])]
        ).astype(np.int64)
    if decl.role == "segment":
        return np.sort(rng.integers(0, 3, size=shape), axis=-1)
    if decl.role == "length":
        limit = _limit(mechanism, decl, sizes, so_far)
        return rng.integers(0, limit + 1, size=shape)
    if decl.kind == "bool":
        return rng.random(shape) < 0.67
    found = domain(decl)
    if decl.kind == "int":
        if found is None:
            raise SpecError(f"the integer input {decl.name} states no domain to draw from", file=mechanism.name)
        low, high = found.integers(sizes)
        return rng.integers(low, max(low, high) + 1, size=shape)
    drawn = real_values(values or "normal", shape, rng)
    return drawn if values or found is None else found.map(drawn, sizes)


def _size_name(mechanism: Mechanism, index: str) -> str:
    node = mechanism.indices[index]
    assert isinstance(node, Name)
    return node.id


def _limit(mechanism: Mechanism, decl: InputDecl, sizes: Mapping[str, int], so_far: Mapping[str, Any]) -> int:
    """The bound in a length's domain `0 <= x <= BOUND`."""

    bound = decl.domain.rsplit("<=", 1)[-1].strip()
    value = static_value(read_expression(bound), sizes=sizes, options={}, present=frozenset())
    assert value is not None
    taken = int(np.max(so_far["kv_length"], initial=0)) if decl.name == "left_pad" and "kv_length" in so_far else 0
    return max(int(value) - taken, 0)


def real_values(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Reals of a named kind."""
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "positive":
        return rng.uniform(0.5, 2.0, size=shape)
    if kind == "nan":
        return np.full(shape, np.nan)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "-inf":
        return np.full(shape, -np.inf)
    if kind == "identity":
        return np.broadcast_to(np.eye(shape[-2], shape[-1]), shape).copy()
    if kind == "orthogonal":
        # The determinant of a product of reflections is fixed by their number: signs of columns make it either.
        columns = np.linalg.qr(rng.normal(size=shape))[0]
        return columns * rng.choice([-1.0, 1.0], size=(*columns.shape[:-2], 1, columns.shape[-1]))
    raise SpecError(f"no such kind of values: {kind!r}")


def shape_of(mechanism: Mechanism, law: Law, extra: Draw, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a law's own quantity, whose axes are indices of the mechanism or of the law."""

    def length(axis: str) -> int:
        if axis in law.indices:
            value = static_value(read_expression(law.indices[axis]), sizes=sizes, options={}, present=frozenset())
            assert value is not None
            return int(value)
        return size_of(mechanism, axis, sizes)

    batch = mechanism.batch if extra.batch else ()
    return tuple(length(axis) for axis in (*batch, *extra.axes))


def draw_extra(mechanism: Mechanism, law: Law, extra: Draw, sizes: Mapping[str, int], rng: np.random.Generator) -> Any:
    """A law's own quantity: reals, a permutation, or one integer below a size."""
    shape = shape_of(mechanism, law, extra, sizes)
    if extra.values == "permutation":
        return rng.permutation(shape[0])
    if extra.values.startswith("integer:"):
        bound = extra.values.partition(":")[2]
        return np.asarray(rng.integers(0, int(bound) if bound.isdigit() else max(sizes[bound], 1)))
    return real_values(extra.values, shape, rng)
