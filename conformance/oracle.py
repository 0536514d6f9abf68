"""What is right, and by how much an honest implementation may miss it.

`expected` evaluates the equations in float64 on a case's data (only the sampled rows of a long case) and, by the noise
of the declared rounding model, sigma for every element; for exact probes sigma is in closed form. Gradients come from
the mechanism's backward equations. Declared differences (`semantics`) are part of what is expected. Results are cached
by content: the same arrays, options and rounding model are evaluated once. Nothing here depends on the candidate's
results.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnspec.conformance import probes, semantics, shapes
from attnspec.conformance.data import empty_rows
from attnspec.conformance.types import Case, CaseData
from attnspec.spec.language import Program, evaluate, read
from attnspec.spec.language.formats import unit_roundoff
from attnspec.spec.language.noise import RoundingModel
from attnspec.spec.language.noise import sigma as noise
from attnspec.spec.mechanism import Mechanism, load

CACHE_BYTES = 256 << 20
LONG_SAMPLES = 4
"""Noisy evaluations of a long case: its few rows have so many columns that sigma is pooled well."""


@dataclass
class Expected:
    """What a call must return.

    Attributes:
        exact, sigma: arrays by output name (`O`, `LSE`) or gradient name (`dQ`), in the spec's conventions.
        judged: elements that count, by name; absent: all.
        rows: the sampled values of an index, by its name; the candidate's result is cut to them before comparing.
        row_axis: by name, the axis that `rows` restricts.
        calls: what further calls of the case must return.
        same: by name, elements of the next call's result that must equal this one's bit for bit.
        rounding: the model behind sigma, as the report prints it.
    """

    exact: dict[str, Any]
    sigma: dict[str, Any]
    judged: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    row_axis: dict[str, int] = field(default_factory=dict)
    calls: list[Expected] = field(default_factory=list)
    same: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, Any] = field(default_factory=dict)
    data: CaseData | None = None
    declares: dict[str, Any] = field(default_factory=dict)
    mechanism: str = ""


def rounding_model(
    spec: Mechanism, dtype: str, name: str | None = None, *, gradient: bool = False, form: str | None = None
) -> RoundingModel:
    """The rounding model by name (the mechanism's default without one), for a dtype.

    `fused+tf32` is the model `fused` whose products round their operands to tf32 (fp32 cases only); the name is
    printed with the verdict. Outputs after the first (statistics such as the LSE) are taken as kept in float32; the
    verdict adds their rounding where a candidate returns them in the narrower dtype.
    """
    base, _, product = (name or spec.default_rounding).partition("+")
    if product not in ("", "tf32"):
        raise semantics.DeclarationError(f"rounding {name!r}: unknown product {product!r}; known: tf32")
    entry = spec.rounding(base)
    wide = "fp64" if dtype == "fp64" else "fp32"
    # A model names the tensors of every form; of each form those that it has.
    program = spec.form_gradients.get(form or "", spec.gradient) if gradient else None
    known = frozenset((program or (spec.program if form is None else spec.forms[form])).definitions)
    return RoundingModel(
        io=dtype,
        stored=(entry.gradient_stored if gradient else entry.stored) & known,
        accumulate="fp64" if dtype == "fp64" else "fp32",
        product="tf32" if product and dtype == "fp32" else "ieee",
        name=f"{entry.name}+{product}" if product else entry.name,
        outputs=dict.fromkeys(list(spec.outputs)[1:], wide),
        recomputed=gradient and entry.name == spec.default_rounding,
    )


def expected(
    case: Case,
    data: CaseData,
    declares: Mapping[str, Any] | None = None,
    rounding: str | None = None,
    *,
    mechanism: Mechanism | None = None,
    form: str | None = None,
) -> Expected:
    """What the case's call, and the further calls in `data.extra["calls"]`, must return.

    Args:
        declares: named semantics of the candidate.
        rounding: name of the rounding model that the candidate declares.
    """
    spec = mechanism or load(case.mechanism)
    if case.check == "refusal":
        return Expected({}, {}, mechanism=spec.name)
    chosen = dict(declares or {})
    found = _one(spec, case, data, chosen, rounding, case.rows, form)
    found.calls = [_one(spec, case, call, chosen, rounding, None, form) for call in data.extra.get("calls", [])]
    found.same = dict(data.extra.get("same", {}))
    return found


def _one(
    spec: Mechanism, case: Case, data: CaseData, declares: dict[str, Any], rounding: str | None,
    rows: Mapping[str, Sequence[int]] | None, form: str | None,
) -> Expected:  # fmt: skip
    options = semantics.fixed_options(spec, data.options, declares)
    exact, sigma, model = _cached(spec, case, data, options, declares, rounding, rows, form)
    found = Expected(
        dict(exact), dict(sigma), rounding={"name": model.name, "stored": sorted(model.stored), "io": model.io},
        data=data if semantics.differences(declares) else None, declares=declares, mechanism=spec.name,
    )  # fmt: skip
    if rows:
        ((index, values),) = rows.items()
        found.rows = tuple(values)
        for name in found.exact:
            axes = (*spec.batch, *spec.outputs[name].axes)
            if index in axes:  # a state has no rows: it is judged whole
                found.row_axis[name] = axes.index(index)
    _differences(spec, data, options, declares, found, rows, case)
    finite = all(
        np.isfinite(value).all() for name, value in data.inputs.items()
        if np.asarray(value).dtype.kind == "f" and spec.inputs[name].role in ("query", "key", "value")
    )  # fmt: skip
    if not finite:
        # Rows that may see an infinity or a NaN have no defined result; the others must be right.
        for name, value in found.exact.items():
            _unjudge(found, name, ~np.isfinite(value))
    return found


def _cached(
    spec: Mechanism, case: Case, data: CaseData, options: dict[str, Any], declares: dict[str, Any],
    rounding: str | None, rows: Mapping[str, Sequence[int]] | None, form: str | None,
) -> tuple[dict[str, Any], dict[str, Any], RoundingModel]:  # fmt: skip
    backward = case.direction == "backward"
    model = rounding_model(spec, case.dtype, rounding, gradient=backward, form=form)
    order = semantics.declared(declares, "score_order")
    base = declares.get("lse_base", "e") if backward else "e"
    way = (case.check == probes.CHECK, order, base, form, backward, sorted((rows or {}).items()))
    key = _digest(spec, data, (options, model.name, model.io, model.product, way))
    hit = _CACHE.get(key)
    if hit is not None:
        _CACHE.move_to_end(key)
        return (*hit, model)
    program = spec.program if form is None else spec.forms[form]
    changed = () if order == semantics.TABLE["score_order"].default else ("score_order", order)
    if changed:
        program = _replaced(spec, program, *changed)
    if case.check == probes.CHECK:
        sizes, resolved = spec.resolve(data.inputs, options)
        exact = evaluate(program, data.inputs, resolved, sizes=sizes, rows=rows)
        keys = shapes.derived(spec, case.sizes).get(shapes.roles(spec).names.get("keys", ""), 1)
        larger = probes.unsigned(spec, data.inputs)
        summed = None if larger is None else evaluate(program, larger, resolved, sizes=sizes, rows=rows)
        found = exact, probes.sigma(exact, next(iter(spec.outputs)), case.dtype, keys, summed)
    elif backward:
        found = _gradients(spec, data, options, model, base, changed, form)
    else:
        sizes, resolved = spec.resolve(data.inputs, options)
        long = rows is not None
        found = noise(
            program, data.inputs, resolved, rounding=model, sizes=sizes, rows=rows,
            samples=LONG_SAMPLES if long else None, seed=case.seed,
        )  # fmt: skip
    _remember(key, found)
    return (*found, model)


def _gradients(
    spec: Mechanism, data: CaseData, options: Mapping[str, Any], model: RoundingModel, base: str,
    changed: tuple[str, ...], form: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Gradients by input name with sigma; forward outputs are judged in forward cases."""
    cotangents = dict(data.cotangents)
    if base == "2" and "LSE" in cotangents:
        # The candidate's output is LSE / ln 2, whose cotangent c is c / ln 2 for the LSE.
        cotangents["LSE"] = cotangents["LSE"] / math.log(2.0)
    wrt = [name for name in spec.differentiable if name in data.inputs]
    program, arguments, outputs = spec.gradient_call(data.inputs, cotangents, wrt, form)
    if changed:
        program = _replaced(spec, program, *changed)
    sizes, resolved = spec.resolve(data.inputs, options)
    exact, sigma = noise(program, arguments, resolved, rounding=model, sizes=sizes, outputs=outputs)
    unit = unit_roundoff(model.io)
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for out in outputs:
        name = spec.gradient_of[out]
        want = spec.collapse(name, exact[out], data.inputs)
        variance = spec.collapse(name, sigma[out] ** 2, data.inputs)
        if want.shape != exact[out].shape:
            variance = variance + (unit * want) ** 2 / 3
        found[0][name], found[1][name] = want, np.sqrt(variance)
    return found


def _differences(
    spec: Mechanism, data: CaseData, options: Mapping[str, Any], declares: Mapping[str, Any], found: Expected,
    rows: Mapping[str, Sequence[int]] | None, case: Case,
) -> None:  # fmt: skip
    """Bring declared differences into what is expected."""
    backward = case.direction == "backward"
    if semantics.declared(declares, "padded_rows") == "undefined" and "real_q" in spec.program.definitions:
        padded = ~np.asarray(spec.evaluate(data.inputs, options, outputs=["real_q"], rows=rows)["real_q"], dtype=bool)
        for name, value in found.exact.items():
            axes = (*spec.batch, *(spec.inputs[name].axes if backward else spec.outputs[name].axes))
            index = shapes.roles(spec).query_index
            if index in axes and (not backward or spec.inputs[name].role == "query"):
                shape = [value.shape[0] if axis in spec.batch else -1 if axis == index else 1 for axis in axes]
                _unjudge(found, name, np.broadcast_to(padded, (value.shape[0], padded.shape[-1])).reshape(shape))
    rule = semantics.declared(declares, "empty_rows")
    lse_rule = semantics.declared(declares, "lse_empty")
    if (rule == "zero" and lse_rule == "-inf") or "keep" not in spec.program.definitions:
        if semantics.declared(declares, "lse_sink") == "excluded":
            _without_sink(spec, data, options, found, rows, case)
        return
    empty = empty_rows(spec, data, options, rows)
    if empty is None or not empty.any():
        if semantics.declared(declares, "lse_sink") == "excluded":
            _without_sink(spec, data, options, found, rows, case)
        return
    if backward:
        if rule in ("nan", "undefined"):
            _unjudge_gradients(spec, found, empty)
        return
    main = next(iter(spec.outputs))
    keys = spec.resolve(data.inputs, options)[0].get(shapes.roles(spec).names.get("keys", ""), 1)
    if keys == 0 and rule != "zero":
        # A softmax over no key at all is an empty sum or 0/0: what a masked row yields says nothing about it.
        rule = "undefined"
    # What becomes of an empty row is declared for rows that masks emptied; padding queries have a rule of their own.
    emptied = empty & ~_padding(spec, data, options, rows, empty.shape)
    for name, value in found.exact.items():
        meant = emptied if name == main else empty
        where = np.broadcast_to(meant.reshape(empty.shape + (1,) * (value.ndim - empty.ndim)), value.shape)
        if name != main:
            # -inf where +inf was declared was converted; anything goes where the rows themselves are not zero rows.
            if lse_rule == "undefined" or rule != "zero":
                _unjudge(found, name, where)
        elif rule == "undefined":
            _unjudge(found, name, where)
        elif rule == "nan":
            found.exact[name] = np.where(where, np.nan, value)
        elif rule == "mean":
            mean, spread = _mean_of_all(spec, data, case, rows)
            found.exact[name] = np.where(where, mean, value)
            found.sigma[name] = np.where(where, spread, found.sigma[name])


def _padding(
    spec: Mechanism, data: CaseData, options: Mapping[str, Any], rows: Mapping[str, Sequence[int]] | None,
    shape: tuple[int, ...],
) -> Any:  # fmt: skip
    """Which of the rows `[batch, ..., query]` belong to padding queries."""
    if "real_q" not in spec.program.definitions:
        return np.zeros(shape, dtype=bool)
    real = np.asarray(spec.evaluate(data.inputs, options, outputs=["real_q"], rows=rows)["real_q"], dtype=bool)
    padding = np.broadcast_to(~real, (shape[0], real.shape[-1]))
    return np.broadcast_to(padding.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1]), shape)


def _without_sink(
    spec: Mechanism, data: CaseData, options: Mapping[str, Any], found: Expected,
    rows: Mapping[str, Sequence[int]] | None, case: Case,
) -> None:  # fmt: skip
    if "sink" in data.inputs and "LSE" in found.exact and case.direction == "forward":
        plain = {name: value for name, value in data.inputs.items() if name != "sink"}
        found.exact["LSE"] = spec.evaluate(plain, options, outputs=["LSE"], rows=rows)["LSE"]


def _mean_of_all(
    spec: Mechanism, data: CaseData, case: Case, rows: Mapping[str, Sequence[int]] | None
) -> tuple[Any, Any]:
    """The output when every key has the same weight, whatever the masks say."""
    main = next(iter(spec.outputs))
    usual = {
        name: np.zeros_like(value) if spec.inputs[name].role == "query" else value
        for name, value in data.inputs.items()
        if not spec.inputs[name].optional or spec.inputs[name].role in ("key", "value", "page_table")
    }
    sizes, resolved = spec.resolve(usual)
    exact = evaluate(spec.program, usual, resolved, sizes=sizes, outputs=[main], rows=rows)
    keys = shapes.derived(spec, case.sizes).get(shapes.roles(spec).names.get("keys", ""), 1)
    magnitudes = np.abs(next(value for name, value in usual.items() if spec.inputs[name].role == "value"))
    spread = probes.sigma(exact, main, case.dtype, keys)[main]
    # Cancellation between the values: each weight is rounded, their mean may be small.
    typical = float(magnitudes.mean()) if magnitudes.size else 0.0
    return exact[main], spread + unit_roundoff(case.dtype) * typical / math.sqrt(max(keys, 1))


def _unjudge(found: Expected, name: str, where: Any) -> None:
    shape = found.exact[name].shape
    before = found.judged.get(name, np.ones(shape, dtype=bool))
    found.judged[name] = before & ~np.broadcast_to(where, shape)


def _unjudge_gradients(spec: Mechanism, found: Expected, empty: Any) -> None:
    """Where an empty row's NaN may go: its own query, and everything of the key heads (and batch) that it reads."""
    for name, value in found.exact.items():
        decl = spec.inputs[name]
        if decl.role == "query":
            _unjudge(found, name, empty[..., None])
        elif decl.role in ("key", "value"):
            touched = empty.any(axis=-1)
            grouped = touched.reshape(touched.shape[0], value.shape[1], -1).any(axis=-1)
            _unjudge(found, name, grouped.reshape(grouped.shape + (1,) * (value.ndim - 2)))
        else:
            _unjudge(found, name, np.ones(value.shape, dtype=bool))


@functools.lru_cache(maxsize=16)
def _replaced_text(text: str, replaced: tuple[tuple[str, str], ...]) -> str:
    lines = []
    for line in text.splitlines():
        for name, body in replaced:
            if line.split("#")[0].startswith(f"{name}["):
                line = f"{line.split('=')[0]}= {body}"
        lines.append(line)
    return "\n".join(lines)


def _replaced(spec: Mechanism, program: Program, semantic: str, value: str) -> Program:
    """The equations with those of a declared difference in their place."""
    key = (id(program), semantic, value)
    if key not in _PROGRAMS:
        text = _replaced_text(program.text, tuple(semantics.EQUATIONS[semantic, value].items()))
        _PROGRAMS[key] = program, read(text, program.declarations, file=f"{spec.name} [{semantic} = {value}]")
    return _PROGRAMS[key][1]


_PROGRAMS: dict[tuple[int, str, str], tuple[Program, Program]] = {}
_CACHE: OrderedDict[str, tuple[dict[str, Any], dict[str, Any]]] = OrderedDict()


def _digest(spec: Mechanism, data: CaseData, more: Any) -> str:
    state = hashlib.sha256()
    state.update(f"{spec.name}|{id(spec.program)}|{more!r}".encode())
    for kind in (data.inputs, data.cotangents):
        for name in sorted(kind):
            array = np.ascontiguousarray(kind[name])
            state.update(f"{name}{array.shape}{array.dtype}".encode())
            state.update(array.view(np.uint8).data if array.size else b"")
    return state.hexdigest()


def _size(found: tuple[dict[str, Any], dict[str, Any]]) -> int:
    return sum(int(array.nbytes) for part in found for array in part.values())


def _remember(key: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _CACHE[key] = found
    while len(_CACHE) > 1 and sum(map(_size, _CACHE.values())) > CACHE_BYTES:
        _CACHE.popitem(last=False)


def forget() -> None:
    """Empty the cache."""
    _CACHE.clear()


def without_data(found: Expected) -> Expected:
    """The same without the inputs, small enough to travel between processes."""
    calls = [dataclasses.replace(call, data=None) for call in found.calls]
    return dataclasses.replace(found, data=None, calls=calls)
