"""What a failure is: where the error sits and what it looks like, as data and in one sentence.

`region_of` looks at arrays alone; `diagnose` also asks the candidate for its weights and compares it with the known
wrong variants of the equations; `outcome.headline` sums up the diagnoses of a report. The result of `diagnose` is what
`CaseResult.diagnosis` holds and the JSON report shows:

    {"region": {"kind", "sentence", "axes", ...}, "cause": {"variant", "sentence", "others"}, "sentence": "..."}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspec.conformance import causes, readout
from attnspec.conformance.causes import ROUNDOFF, Observed
from attnspec.conformance.regions import AXES, Region, constant_factor, locate, locate_weights, wrong
from attnspec.conformance.types import Case, CaseData
from attnspec.spec import Mechanism

Floats = NDArray[np.float64]
ORDER = ("head", "batch", "column")
"""Kinds that an output shows best; of the others, weights know more."""


def diagnose(
    mechanism: Mechanism,
    case: Case,
    data: CaseData,
    observed: Observed,
    *,
    call: readout.Call | None = None,
    budget_seconds: float = 3.0,
    confirm: tuple[Case, CaseData, Observed] | None = None,
) -> dict[str, Any]:
    """Explain wrong values.

    Args:
        observed: what came and what was wanted; gradients are named `dQ` for input `Q`.
        call: runs the candidate on other arrays, to read its weights.
        budget_seconds: for the search of a cause; 0: none is searched.
        confirm: a larger failing case that tells similar causes apart.
    """
    region = region_of(mechanism, case, observed, data)
    weights = _weights(mechanism, case, data, observed, call)
    found = _combined(region, weights)
    cause = None
    if budget_seconds > 0:
        cause = causes.guess(mechanism, case, data, observed, budget_seconds=budget_seconds, confirm=confirm)
    return assemble(found, cause)


def assemble(region: Region | None, cause: Mapping[str, Any] | None) -> dict[str, Any]:
    """The dictionary of a diagnosis; absent knowledge has no key."""
    told: dict[str, Any] = {}
    if region is not None:
        told["region"] = region.as_dict()
    if cause is not None:
        told["cause"] = dict(cause)
    sentences = [part["sentence"] for part in told.values()]
    if sentences:
        told["sentence"] = "; ".join(sentences)
    return told


def region_of(
    mechanism: Mechanism, case: Case, observed: Observed, data: CaseData | None = None
) -> Region | None:
    """Where the wrong elements are, by outputs and gradients."""
    bad = {
        name: wrong(got, observed.want[name], observed.sigma[name], observed.limit)
        for name, got in observed.got.items()
    }
    failing = [name for name in bad if bad[name].any()]
    if not failing:
        return None
    outputs = [name for name in failing if name in mechanism.outputs]
    gradients = [name for name in failing if name not in mechanism.outputs]
    if outputs == ["LSE"] and not gradients and len(bad) > 1:
        return _lse(mechanism, case, observed, bad["LSE"])
    name = outputs[0] if outputs else _worst(gradients, observed)
    axes = _axes(mechanism, name)
    region = locate(bad[name], axes, empty=_empty_rows(observed, name, axes), ignore=_ignored(case))
    if region is None:
        return None
    if outputs == ["LSE"]:
        region.kind = "lse" if len(bad) > 1 or region.kind == "everything" else region.kind
    factor = constant_factor(observed.got[name], observed.want[name], observed.sigma[name], observed.limit)
    if factor is not None and region.kind == "everything":
        region.sentence = f"everywhere by one factor: {name} is {factor:.6g} times what it should be"
    nan = np.isnan(observed.got[name]) & ~np.isnan(observed.want[name])
    if nan.any() and (nan == bad[name]).all():
        region.sentence = f"NaN: {region.sentence}"
    if not outputs:
        return _gradient(region, name, gradients, [name for name in bad if name not in gradients])
    others = [other for other in failing if other != name]
    region.sentence = f"{name}: {region.sentence}" + (f"; also wrong: {', '.join(others)}" if others else "")
    return region


def _lse(mechanism: Mechanism, case: Case, observed: Observed, bad: NDArray[np.bool_]) -> Region:
    """Only the log-sum-exp is wrong: by which rule, if there is one."""
    got, want, sigma = observed.got["LSE"], observed.want["LSE"], observed.sigma["LSE"]
    finite = np.isfinite(got) & np.isfinite(want)
    infinite = bad & ~finite
    sentence = "LSE only"
    if infinite.any() and not (bad & finite).any():
        values = sorted({str(float(value)) for value in got[infinite]})
        sentence = f"LSE only, of rows that may attend to nothing: it is {', '.join(values[:3])}"
    elif finite.any():
        sigma = np.where(finite, sigma, 1.0)
        got, want = np.where(finite, got, 0.0), np.where(finite, want, 0.0)
        factor = constant_factor(got, want, sigma, observed.limit)
        shift = float(np.median((got - want)[finite]))
        if factor is not None:
            known = {1 / math.log(2): " (1/ln 2: it is in base 2)", math.log(2): " (ln 2)", -1.0: " (its sign)"}
            close = [told for value, told in known.items() if abs(factor / value - 1) < 1e-2]
            sentence = f"LSE only, by the factor {factor:.5g}{close[0] if close else ''}"
        elif not wrong(got, want + shift, sigma, observed.limit)[finite].any():
            sentence = f"LSE only, by the constant {shift:+.5g}"
    region = locate(bad, _axes(mechanism, "LSE"), ignore=_ignored(case))
    axes = region.axes if region is not None else {}
    if axes and region is not None and "constant" not in sentence and "factor" not in sentence:
        sentence += f": {region.sentence}"
    return Region("lse", sentence, axes, float(bad.mean()))


def _gradient(region: Region, name: str, failing: Sequence[str], right: Sequence[str]) -> Region:
    wrong_names = ", ".join(failing)
    right_names = f"; {', '.join(right)} right" if right else ""
    where = "" if region.kind == "everything" and region.sentence == "everywhere" else f": {region.sentence}"
    sentence = f"gradients {wrong_names}{right_names}; {name}{where or ': everywhere'}"
    return Region("gradient", sentence, {**region.axes}, region.share)


def _ignored(case: Case) -> tuple[str, ...]:
    """Axes that say nothing: the batch where a case packs every small problem of a kind into one call, and the
    features where the values are codes of the keys."""
    return (("b",) if case.values.startswith("every_") else ()) + (("e",) if case.check == "exact" else ())


def _worst(names: Sequence[str], observed: Observed) -> str:
    def share(name: str) -> float:
        return float(wrong(observed.got[name], observed.want[name], observed.sigma[name], observed.limit).mean())

    return min(names, key=share)


def _axes(mechanism: Mechanism, name: str) -> tuple[str, ...]:
    if name in mechanism.outputs:
        return (*mechanism.batch, *mechanism.outputs[name].axes)
    decl = mechanism.inputs[name.removeprefix("d")]
    return (*decl.batch, *decl.axes)


def _empty_rows(observed: Observed, name: str, axes: Sequence[str]) -> NDArray[np.bool_] | None:
    """Rows whose expected output is exactly zero, which is what rows without a key have."""
    want = observed.want[name]
    if not axes or AXES.get(axes[-1]) not in ("column",) or want.ndim < 2 or not want.shape[-1]:
        return None
    empty: NDArray[np.bool_] = (want == 0).all(axis=-1, keepdims=True)
    return empty


def _weights(
    mechanism: Mechanism, case: Case, data: CaseData, observed: Observed, call: readout.Call | None
) -> Region | None:
    if call is None or not any(name in mechanism.outputs for name in observed.got):
        return None
    finite = all(np.isfinite(array).all() for array in map(np.asarray, data.inputs.values()) if array.dtype.kind == "f")
    if not finite:
        return None
    read = readout.weights(mechanism, data, call)
    if read is None:
        return None
    got, want = read
    return locate_weights(got, want, 64 * ROUNDOFF.get(case.dtype, 2.0**-24) + 1e-5, batch="b" not in _ignored(case))


def _combined(region: Region | None, weights: Region | None) -> Region | None:
    """What the output and the weights say together."""
    if region is None or weights is None or region.kind in (*ORDER, "lse", "gradient"):
        if region is not None and weights is not None and region.kind in ORDER:
            region.sentence += f"; {weights.sentence}"
        return region
    if weights.kind == "everything" and region.kind != "everything":
        return region
    sentence = f"{weights.sentence}; it shows in {region.sentence}"
    return Region(weights.kind, sentence, {**region.axes, **weights.axes}, weights.share)
