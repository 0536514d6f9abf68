"""The second call of a law that relates two mechanisms: inputs built by equations, outputs read under other axes.

A law with `mechanism = "other"` says that one mechanism is a special case of another. The other's inputs are defined by
equations in the first mechanism's indices; its outputs enter the law's `equal` lines with axes of their own lengths.
Used by `laws`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from attnspec.spec.language import Declarations, InputDecl, OutputDecl, SpecError, read, read_expression
from attnspec.spec.language.syntax import Node

if TYPE_CHECKING:
    from attnspec.spec.laws import Evaluator, Trial

_LEFT = re.compile(r"^\s*(\w+?)_\s*(?:\[([^\]]*)\])?\s*=", re.MULTILINE)


def second_call(trial: Trial, evaluator: Evaluator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and options of the call of the other mechanism.

    Raises:
        SpecError: `other` defines what is no input there, or batch axes that do not correspond.
    """
    law, mechanism, target = trial.law, trial.mechanism, trial.target
    sizes, resolved = mechanism.resolve(trial.inputs, trial.options)
    free = {name: size for name, size in sizes.items() if mechanism.sizes[name].value is None}
    given = {name: value for name, value in resolved.items() if value is not None}
    options: dict[str, Any] = {}
    for name, value in law.other_options.items():
        if name not in target.options:
            raise SpecError(f"law {law.name!r}: {target.name} has no option {name!r}", file=mechanism.name)
        if isinstance(value, str) and value not in target.options[name].choices:
            options[name] = trial.static(value, free, resolved, evaluator)
        else:
            options[name] = value
    context = {**trial.inputs, **trial.extra, **trial.definitions(law.other)}
    used = {name: value for name, value in context.items() if re.search(rf"(?<!\w){name}(?!\w)", law.other)}
    values = evaluator(_program(trial, list(used)), used, given, sizes=free)
    inputs = {}
    for name, value in values.items():
        decl = target.inputs[name.removesuffix("_")]
        array = np.asarray(value)
        if not decl.batch:
            # What the other's input does not have along the batch is the same for all of it.
            array = array[(0,) * len(mechanism.batch)]
        elif len(decl.batch) != len(mechanism.batch):
            raise SpecError(f"law {law.name!r}: {name} has other batch axes in {target.name}", file=mechanism.name)
        if array.dtype.kind != "O":
            array = array.astype({"real": np.float64, "int": np.int64, "bool": bool}[decl.kind])
        inputs[decl.name] = array
    return inputs, options


def _program(trial: Trial, used: list[str]) -> Any:
    law, mechanism, target = trial.law, trial.mechanism, trial.target
    base = mechanism.declarations
    outputs = {}
    for name, axes in _LEFT.findall(law.other):
        if name not in target.inputs:
            raise SpecError(
                f"law {law.name!r}: `other` defines {name}_, which is no input of {target.name}", file=mechanism.name
            )
        outputs[f"{name}_"] = OutputDecl(f"{name}_", tuple(axis.strip() for axis in axes.split(",") if axis.strip()))
    indices = {**base.indices, **{name: read_expression(text) for name, text in law.indices.items()}}
    inputs = {name: trial.context_decl(name) for name in used}
    declarations = Declarations(base.sizes, indices, inputs, base.options, outputs, base.batch)
    return read(law.other, declarations, file=f"{mechanism.name} [{law.name}.other]")


def is_output(trial: Trial, name: str) -> bool:
    """Whether a name in the law's equations is an output of the other mechanism."""
    return bool(trial.law.mechanism) and name.endswith("_") and name.removesuffix("_") in trial.target.outputs


def output_decl(trial: Trial, name: str, value: Any, indices: dict[str, Node]) -> InputDecl:
    """The declaration of an output of the other mechanism; its axes are added to `indices`."""
    batch = trial.mechanism.batch if trial.target.batch else ()
    shape = np.shape(value)[len(batch) :]
    axes = tuple(f"{name.lower()}axis{place}" for place in range(len(shape)))
    indices.update({axis: read_expression(str(length)) for axis, length in zip(axes, shape, strict=True)})
    return InputDecl(name, axes, batch=batch)
