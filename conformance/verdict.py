"""The judgement of what a candidate returned, output by output, with the figures that it rests on.

`judge` compares results that are already float64 NumPy with what the oracle expects: shape, infinities and NaN where
they belong, then z against the limits of `tolerance`, over the whole and over every slice of every axis. Nothing is
broadcast, a NaN never counts as equal unless one is expected there, and what is not expected to be judged (`judged`) is
left out and counted. Further calls of a case, and bits that must not change between calls, are judged with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnspec.conformance import semantics, tolerance
from attnspec.conformance.oracle import Expected
from attnspec.conformance.types import Case, Observation, OutputEvidence
from attnspec.spec.language.formats import format_of, round_to, unit_roundoff
from attnspec.spec.mechanism import load

TINY = 2.0**-126
"""The smallest normal number of single precision. Relative to an output's largest value, errors of this size are never
held against a candidate: hardware may flush denormal numbers to zero, and a weight of exp(-100) may be 0 or not."""


def judge(
    case: Case,
    expected: Expected,
    outputs: Mapping[str, Any],
    *,
    dtypes: Mapping[str, str] | None = None,
    repeats: Sequence[Mapping[str, Any]] = (),
) -> list[OutputEvidence]:
    """Judge the results of a case.

    Args:
        outputs: by output name (forward) or input name (backward), in the candidate's conventions but the mechanism's
            axes, as float64 NumPy.
        dtypes: the dtype in which each was returned; found out from the values without it.
        repeats: the results of further calls, in order, each like `outputs`.

    Returns:
        One entry for every output judged; further calls carry their number in the name (`O (call 2)`).
    """
    evidence = _call(case, expected, outputs, dtypes, "")
    if case.check == "determinism":
        return [_repeated(entry, outputs, repeats, case, expected) for entry in evidence]
    for number, (want, got) in enumerate(zip(expected.calls, repeats, strict=False), start=2):
        evidence += _call(case, want, got, dtypes, f" (call {number})")
    if len(repeats) < len(expected.calls):
        absent = len(expected.calls) - len(repeats)
        evidence.append(_failed("calls", f"{absent} further calls of the case were not made"))
    if expected.same and repeats:
        evidence += _unchanged(expected, outputs, repeats[0])
    return evidence


def judge_observation(case: Case, expected: Expected, observation: Observation) -> list[OutputEvidence]:
    """`judge` for an observation as the worker returns it."""
    key = "gradients" if case.direction == "backward" else "outputs"
    return judge(
        case,
        expected,
        getattr(observation, key),
        dtypes=observation.receipt.get("dtypes"),
        repeats=[entry[key] for entry in observation.repeats],
    )


def _call(
    case: Case, expected: Expected, outputs: Mapping[str, Any], dtypes: Mapping[str, str] | None, label: str
) -> list[OutputEvidence]:
    if expected.data is not None and semantics.differences(expected.declares):
        spec = load(case.mechanism)
        backward = case.direction == "backward"
        found = semantics.from_candidate(
            spec, expected.data, {} if backward else outputs, outputs if backward else {}, expected.declares
        )
        outputs = found[1] if backward else found[0]
    evidence = []
    names = list(expected.exact)
    prefix = "d" if case.direction == "backward" else ""
    for number, name in enumerate(names):
        if name not in outputs:
            if number == 0 and case.direction == "forward":
                evidence.append(_failed(f"{prefix}{name}{label}", "is not among the results"))
            continue
        dtype = (dtypes or {}).get(name, "") if case.direction == "forward" else case.dtype
        evidence.append(
            judge_array(
                f"{prefix}{name}{label}", outputs[name], expected.exact[name], expected.sigma[name],
                dtype=case.dtype, returned=dtype, first=number == 0 or case.direction == "backward",
                judged=expected.judged.get(name), rows=expected.rows, row_axis=expected.row_axis.get(name),
            )
        )  # fmt: skip
    if not evidence and names:
        evidence.append(_failed(f"{prefix}{names[0]}{label}", "is not among the results"))
    return evidence


def judge_array(
    name: str,
    got: Any,
    want: Any,
    sigma: Any,
    *,
    dtype: str,
    returned: str = "",
    first: bool = True,
    judged: Any = None,
    rows: Sequence[int] | None = None,
    row_axis: int | None = None,
) -> OutputEvidence:
    """Judge one array.

    Args:
        want, sigma: of one shape; `got` must have it too, once cut to `rows` along `row_axis`.
        dtype: of the case; `returned`: of this result, where it may differ.
        first: the result is rounded to the case's dtype in `sigma` already; statistics are not.
        judged: elements that count.
    """
    array = np.asarray(got)
    if array.dtype.kind not in "fiu":
        return _failed(name, f"has elements of type {array.dtype}, expected real numbers")
    array = array.astype(np.float64)
    if rows is not None and row_axis is not None and array.ndim == want.ndim:
        if array.shape[row_axis] <= max(rows, default=-1):
            return _failed(name, f"has shape {array.shape}: row {max(rows)} of axis {row_axis} is missing")
        array = np.take(array, list(rows), axis=row_axis)
    if array.shape != want.shape:
        return _failed(name, f"has shape {array.shape}, expected {want.shape}")
    if not want.size:
        return OutputEvidence(name, True, 0, 0.0, 0.0, 0.0, 0.0, message="")
    spread = widened(sigma, want, array, dtype, returned, first)
    counts = np.ones(want.shape, dtype=bool) if judged is None else np.asarray(judged, dtype=bool)
    special = ~np.isfinite(want)
    same_special = np.where(np.isnan(want), np.isnan(array), array == want)
    # Beyond the largest number of the dtype the exact result rounds to infinity; both are right at the edge.
    overflow = ~special & np.isinf(array) & (np.sign(array) == np.sign(want))
    overflow &= np.abs(want) + 8 * spread >= format_of(dtype if first else "fp32").largest
    bad = counts & (special & ~same_special | ~special & ~np.isfinite(array) & ~overflow)
    regular = counts & ~special & np.isfinite(array)
    with np.errstate(all="ignore"):
        error = np.where(regular, array - np.where(special, 0.0, want), 0.0)
        z = np.where(error == 0, 0.0, np.abs(error) / spread)
    found = _figures(name, z, regular, want.ndim)
    if bad.any():
        place = _first(bad)
        found.worst_index, found.passed = place, False
        found.max_z = float("inf")
        what = "NaN or infinity where" if not np.isfinite(array[place]) else "a number where"
        found.message = (
            f"{what} {_number(want[place])} is expected: {int(bad.sum())} of {int(counts.sum())} elements, "
            f"the first at {_at(place)} is {_number(array[place])}"
        )
    else:
        place = _first(z == z.max()) if z.size else ()
        found.worst_index = place
    place = found.worst_index
    found.worst_got, found.worst_want = float(array[place]), float(want[place])
    found.worst_sigma = float(spread[place])
    return found


def widened(sigma: Any, want: Any, got: Any, dtype: str, returned: str, first: bool) -> Any:
    """Sigma with the rounding of a statistic that came back in the case's dtype, and the floor of flushed denormals."""
    size = np.where(np.isfinite(want), np.abs(want), 0.0)
    # Not as squares: results may be as large as 1e300.
    spread = np.asarray(sigma, dtype=np.float64)
    if not first and dtype not in ("fp32", "fp64"):
        narrow = returned == dtype if returned else np.array_equal(round_to(got, dtype), got, equal_nan=True)
        if narrow:
            spread = np.hypot(spread, unit_roundoff(dtype) * size / np.sqrt(3.0))
    return np.hypot(spread, TINY * max(1.0, float(size.max(initial=0.0))))


def _figures(name: str, z: Any, regular: Any, axes: int) -> OutputEvidence:
    count = int(regular.sum())
    rows = int(regular.any(axis=-1).sum()) if axes > 1 else count
    limit = tolerance.limits(count, rows)
    if not count:
        return OutputEvidence(name, True, 0, 0.0, 0.0, limit.rms, limit.largest)
    with np.errstate(over="ignore"):
        squares = np.where(regular, np.minimum(z, 1e150) ** 2, 0.0)
    rms, largest = float(np.sqrt(squares.sum() / count)), float(z.max())
    found = OutputEvidence(name, True, count, rms, largest, limit.rms, limit.largest)
    if largest > limit.largest:
        found.passed = False
        found.message = f"largest |z| is {largest:.3g}, limit {limit.largest:.3g} for {count} elements"
    elif rms > limit.rms:
        found.passed = False
        found.message = f"RMS of z is {rms:.3g}, limit {limit.rms:.3g} for {rows} rows"
    else:
        found.message = _slices(squares, regular, axes)
        found.passed = not found.message
    return found


def _slices(squares: Any, regular: Any, axes: int) -> str:
    """The worst slice of any axis whose RMS is beyond its own limit; empty: none."""
    total = sum(regular.shape)
    for axis in range(axes):
        others = tuple(place for place in range(axes) if place != axis)
        counts = regular.sum(axis=others)
        if axes > 1 and axis != axes - 1:
            rows = regular.any(axis=-1).sum(axis=tuple(place for place in others if place != axes - 1))
        else:
            rows = counts
        with np.errstate(all="ignore"):
            rms = np.sqrt(squares.sum(axis=others) / np.maximum(counts, 1))
        for index in np.argsort(-rms)[:3]:
            limit = tolerance.rms_limit(float(rows[index]), total)
            if rms[index] > limit:
                return f"RMS of z in slice {int(index)} of axis {axis} is {rms[index]:.3g}, limit {limit:.3g}"
    return ""


def _repeated(
    entry: OutputEvidence, outputs: Mapping[str, Any], repeats: Sequence[Mapping[str, Any]], case: Case,
    expected: Expected,
) -> OutputEvidence:  # fmt: skip
    """The same call again must give the same bits, unless the candidate declares that it does not."""
    promise = semantics.declared(expected.declares, "determinism")
    if promise == "none" or (promise == "forward" and case.direction == "backward") or not entry.passed:
        return entry
    name = entry.name.removeprefix("d") if case.direction == "backward" else entry.name
    if not repeats:
        return dataclasses.replace(entry, passed=False, message="the call was not repeated")
    for number, again in enumerate(repeats, start=2):
        if name not in again or not np.array_equal(again[name], outputs[name], equal_nan=True):
            message = f"call {number} with the same inputs returned other bits (if intended: determinism = 'none')"
            return dataclasses.replace(entry, passed=False, message=message)
    return entry


def _unchanged(expected: Expected, outputs: Mapping[str, Any], again: Mapping[str, Any]) -> list[OutputEvidence]:
    """Rows that must not notice what changed between the calls."""
    if semantics.declared(expected.declares, "unseen_keys") == "rounding":
        return []
    evidence = []
    for name, same in expected.same.items():
        if name not in outputs or name not in again:
            continue
        one, two = np.asarray(outputs[name], dtype=np.float64), np.asarray(again[name], dtype=np.float64)
        if one.shape != same.shape or two.shape != same.shape:
            continue
        differs = same & ~((one == two) | (np.isnan(one) & np.isnan(two)))
        entry = OutputEvidence(f"{name} (unseen keys changed)", not differs.any(), int(same.sum()), 0.0, 0.0, 0.0, 0.0)
        if differs.any():
            place = _first(differs)
            entry.worst_index, entry.worst_got, entry.worst_want = place, float(two[place]), float(one[place])
            entry.message = (
                f"changes with keys that the query may not see: {int(differs.sum())} of {int(same.sum())} elements, "
                f"the first at {_at(place)} from {_number(one[place])} to {_number(two[place])}"
            )
        evidence.append(entry)
    return evidence


def _failed(name: str, message: str) -> OutputEvidence:
    return OutputEvidence(name, False, 0, float("inf"), float("inf"), 0.0, 0.0, message=message)


def _first(where: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in np.argwhere(where)[0])


def _at(place: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(part) for part in place) + "]"


def _number(value: Any) -> str:
    return f"{float(value):.6g}"
