"""Where an error sits: the structure of a set of wrong elements, in words.

`locate` looks at one output (which heads, rows, columns), `locate_weights` at attention weights (a diagonal, a block of
keys, single keys). Both give a `Region`: a kind from `KINDS`, the sets of indices, and a sentence. Pure functions of
arrays; `diagnose` decides which to ask and `readout` obtains the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

KINDS = {
    "head": "some heads only",
    "batch": "some batch elements only",
    "row": "some query rows only, those that may attend to nothing included",
    "block": "some keys or rows from a tile's edge on, or single keys",
    "diagonal": "along a diagonal: the edge of a causal mask or window",
    "column": "some feature columns only",
    "lse": "the log-sum-exp only",
    "gradient": "gradients only; the outputs are right",
    "memory": "memory that is not the output",
    "repeat": "only in a later call",
    "everything": "everywhere, or without structure",
}
AXES = {
    "b": "batch element", "h": "head", "g": "key head", "i": "row", "t": "step", "j": "key", "d": "feature",
    "e": "column", "p": "page", "o": "slot", "c": "chunk",
}  # fmt: skip
ROLE = {"b": "batch", "h": "head", "g": "head", "i": "row", "t": "row", "j": "row", "d": "column", "e": "column"}
SHARE = 0.85
"""An axis is wrong as a whole where at least this share of it is."""
CHANCE = 0.01
"""A place is named only if errors that strike at random would leave the rest free less often than this."""


@dataclass
class Region:
    """A place, as data and as a sentence. `axes` maps an index to its wrong values, where not all are wrong."""

    kind: str
    sentence: str
    axes: dict[str, list[int]] = field(default_factory=dict)
    share: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "sentence": self.sentence, "axes": self.axes, "share": self.share}


def wrong(got: Floats, want: Floats, sigma: Floats, limit: float) -> Bools:
    """Which elements are outside `limit` sigmas; a NaN or infinity must stand where one is wanted."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        near = np.abs(got - want) <= limit * sigma
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    outside: Bools = ~(near | same)
    return outside


def locate(
    bad: Bools, axes: Sequence[str], *, empty: Bools | None = None, ignore: Sequence[str] = ()
) -> Region | None:
    """The region of an output's wrong elements; None where nothing is wrong.

    Args:
        bad: the wrong elements, shape of the output.
        axes: the output's index names, one per axis.
        empty: rows that may attend to nothing, broadcastable to `bad`.
        ignore: axes that say nothing: the batch, where a case packs many small problems into one call.
    """
    if not bad.any():
        return None
    share = float(bad.mean())
    if empty is not None:
        inside = np.broadcast_to(empty, bad.shape)
        if inside.any() and not inside.all() and not (bad & ~inside).any():
            return Region("row", "only rows that may attend to nothing", {}, share)
    sets: dict[str, list[int]] = {}
    feature = ROLE.get(axes[-1]) == "column" if axes else False
    units = np.any(bad, axis=-1) if feature else bad
    for place, name in enumerate(axes):
        hit = np.any(bad, axis=tuple(axis for axis in range(bad.ndim) if axis != place))
        if hit.all() or name in ignore:
            continue
        # An error along a diagonal spares a few rows; that most rows are wrong says little.
        if ROLE.get(name, "row") == "row" and hit.mean() >= SHARE and hit.size > 4:
            continue
        if _credible(bad if feature and place == bad.ndim - 1 else units, place):
            sets[name] = [int(value) for value in np.flatnonzero(hit)]
    if not sets:
        return Region("everything", "everywhere", {}, share)
    lengths = dict(zip(axes, bad.shape, strict=True))
    name = _most_telling(sets, lengths)
    kind = ROLE.get(name, "row")
    if kind == "row" and _tile(sets[name], lengths[name]) is not None:
        kind = "block"
    words = [_set_words(axis, sets[axis], lengths[axis]) for axis in sorted(sets, key=lambda axis: axis != name)]
    rest = "" if {"h", "g"} & set(sets) or not {"h", "g"} & set(axes) else " in every head"
    return Region(kind, " of ".join(words) + rest, sets, share)


def _credible(units: Bools, axis: int) -> bool:
    """Whether the values of an axis that show no error are free of it, and not just spared by chance.

    An error that strikes some rows here and there spares a whole head now and then. `units` are what it strikes one by
    one: rows, or elements where the axis is that of features.
    """
    others = tuple(place for place in range(units.ndim) if place != axis)
    hits = units.sum(axis=others)
    each = units.size // units.shape[axis]
    struck, spared = int((hits > 0).sum()), int((hits == 0).sum())
    rate = float(hits.sum()) / (struck * each)
    chance = float(math.comb(struck + spared, spared)) * (1 - rate) ** (each * spared)
    return bool(chance < CHANCE)


def _most_telling(sets: dict[str, list[int]], lengths: dict[str, int]) -> str:
    """Heads and batches come before rows: a wrong head has wrong rows, not the other way round."""
    order = {"head": 0, "batch": 1, "row": 2, "column": 3}

    def rank(name: str) -> tuple[int, float]:
        return order.get(ROLE.get(name, "row"), 2), len(sets[name]) / max(lengths[name], 1)

    return min(sets, key=rank)


def _tile(values: Sequence[int], length: int) -> int | None:
    """The tile size, where the values are the whole tail of the axis from a multiple of a power of two on."""
    first = values[0]
    if len(values) < 2 or list(values) != list(range(first, length)) or first == 0:
        return None
    size = first & -first
    return size if size >= 4 else None


def _set_words(name: str, values: Sequence[int], length: int) -> str:
    label = AXES.get(name, name)
    many = f"{label}s"
    first, last = values[0], values[-1]
    span = list(values) == list(range(first, last + 1))
    if len(values) == 1:
        place = "first " if first == 0 and length > 1 else "last " if first == length - 1 and length > 1 else ""
        return f"the {place}{label} ({name} = {first} of {length})" if place else f"{label} {first} of {length}"
    tile = _tile(values, length) if ROLE.get(name) == "row" or name == "j" else None
    if tile is not None:
        return f"the last block of {many} ({name} = {first}..{last} of {length}, tile {tile} or a divisor of it)"
    if span:
        place = "the first " if first == 0 else "the last " if last == length - 1 else ""
        return f"{place}{many} {first}..{last} of {length}"
    step = np.diff(values)
    if len(values) > 2 and (step == step[0]).all():
        return f"every {step[0]}th of the {many} from {first} on"
    listed = ", ".join(str(value) for value in values[:6]) + (", ..." if len(values) > 6 else "")
    return f"{many} {listed} ({len(values)} of {length})"


def constant_factor(got: Floats, want: Floats, sigma: Floats, limit: float) -> float | None:
    """The factor c with got = c * want within the tolerance; None where there is none, or where it is 1."""
    finite = np.isfinite(got) & np.isfinite(want)
    if not finite.all() or not np.any(want):
        return None
    # Elements that are exact would outweigh all others; none counts for more than a typical one a thousand times.
    weight = 1.0 / np.maximum(sigma, float(np.median(sigma)) * 1e-3 + 1e-30)
    with np.errstate(all="ignore"):
        factor = float(((weight * want) * (weight * got)).sum() / ((weight * want) ** 2).sum())
    if abs(factor - 1) < 1e-6 or not np.isfinite(factor):
        return None
    # The candidate's own error grows with the factor.
    return None if wrong(got, factor * want, sigma * max(1.0, abs(factor)), limit).any() else factor


def locate_weights(got: Floats, want: Floats, tolerance: float, *, batch: bool = True) -> Region | None:
    """The region of wrong attention weights; None where they are right.

    Args:
        got, want: weights `[b, h, i, j]`; a row's common factor is looked at separately, so that one wrong key is not
            taken for a wrong row.
        tolerance: the relative error of a weight that is still honest.
        batch: whether elements of the batch are alike, so that some of them being right says something.
    """
    empty = ~np.any(want, axis=-1)
    leak = empty & (np.abs(np.nan_to_num(got, nan=1.0)) > tolerance).any(axis=-1)
    bad, factor = _deviating(got, want, tolerance)
    leaked = bad & empty[..., None]
    bad &= ~empty[..., None]
    scaled = (np.abs(factor - 1) > 4 * tolerance) & ~empty
    if not bad.any():
        if leak.any():
            what = "become NaN" if np.isnan(got[leak]).any() else "receive weights"
            return Region("row", f"rows that may attend to nothing {what}", {}, float(leak.mean()))
        region = locate(scaled, ("b", "h", "i"), ignore=() if batch else ("b",))
        if region is not None:
            factors = factor[scaled]
            spread = float(factors.max() - factors.min())
            told = f"{factors.mean():.4g}" if spread < 8 * tolerance else f"{factors.min():.3g} to {factors.max():.3g}"
            region.sentence = f"whole rows scaled by {told}: {region.sentence}"
        return region
    # Rows that may attend to nothing belong to the picture where keys are seen that must not be.
    return _weights_region(bad | leaked, got, want, batch)


def _deviating(got: Floats, want: Floats, tolerance: float) -> tuple[Bools, Floats]:
    """Weights that differ after each row's common factor is taken out, and that factor."""
    kept = want > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(kept & (got != 0), got / want, np.nan)
    factor = np.ones(want.shape[:-1])
    usable = np.any(np.isfinite(ratio), axis=-1)
    if usable.any():
        with np.errstate(all="ignore"):
            factor[usable] = np.nanmedian(np.where(np.isfinite(ratio), ratio, np.nan)[usable], axis=-1)
    scaled = factor[..., None] * want
    scale = np.maximum(scaled, want.max(axis=-1, keepdims=True) * 1e-3)
    return ~(np.abs(got - scaled) <= 4 * tolerance * scale), factor


def _weights_region(bad: Bools, got: Floats, want: Floats, batch: bool) -> Region:
    share = float(bad.mean())
    batches, heads, rows, keys = bad.shape
    head_hit, batch_hit = np.any(bad, axis=(0, 2, 3)), np.any(bad, axis=(1, 2, 3))
    flat = np.any(bad, axis=(0, 1))
    what = _what(bad, got, want)
    struck = np.any(bad, axis=-1)
    if not head_hit.all() and _credible(struck, 1):
        sets = {"h": [int(value) for value in np.flatnonzero(head_hit)]}
        return Region("head", f"{what} in {_set_words('h', sets['h'], heads)}", sets, share)
    if batch and not batch_hit.all() and _credible(struck, 0):
        sets = {"b": [int(value) for value in np.flatnonzero(batch_hit)]}
        return Region("batch", f"{what} in {_set_words('b', sets['b'], batches)}", sets, share)
    offsets = _diagonals(flat, np.any(want, axis=(0, 1)))
    key_hit, row_hit = np.any(flat, axis=0), np.any(flat, axis=1)
    if offsets is not None:
        sets = {"j - i": offsets}
        if len(offsets) == 1:
            told = f"on the diagonal j = i {_signed(offsets[0])}"
        else:
            told = f"in the band of diagonals j - i = {offsets[0]}..{offsets[-1]}"
        return Region("diagonal", f"{what} {told} (N = {rows}, M = {keys})", sets, share)
    sets = {}
    if key_hit.mean() < SHARE or (keys <= 4 and not key_hit.all()):
        sets["j"] = [int(value) for value in np.flatnonzero(key_hit)]
    if row_hit.mean() < SHARE or (rows <= 4 and not row_hit.all()):
        sets["i"] = [int(value) for value in np.flatnonzero(row_hit)]
    steps = _steps(flat) if len(sets) < 2 else None
    if steps is not None and not (sets.get("i") or sets.get("j")):
        return Region("block", f"{what} in blocks of about {steps} rows", {}, share)
    if not sets:
        return Region("everything", f"{what} for nearly all pairs of query and key", {}, share)
    if "j" in sets:
        # Among two or three keys every place looks like an edge.
        kind = "block" if keys >= 4 else "everything"
    else:
        kind = "block" if _tile(sets["i"], rows) is not None else "row"
    words = [_set_words(name, sets[name], keys if name == "j" else rows) for name in sets]
    return Region(kind, f"{what} at {' of '.join(words)}", sets, share)


def _what(bad: Bools, got: Floats, want: Floats) -> str:
    extra = bad & (want == 0)
    missing = bad & (want > 0) & (np.abs(got) <= 1e-3 * want.max(axis=-1, keepdims=True))
    if np.isnan(got[bad]).any():
        return "NaN weights"
    if extra.sum() >= SHARE * bad.sum():
        return "keys that must not be seen are seen"
    if missing.sum() >= SHARE * bad.sum():
        return "keys that must be seen are not"
    return "wrong weights"


def _diagonals(flat: Bools, visible: Bools) -> list[int] | None:
    """The offsets j - i of the wrong weights, where they lie along diagonals; None where not.

    Either being wrong depends on j - i alone, or the wrong weights form a narrow oblique band. Rows that are wrong as
    a whole, and columns that are, say nothing about diagonals.
    """
    rows, keys = flat.shape
    if min(rows, keys) < 3 or flat.mean() > 0.9:
        return None
    row_hit, key_hit = np.any(flat, axis=1), np.any(flat, axis=0)
    lost = row_hit & np.all(flat | ~visible, axis=1) & np.any(visible, axis=1)
    if (lost | ~row_hit).all() or (flat[row_hit][:, key_hit].mean() >= SHARE and key_hit.mean() < SHARE):
        return None
    i, j = np.nonzero(flat)
    offsets = [int(value) for value in np.unique(j - i)]
    # A short corner diagonal is a coincidence of single pairs; one of the lines must be long.
    if max(np.diagonal(flat, offset).size for offset in offsets) < max(3, min(rows, keys) // 2):
        return None
    lines = [np.diagonal(flat, offset) for offset in range(1 - rows, keys)]
    shares = [float(line.mean()) for line in lines if line.size >= 4]
    if all(share >= 0.75 or share <= 0.25 for share in shares) and any(share >= 0.75 for share in shares):
        return offsets
    spread = np.ptp(i) >= rows // 3 and np.ptp(j) >= keys // 3 and i.std() > 0 and j.std() > 0
    oblique = bool(spread) and float(np.corrcoef(i, j)[0, 1]) > 0.85
    return offsets if oblique and not _staircase(flat) else None


def _steps(flat: Bools) -> int | None:
    """How many neighbouring rows share their wrong keys, where they do: the picture is made of blocks."""
    changes = np.any(flat[1:] != flat[:-1], axis=1)
    runs = int(changes.sum()) + 1
    return round(len(flat) / runs) if 2 < runs <= len(flat) // 2 else None


def _staircase(flat: Bools) -> bool:
    """Whether the band ends on tile edges of 8 keys or more: it is cut by a loop over tiles, not by a mask."""
    firsts = [int(np.flatnonzero(row)[0]) for row in flat if row.any()]
    lasts = [int(np.flatnonzero(row)[-1]) + 1 for row in flat if row.any()]
    return any(len(set(edge)) > 1 and all(value % 8 == 0 for value in edge) for edge in (firsts, lasts))


def _signed(value: int) -> str:
    return f"+ {value}" if value >= 0 else f"- {-value}"
