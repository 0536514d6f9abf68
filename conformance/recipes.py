"""Recipes: what bends drawn values to a purpose, by name.

Each takes a `values.Draw` whose inputs are filled by role, and changes some of them in place: large logits, one
dominant key in the last tile, rows that may attend to nothing, values that are nearly denormal. They go by the inputs'
roles and leave alone what a mechanism does not have. Used by `values.draw`, which rounds the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from attnspec.spec.domains import drawn

if TYPE_CHECKING:
    from attnspec.conformance.values import Draw

Array = np.ndarray[Any, Any]
Recipe = Callable[["Draw"], None]

SMALL = {"fp16": 2.0**-10, "bf16": 2.0**-100, "fp32": 2.0**-100, "fp64": 2.0**-900}
"""Far below every ordinary value, and well above the numbers that hardware may flush to zero."""
DENORMAL = {"fp16": 2.0**-18, "bf16": 2.0**-130, "fp32": 2.0**-130, "fp64": 2.0**-1030}
"""Below the dtype's smallest normal number."""


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
    query = it.inputs[queries[0]]
    rng = it.rng("needles")
    if not key.size or not query.size or query.ndim != key.ndim or query.shape[-1] != width:
        return
    key = key / np.maximum(np.linalg.norm(key, axis=-1, keepdims=True), 1e-9)
    it.inputs[name] = 4.0 * key
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


def _short(it: Draw) -> None:
    """Of queries and keys, along the tokens, every sixth vector zero and four of six about 1e-12 long, some below that
    and some above: where lengths are normalized, the floor under them shows.
    """
    for name in it.of_role("query", "key"):
        array = it.inputs[name]
        if array.ndim >= 2:
            size = np.resize([1.0, 3e-13, 0.0, 2e-13, 4e-13, 5e-14], array.shape[-2])
            it.inputs[name] = array * size[:, None]


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
    """All logits below the finite number that is used in place of -inf (-1e4), and no product that overflows fp16."""
    for name in it.of_role("query", "key"):
        width = it.inputs[name].shape[-1]
        sign = 1.0 if it.mechanism.inputs[name].role == "query" else -1.0
        size = (1.25e4 * width**-0.5) ** 0.5
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


def _gates(it: Draw, factor: float) -> None:
    """Move every gate towards (or away from) the value at which it changes nothing: 1 in [0, 1], else 0."""
    for name in it.of_role("gate"):
        found = drawn(it.mechanism.inputs[name])
        low, high = found.bounds(it.sizes) if found is not None else (None, None)
        if low is not None and high is not None:
            kept = np.clip(high - factor * (high - it.inputs[name]), low, high)
            inside = it.inputs[name] if found is not None and found.open_high and factor == 0 else kept
            it.inputs[name] = np.where((inside > low) & (inside <= high), inside, it.inputs[name])
        else:
            it.inputs[name] = factor * it.inputs[name]


def _no_decay(it: Draw) -> None:
    """Gates that let everything pass: what a state forgets, it forgets by mistake."""
    _gates(it, 0.0)


def _slow_decay(it: Draw) -> None:
    """Gates near to letting everything pass, so that distant tokens matter."""
    _gates(it, 2.0**-6)


def _fast_decay(it: Draw) -> None:
    """Gates that forget within a token or two: cumulative decays beyond what an exponential may be divided by."""
    _gates(it, 16.0)


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
    "short": _short,
    "heads_apart": _heads_apart,
    "bias_inf": _bias_inf,
    "empty_rows": _empty_rows,
    "leading_masked": _leading_masked,
    "low_logits": _low_logits,
    "same_batch": _same_batch,
    "big_sink": _big_sink,
    "absent_sink": _absent_sink,
    "no_decay": _no_decay,
    "slow_decay": _slow_decay,
    "fast_decay": _fast_decay,
}
"""Recipes by name. `data` and `probes` have further names for hidden values and probes."""
