"""`evaluate`: from arrays and options to the outputs' arrays.

It binds sizes and options, converts inputs, runs the evaluator (`arrays`) for the outputs that are wanted and
the rows that are wanted, and lays the results out as declared. Bad arguments give one clear EvaluationError
each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnspec.spec.language.arithmetic import EXACT, SAMPLES, Arithmetic
from attnspec.spec.language.arrays import Evaluator
from attnspec.spec.language.backend import Backend, backend_for
from attnspec.spec.language.check import left_indices
from attnspec.spec.language.errors import EvaluationError
from attnspec.spec.language.macros import subexpressions
from attnspec.spec.language.named import Named, expanded
from attnspec.spec.language.scope import Domain, Scope
from attnspec.spec.language.sizes import index_size, infer_sizes, resolve_options, shape_of
from attnspec.spec.language.static import Setting, plan_for, static_value
from attnspec.spec.language.syntax import Bool, InputDecl, Name, Num, Program, Ref
from attnspec.spec.language.text import near


def evaluate(
    program: Program,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    outputs: Sequence[str] | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
    xp: Any = None,
    arithmetic: Arithmetic = EXACT,
    intermediates: bool = False,
) -> dict[str, Any]:
    """Evaluate equations on arrays.

    Args:
        program: checked equations.
        inputs: name -> array of shape [batch axes that the input declares..., its axes...]; None means
        absent.
        options: name -> value; the others take their defaults.
        sizes: sizes that no shape determines.
        outputs: names of definitions to return; default all declared outputs.
        rows: index -> values; outputs hold only these values along that index (an output or batch axis), and
            intermediates are computed only as far as these need them.
        xp: array namespace: NumPy (default; float64) or torch (float64, with autograd), or another that
            follows the Python array API standard.
        arithmetic: hook that disturbs the arithmetic (see `arithmetic`).
        intermediates: also return every definition that was computed in full or is a constant.

    Returns:
        name -> array of shape [batch axes..., axes...], with a leading sample axis when the arithmetic adds
        one.

    Raises:
        EvaluationError: inputs, sizes or options that do not fit, or a gather outside its tensor.
    """
    with np.errstate(all="ignore"):
        given = {name: value for name, value in inputs.items() if value is not None}
        file, declarations = program.file, program.declarations
        found = infer_sizes(declarations, given, sizes, options=options, file=file)
        resolved = resolve_options(declarations, options, found, file=file)
        present = frozenset(given) | {name for name, value in resolved.items() if value is not None}
        wanted = _wanted(program, outputs)
        backend = backend_for(xp, list(given.values()))
        picks = _rows(program, wanted, rows, found)
        named = {name: _input(backend, declarations.inputs[name], value, picks, file) for name, value in given.items()}
        plan = plan_for(program, Setting(found, resolved, present))
        evaluator = Evaluator(plan, named, backend, arithmetic)
        try:
            if not any(axis not in declarations.batch for axis in picks):
                _in_order(evaluator, wanted, keep=intermediates)
            results: dict[str, Any] = {}
            held = [value.array for value in named.values()]
            for name in wanted:
                results[name] = backend.own(_output(evaluator, name, picks, found), held)
                held.append(results[name])
            if intermediates:
                for name in program.order:
                    known = (name, _full(evaluator, name)) in evaluator.done or name in evaluator.scanned
                    known = known or isinstance(plan.bodies[name], Num | Bool)
                    if name not in results and known:
                        results[name] = backend.own(_output(evaluator, name, picks, found), held)
                        held.append(results[name])
            return results
        except RecursionError:
            raise EvaluationError(
                "definitions depend on each other too deeply to be evaluated row by row", file=file
            ) from None


def _wanted(program: Program, outputs: Sequence[str] | None) -> list[str]:
    if outputs is None:
        return list(program.declarations.outputs)
    if isinstance(outputs, str):
        outputs = [outputs]
    for name in outputs:
        if name not in program.definitions:
            raise EvaluationError(f"unknown output '{name}'{near(name, program.definitions)}", file=program.file)
    return list(outputs)


def _axes(program: Program, name: str) -> tuple[str, ...]:
    """The axes of a result in order: as the output declares them, or as on the definition's left side."""
    output = program.declarations.outputs.get(name)
    return output.axes if output is not None else left_indices(program.definitions[name])


def _rows(
    program: Program,
    wanted: Sequence[str],
    rows: Mapping[str, Sequence[int]] | None,
    sizes: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """The checked row restriction."""
    picks: dict[str, tuple[int, ...]] = {}
    declarations, file = program.declarations, program.file
    for index, values in (rows or {}).items():
        if index not in declarations.indices and index not in declarations.batch:
            raise EvaluationError(
                f"rows name '{index}', which is no index{near(index, declarations.indices)}", file=file
            )
        if index not in declarations.batch and not any(index in _axes(program, name) for name in wanted):
            raise EvaluationError(f"rows name '{index}', which is no axis of {', '.join(wanted)}", file=file)
        size = static_value(index_size(declarations, index), sizes=sizes, file=file)
        picked = tuple(int(value) for value in values)
        outside = [value for value in picked if isinstance(size, int) and not 0 <= value < size]
        if outside:
            raise EvaluationError(f"rows of '{index}' hold {outside[0]}, outside 0..{int(size or 0) - 1}", file=file)
        picks[index] = picked
    return picks


def _input(backend: Backend, decl: InputDecl, value: Any, picks: Mapping[str, tuple[int, ...]], file: str) -> Named:
    """An input as a named array; axes along which it is broadcast are dropped, batch axes restricted to rows."""
    _check_kind(decl, value, file)
    array = backend.asarray(value, decl.kind)
    axes: list[str] = []
    cut: list[int | slice] = []
    for axis, length in zip((*decl.batch, *decl.axes), shape_of(array)):
        if length == 1 and axis in decl.broadcast:
            cut.append(0)
        else:
            cut.append(slice(None))
            axes.append(axis)
    if len(axes) < len(cut):
        array = array[tuple(cut)]
    for axis in decl.batch:
        if axis in picks and axis in axes:
            array = backend.take(array, picks[axis], axes.index(axis))
    return Named(array, tuple(axes))


def _check_kind(decl: InputDecl, value: Any, file: str) -> None:
    """Refuses what would have to be cast: a mask of numbers could as well be additive, an id of 1.5 is none."""
    dtype = str(getattr(value, "dtype", None) or np.asarray(value).dtype)
    kind = "bool" if "bool" in dtype else "int" if "int" in dtype else "real" if "float" in dtype else "other"
    fits = kind == decl.kind or (decl.kind == "real" and kind in ("int", "bool"))
    if not fits:
        wanted = {"real": "real numbers", "int": "integers", "bool": "booleans (True and False)"}[decl.kind]
        raise EvaluationError(f"input '{decl.name}' has dtype {dtype}, expected {wanted}", file=file)


def _uses(evaluator: Evaluator, wanted: Sequence[str]) -> dict[str, set[str]]:
    """The definitions that the wanted ones need after folding, each with those that it uses itself."""
    program, plan = evaluator.program, evaluator.plan
    uses: dict[str, set[str]] = {}
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name in uses:
            continue
        uses[name] = set()
        bodies = [plan.bodies[name], *([plan.edges[name]] if name in plan.edges else [])]
        for body in bodies:
            for node in () if isinstance(body, EvaluationError) else subexpressions(body):
                used = node.name if isinstance(node, Ref) else node.id if isinstance(node, Name) else ""
                if used in program.definitions:
                    uses[name].add(used)
        todo.extend(uses[name])
    return uses


def _in_order(evaluator: Evaluator, wanted: Sequence[str], keep: bool) -> None:
    """Computes what is needed in full, each definition after those it uses, so that chains of any length do.

    Unless `keep`, a definition is forgotten after its last use, which bounds the peak memory.
    """
    uses = _uses(evaluator, wanted)
    users = Counter(used for name in uses for used in uses[name])
    users.update(wanted)
    for name in evaluator.program.order:
        if name not in uses or name in evaluator.scans:
            continue
        evaluator.tensor(name, _full(evaluator, name))
        for used in uses[name]:
            users[used] -= 1
            if not users[used] and not keep:
                evaluator.done.pop((used, _full(evaluator, used)), None)


def _full(evaluator: Evaluator, name: str) -> tuple[Domain, ...]:
    return (None,) * len(evaluator.program.definitions[name].subscripts)


def _output(evaluator: Evaluator, name: str, picks: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> Any:
    """A definition laid out as [samples, batch axes..., axes...]."""
    program, backend = evaluator.program, evaluator.backend
    declarations = program.declarations
    left = left_indices(program.definitions[name])
    domains: dict[str, Domain] = {}
    for axis in left:
        values = tuple(sorted(set(picks[axis]))) if axis in picks else None
        full = values is not None and values == tuple(range(evaluator.size(axis)))
        domains[axis] = None if full else values
    if name in evaluator.scans:
        value = evaluator.value(Ref(name, tuple(Name(axis) for axis in left)), Scope(domains))
    else:
        value = evaluator.tensor(name, tuple(domains[axis] for axis in left))
    lengths: dict[str, int] = value.lengths()
    axes: list[str] = [SAMPLES] if SAMPLES in lengths else []
    for axis in declarations.batch:
        size = static_value(index_size(declarations, axis), sizes=sizes, file=program.file)
        axes.append(axis)
        lengths.setdefault(axis, len(picks[axis]) if axis in picks else size if isinstance(size, int) else 1)
    for axis in _axes(program, name):
        domain = domains[axis]
        axes.append(axis)
        lengths.setdefault(axis, evaluator.size(axis) if domain is None else len(domain))
    array = expanded(backend, value, axes, lengths)
    for axis in left:
        if axis in picks and picks[axis] != (domains[axis] or tuple(range(evaluator.size(axis)))):
            domain = domains[axis] or tuple(range(evaluator.size(axis)))
            order = [domain.index(row) for row in picks[axis]]
            array = backend.take(array, order, axes.index(axis))
    return array
