"""A guess at the cause of a failure: which known wrong variant of the equations gives the candidate's numbers.

Variants come from the mechanism itself: its options at other values, the options and inputs of the case left out, the
logarithm in another base, an input returned as it came, and the mechanical mutants of its equations. A guess is only
made when a variant agrees with everything that the candidate returned and differs from the right answer.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspec.conformance.regions import wrong
from attnspec.conformance.types import Case, CaseData
from attnspec.spec import Mechanism, SpecError

Floats = NDArray[np.float64]
Arrays = Mapping[str, Floats]
ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

LIKELY = (
    "comparison-flipped", "option-ignored", "guard-dropped", "factor-dropped", "division-dropped", "term-dropped",
    "argument-dropped", "comparison-off-by-one", "reduction-replaced", "function-dropped", "function-replaced",
    "sign-flipped", "sign-dropped", "operator-replaced", "branch-ignored", "logic-replaced", "comparison-reversed",
    "tensor-replaced", "size-replaced", "option-replaced", "guard-negated", "branches-swapped", "index-off-by-one",
    "constant", "subscript-off-by-one",
)  # fmt: skip
"""Kinds of mutants from the mistakes that people make most often to those that only a machine makes."""


@dataclass(frozen=True)
class Variant:
    """A wrong variant: what to say when it fits, and how to compute it (None where it cannot be computed)."""

    name: str
    sentence: str
    compute: Callable[[CaseData], Arrays | None]


@dataclass(frozen=True)
class Observed:
    """What came and what was wanted, by output name (gradients as `dQ`, `dK`, ...)."""

    got: Arrays
    want: Arrays
    sigma: Arrays
    limit: float


def guess(
    mechanism: Mechanism,
    case: Case,
    data: CaseData,
    observed: Observed,
    *,
    budget_seconds: float = 3.0,
    confirm: tuple[Case, CaseData, Observed] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any] | None:
    """The variant that explains the observation.

    Args:
        confirm: a larger case of the same failure, with which a variant must agree too: a tiny case fits many.

    Returns:
        `{"variant", "sentence", "others"}`, or None where no variant fits.
    """
    known = list(variants(mechanism, case, tuple(observed.got)))
    # Making the mutants takes a second or two, once; the budget is for comparing.
    deadline = clock() + budget_seconds
    fitting: list[Variant] = []
    for variant in known:
        if clock() > deadline:
            break
        if _fits(variant, case, data, observed):
            fitting.append(variant)
    if confirm is not None:
        larger_case, larger_data, larger = confirm
        fitting = [v for v in fitting if clock() < deadline + 2 and _fits(v, larger_case, larger_data, larger)]
    if not fitting:
        return None
    best = fitting[0]
    others = [variant.sentence for variant in fitting[1:4]]
    return {"variant": best.name, "sentence": best.sentence, "others": others}


def variants(mechanism: Mechanism, case: Case, names: tuple[str, ...]) -> Iterator[Variant]:
    """Known wrong variants, the plainest explanations first."""
    yield from _nothing(names)
    yield from _inputs_returned(mechanism, names)
    yield from _other_conventions(mechanism, case, names)
    yield from _neighbours(mechanism, case, names)
    yield from _left_out(mechanism, case, names)
    yield from _log_bases(mechanism, case, names)
    yield from _mutants(mechanism, case, names)


def _fits(variant: Variant, case: Case, data: CaseData, observed: Observed) -> bool:
    try:
        with np.errstate(all="ignore"):
            computed = variant.compute(data)
    except (SpecError, ArithmeticError, ValueError, IndexError, KeyError, TypeError):
        # A variant is a wrong program: it may well not be computable for this case.
        return False
    if computed is None:
        return False
    differs = False
    for name, got in observed.got.items():
        value = computed.get(name)
        if value is _ZERO:
            value = np.zeros(got.shape)
        if value is None or np.shape(value) != got.shape:
            return False
        value = np.asarray(value, dtype=np.float64)
        sigma = observed.sigma[name]
        finite = sigma[np.isfinite(sigma) & (sigma > 0)]
        floor = float(np.median(finite)) if finite.size else 0.0
        # The equations' own noise says nothing of elements that are exact there and not in the variant.
        loose = np.maximum(sigma, floor) + ROUNDOFF.get(case.dtype, 2.0**-24) * np.abs(np.nan_to_num(value))
        if wrong(got, value, loose, observed.limit).any():
            return False
        differs = differs or bool(wrong(value, observed.want[name], loose, observed.limit).any())
    return differs


def evaluate(mechanism: Mechanism, case: Case, data: CaseData, names: tuple[str, ...]) -> dict[str, Floats]:
    """The outputs and gradients in `names` by the equations of `mechanism`."""
    outputs = [name for name in names if name in mechanism.outputs]
    result: dict[str, Floats] = {}
    if outputs:
        result.update(mechanism.evaluate(data.inputs, data.options, outputs=outputs, rows=case.rows))
    wanted = {source: name for name, source in mechanism.gradient_of.items() if name in names}
    if wanted and data.cotangents:
        gradients = mechanism.gradients(data.inputs, data.options, data.cotangents, wrt=list(wanted))
        result.update({wanted[source]: value for source, value in gradients.items()})
    return result


def _nothing(names: tuple[str, ...]) -> Iterator[Variant]:
    """Zeros, as a kernel gives that was never launched into a cleared buffer."""
    yield Variant("zeros", "is zero everywhere: nothing was computed", lambda data: dict.fromkeys(names, _ZERO))


_ZERO = np.zeros(())


def _inputs_returned(mechanism: Mechanism, names: tuple[str, ...]) -> Iterator[Variant]:
    for name in mechanism.inputs:
        for output in names:
            if output not in mechanism.outputs:
                continue

            def compute(data: CaseData, name: str = name, output: str = output) -> Arrays | None:
                return {output: data.inputs[name]} if name in data.inputs else None

            yield Variant(f"returns {name}", f"equals the input {name}: nothing was computed", compute)


def _other_conventions(mechanism: Mechanism, case: Case, names: tuple[str, ...]) -> Iterator[Variant]:
    for name, option in mechanism.options.items():
        present = case.options.get(name, option.default)
        choices: tuple[Any, ...] = option.choices if option.type == "enum" else ()
        for choice in choices:
            if choice != present:
                yield Variant(
                    f"{name}={choice}",
                    f"equals {name} = {choice} where {name} = {present} was asked; if that is meant, declare it",
                    _with_options(mechanism, case, names, {name: choice}),
                )


def _neighbours(mechanism: Mechanism, case: Case, names: tuple[str, ...]) -> Iterator[Variant]:
    """Integer options off by one, boolean masks read the other way round."""
    for name, value in case.options.items():
        if mechanism.options[name].type != "int" or not isinstance(value, int):
            continue
        for other in (value - 1, value + 1):
            if other >= 0:
                yield Variant(
                    f"{name}={other}",
                    f"equals {name} = {other} where {name} = {value} was asked: it is counted differently",
                    _with_options(mechanism, case, names, {name: other}),
                )
    for name in case.inputs:
        if mechanism.inputs[name].kind != "bool":
            continue

        def compute(data: CaseData, name: str = name) -> Arrays | None:
            inputs = {**data.inputs, name: ~np.asarray(data.inputs[name], dtype=bool)}
            return evaluate(mechanism, case, dataclasses.replace(data, inputs=inputs), names)

        yield Variant(f"not {name}", f"equals the spec with {name} inverted: True is read as False", compute)


def _left_out(mechanism: Mechanism, case: Case, names: tuple[str, ...]) -> Iterator[Variant]:
    for name, value in case.options.items():
        option = mechanism.options.get(name)
        if option is None or value == option.default:
            continue
        yield Variant(
            f"ignores {name}",
            f"equals the spec without {name}: the option is ignored",
            _with_options(mechanism, case, names, {name: None}),
        )
    for name in case.inputs:
        if not mechanism.inputs[name].optional:
            continue

        def compute(data: CaseData, name: str = name) -> Arrays | None:
            inputs = {key: array for key, array in data.inputs.items() if key != name}
            return evaluate(mechanism, case, dataclasses.replace(data, inputs=inputs), names)

        yield Variant(f"ignores {name}", f"equals the spec without {name}: the input is ignored", compute)


def _with_options(
    mechanism: Mechanism, case: Case, names: tuple[str, ...], changed: Mapping[str, Any]
) -> Callable[[CaseData], Arrays | None]:
    def compute(data: CaseData) -> Arrays | None:
        options = {name: value for name, value in {**data.options, **changed}.items() if value is not None}
        return evaluate(mechanism, case, dataclasses.replace(data, options=options), names)

    return compute


def _log_bases(mechanism: Mechanism, case: Case, names: tuple[str, ...]) -> Iterator[Variant]:
    if "LSE" not in names or "LSE" not in mechanism.outputs:
        return
    for name, factor, sentence in (
        ("base-2 LSE", 1 / math.log(2), "equals the LSE in base 2: it lacks the factor ln 2"),
        ("LSE times ln 2", math.log(2), "equals the LSE times ln 2: the factor is applied to a natural logarithm"),
        ("negative LSE", -1.0, "equals the LSE with the opposite sign"),
    ):

        def compute(data: CaseData, factor: float = factor) -> Arrays | None:
            result = evaluate(mechanism, case, data, names)
            return {**result, "LSE": np.where(np.isneginf(result["LSE"]), -np.inf, factor * result["LSE"])}

        yield Variant(name, sentence, compute)


def _mutants(mechanism: Mechanism, case: Case, names: tuple[str, ...]) -> Iterator[Variant]:
    backward = mechanism.gradient is not None and any(name not in mechanism.outputs for name in names)
    for mutant in _ranked(mechanism, backward):
        changed = dataclasses.replace(mechanism, **{"gradient" if backward else "program": mutant.program})

        def compute(data: CaseData, changed: Mechanism = changed) -> Arrays | None:
            return evaluate(changed, case, data, names)

        yield Variant(mutant.id, f"equals the spec with {mutant.description}", compute)


_KNOWN: dict[tuple[str, str], list[Any]] = {}


def _ranked(mechanism: Mechanism, backward: bool) -> list[Any]:
    """The mutants of the forward or backward equations, likely mistakes first; made once per text."""
    from attnspec.spec.language import mutants

    program = mechanism.gradient if backward and mechanism.gradient is not None else mechanism.program
    key = (mechanism.name, program.text)
    if key not in _KNOWN:
        rank = {operator: place for place, operator in enumerate(LIKELY)}
        own = frozenset(program.definitions) - frozenset(mechanism.program.definitions) if backward else frozenset()
        _KNOWN[key] = sorted(
            mutants(program), key=lambda mutant: (mutant.name not in own, rank.get(mutant.operator, len(rank)))
        )
    return _KNOWN[key]
