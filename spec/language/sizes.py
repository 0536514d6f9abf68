"""Sizes from the shapes of inputs, and options with their defaults: what a call fixes before evaluation.

Used by `evaluate` and by `Mechanism.resolve`. It refuses unknown, missing and ill-typed arguments and shapes
that contradict each other, naming the argument and the axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attnspec.spec.language.errors import EvaluationError
from attnspec.spec.language.static import static_value
from attnspec.spec.language.syntax import Declarations, InputDecl, Name, Node, OptionDecl
from attnspec.spec.language.text import near


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array or of a plain number."""
    return tuple(int(n) for n in getattr(value, "shape", ()))


def index_size(declarations: Declarations, axis: str) -> Node:
    """The size of an index; a batch axis that is not declared as an index has a size of its own name."""
    return declarations.indices.get(axis, Name(axis))


def infer_sizes(
    declarations: Declarations,
    inputs: Mapping[str, Any],
    sizes: Mapping[str, int] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    file: str = "<text>",
) -> dict[str, int]:
    """The sizes that shapes and `sizes` determine, derived sizes included; undetermined ones are left out.

    Raises:
        EvaluationError: an unknown or missing input, a wrong number of axes, or lengths that contradict each
        other.
    """
    found: dict[str, int] = {}
    source: dict[str, str] = {}
    for name, value in (sizes or {}).items():
        if name not in declarations.sizes and name not in declarations.batch:
            raise EvaluationError(f"unknown size '{name}'{near(name, declarations.sizes)}", file=file)
        found[name], source[name] = int(value), "sizes="
    for name in inputs:
        if name not in declarations.inputs:
            raise EvaluationError(f"unknown input '{name}'{near(name, declarations.inputs)}", file=file)
    loose: dict[str, str] = {}
    other: list[tuple[InputDecl, str, int, Node]] = []
    for decl in declarations.inputs.values():
        if decl.name not in inputs:
            if not decl.optional:
                raise EvaluationError(f"input '{decl.name}' is missing", file=file)
            continue
        shape, axes = shape_of(inputs[decl.name]), (*decl.batch, *decl.axes)
        if len(shape) != len(axes):
            raise EvaluationError(
                f"input '{decl.name}' has shape {shape}, expected {len(axes)} axes [{','.join(axes)}]",
                file=file,
            )
        for axis, length in zip(axes, shape):
            size = index_size(declarations, axis)
            if length == 1 and axis in decl.broadcast:
                if isinstance(size, Name):
                    loose.setdefault(size.id, decl.name)
            elif isinstance(size, Name):
                if found.setdefault(size.id, length) != length:
                    raise EvaluationError(
                        f"input '{decl.name}' has length {length} along axis '{axis}', but {size.id} = "
                        f"{found[size.id]} from {source[size.id]}",
                        file=file,
                    )
                source.setdefault(size.id, f"input '{decl.name}'")
            else:
                other.append((decl, axis, length, size))
    present = frozenset(inputs) | {name for name, value in (options or {}).items() if value is not None}
    _derive(declarations, found, source, options or {}, present, file)
    for name in loose:
        found.setdefault(name, 1)
    _derive(declarations, found, source, options or {}, present, file)
    for decl, axis, length, size in other:
        wanted = static_value(size, sizes=found, options=options, present=present, file=file)
        if wanted is not None and wanted != length:
            raise EvaluationError(
                f"input '{decl.name}' has length {length} along axis '{axis}', expected {wanted}", file=file
            )
    for name, length in found.items():
        minimum = declarations.sizes[name].minimum if name in declarations.sizes else 0
        if length < minimum:
            raise EvaluationError(
                f"size {name} = {length} from {source.get(name, 'inputs')} is below its minimum {minimum}",
                file=file,
            )
    return found


def _derive(
    declarations: Declarations,
    found: dict[str, int],
    source: dict[str, str],
    options: Mapping[str, Any],
    present: frozenset[str],
    file: str,
) -> None:
    """Adds derived sizes, and checks those that shapes bind as well."""
    for _ in range(len(declarations.sizes)):
        changed = False
        for decl in declarations.sizes.values():
            if decl.value is None:
                continue
            value = static_value(decl.value, sizes=found, options=options, present=present, file=file)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise EvaluationError(f"derived size {decl.name} = {value!r} is no integer", file=file)
            if decl.name not in found:
                found[decl.name], source[decl.name] = value, "its formula"
                changed = True
            elif found[decl.name] != value:
                raise EvaluationError(
                    f"size {decl.name} = {found[decl.name]} from {source[decl.name]}, but its formula gives {value}",
                    file=file,
                )
        if not changed:
            return


def resolve_options(
    declarations: Declarations,
    options: Mapping[str, Any] | None,
    sizes: Mapping[str, int],
    *,
    file: str = "<text>",
) -> dict[str, Any]:
    """Every option's value: as given (checked), its default, its formula's value, or None where it is absent.

    Raises:
        EvaluationError: an unknown option, a missing one without default, a wrong type or a value out of
        range.
    """
    given = dict(options or {})
    for name in given:
        if name not in declarations.options:
            raise EvaluationError(f"unknown option '{name}'{near(name, declarations.options)}", file=file)
    resolved: dict[str, Any] = {}
    for decl in declarations.options.values():
        if given.get(decl.name) is not None:
            resolved[decl.name] = _typed(decl, given[decl.name], file)
            continue
        value: Any = decl.default if decl.name not in given or decl.formula is None else None
        if decl.formula is not None and not (decl.name in given and decl.nullable):
            value = static_value(decl.formula, sizes=sizes, file=file)
            if value is None:
                resolved[decl.name] = None
                continue
        if value is None:
            if not decl.nullable and decl.formula is None:
                what = "cannot be None" if decl.name in given else "is missing and has no default"
                raise EvaluationError(f"option '{decl.name}' {what}", file=file)
            resolved[decl.name] = None
        elif decl.name in given and not decl.nullable and decl.formula is None:
            raise EvaluationError(f"option '{decl.name}' cannot be None", file=file)
        elif decl.name in given and decl.nullable:
            resolved[decl.name] = None
        else:
            resolved[decl.name] = _typed(decl, value, file)
    return resolved


def _typed(decl: OptionDecl, value: Any, file: str) -> int | float | bool | str:
    if hasattr(value, "item") and shape_of(value) == ():
        value = value.item()
    shown = repr(value)[:60]
    if decl.type == "enum":
        if value not in decl.choices:
            raise EvaluationError(
                f"option '{decl.name}' is {shown}, expected one of {', '.join(decl.choices)}"
                f"{near(str(value)[:60], decl.choices)}",
                file=file,
            )
        return str(value)
    if decl.type == "bool":
        if not isinstance(value, bool):
            raise EvaluationError(f"option '{decl.name}' is {shown}, expected True or False", file=file)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"option '{decl.name}' is {shown}, expected a number of type {decl.type}", file=file)
    if decl.type == "int":
        if isinstance(value, float):
            if not value.is_integer():
                raise EvaluationError(f"option '{decl.name}' is {shown}, expected an integer", file=file)
            value = int(value)
    else:
        value = float(value)
    number: int | float = value
    if (
        math.isnan(value)
        or (decl.minimum is not None and value < decl.minimum)
        or (decl.maximum is not None and value > decl.maximum)
    ):
        low = "-inf" if decl.minimum is None else f"{decl.minimum:g}"
        high = "inf" if decl.maximum is None else f"{decl.maximum:g}"
        raise EvaluationError(f"option '{decl.name}' is {shown}, expected a value from {low} to {high}", file=file)
    return number
