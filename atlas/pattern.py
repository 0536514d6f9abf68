"""Who reads whom, computed from a mechanism's equations: derivatives of output rows by input positions.

`patterns` evaluates the equations in float64 at a small random call and asks, for every position of the first output
and every position of the inputs, whether the one depends on the other. It does so for the default options and for every
setting that changes the answer. Choices such as top-k are piecewise constant: a derivative sees what the chosen
branch reads. Used by the pages; needs PyTorch. A mechanism without a value input has no pattern.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance import settings, shapes, values
from attnspec.conformance.case_id import present_inputs
from attnspec.spec import Mechanism
from attnspec.spec.language import InputDecl, SpecError, static_value
from attnspec.spec.language.syntax import Name

WANTED: dict[str, int] = {
    "batch": 1, "heads": 1, "kv_heads": 1, "queries": 12, "keys": 16, "feature": 4, "value_feature": 2
}  # fmt: skip
GRID = 6
"""Side of a map, where positions are pixels."""
CHANNELS = {"heads": 8, "kv_heads": 8, "feature": 4, "value_feature": 4}
MOST = 5
"""Settings beside the default that are shown."""
NOT_SHOWN = frozenset({"mask", "dropout", "bias", "parameter", "page_table"})
"""Roles of optional inputs that get no picture: what they hide is random here, or they move the values elsewhere."""
HEADS = (1, 2, 4, 8)

Floats = np.ndarray[Any, np.dtype[np.float64]]


class NoTorchError(ValueError):
    """PyTorch is missing. One line: what needs it and how to get it."""


@dataclass(frozen=True)
class Axis:
    """One side of a picture: the tensor, its position indices and their lengths."""

    tensor: str
    indices: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.lengths, dtype=int))


@dataclass(frozen=True, eq=False)
class Pattern:
    """Row r and column c of `strength`: the size of the derivative of the output at r by the inputs at c.

    `inputs` are the names of the inputs that were moved; `options` and `given` are what differs from the default call.
    """

    rows: Axis
    columns: Axis
    strength: Floats
    inputs: tuple[str, ...]
    options: Mapping[str, Any]
    given: tuple[str, ...]

    @property
    def reads(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether the row's output depends on the column's input at all, however weakly."""
        return np.asarray(self.strength > 0)

    def same(self, other: Pattern) -> bool:
        return self.rows.lengths == other.rows.lengths and np.array_equal(self.reads, other.reads)


@dataclass(frozen=True)
class Call:
    """A small admissible call. `options` and `given` are what its setting adds to the default one."""

    sizes: Mapping[str, int]
    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    given: tuple[str, ...]


def patterns(mechanism: Mechanism, *, channels: bool = False) -> list[Pattern]:
    """The pattern of the default call, then those of settings that differ from all before.

    For each call: the first output by the values; by everything that stands at the same positions, where that reaches
    further; and by the queries, where a row depends on queries other than its own.

    Args:
        channels: along the channels instead of the positions.

    Raises:
        NoTorchError: PyTorch is not installed.
    """
    found: list[Pattern] = []
    shown = 0
    for call in _calls(mechanism, channels):
        new = [one for one in _of_call(mechanism, call, channels) if not _known(one, found)]
        found += new
        shown += bool(new) and bool(call.options or call.given)
        if shown == MOST:
            break
    return found


def pattern(mechanism: Mechanism, options: Mapping[str, Any], given: Sequence[str] = ()) -> Pattern:
    """The pattern of the first output by the values, under these options and with these optional inputs.

    Raises:
        SpecError: no small call is admissible, or no input has the role of a value.
        NoTorchError: PyTorch is not installed.
    """
    call = _call(mechanism, options, given, False)
    found = [] if call is None else _of_call(mechanism, call, False)
    if not found:
        raise SpecError("no small call of this mechanism has a pattern under these options", file=mechanism.name)
    return found[0]


def _known(one: Pattern, found: Sequence[Pattern]) -> bool:
    return any(one.same(other) for other in found if other.columns.tensor == one.columns.tensor)


def _calls(mechanism: Mechanism, channels: bool) -> Iterator[Call]:
    """The default call, then one per option that can change the result, then one per optional input but masks."""
    plain = _call(mechanism, {}, (), channels)
    if plain is None:
        return
    yield plain
    every = settings.alone(mechanism)
    random = {name for name, decl in mechanism.inputs.items() if decl.role in NOT_SHOWN}
    tried: set[tuple[str, ...]] = set()
    for setting in (*(s for s in every if s.options), *(s for s in every if not s.options)):
        if setting.names in tried or random & set(setting.inputs):
            continue
        call = _call(mechanism, setting.options, setting.inputs, channels)
        if call is not None:
            tried |= {setting.names}
            yield call


def _call(mechanism: Mechanism, options: Mapping[str, Any], given: Sequence[str], channels: bool) -> Call | None:
    """The smallest wanted call that the file's constraints allow; None: there is none."""
    present = present_inputs(mechanism, given, options)
    lengths = _lengths(mechanism)
    for heads in HEADS:
        wanted = {**WANTED, "heads": heads, "kv_heads": heads, **(CHANNELS if channels else {})}
        for other in ({**other, **lengths} for other in shapes.alternatives(wanted)):
            sizes = shapes.sizes_of(mechanism, other, present)
            if shapes.admissible(mechanism, sizes, options, present):
                full = shapes.derived(mechanism, sizes)
                drawn = values.draw(
                    mechanism, shapes.roles(mechanism), sizes=full, options=options, present=present, broadcast={},
                    values="normal", dtype="fp32", seed=0,
                )  # fmt: skip
                return Call(full, drawn, dict(options), tuple(given))
    return None


def _lengths(mechanism: Mechanism) -> dict[str, int]:
    """By size, how long the values' position axes are: those of maps, and those that no role names."""
    found: dict[str, int] = {}
    named = set(shapes.roles(mechanism).names.values())
    for decl in mechanism.inputs.values():
        for axis in _positions(mechanism, decl, _output(mechanism).axes, False) if decl.role == "value" else ():
            size = mechanism.indices[axis]
            if isinstance(size, Name) and axis in ("y", "x"):
                found[size.id] = GRID
            elif isinstance(size, Name) and size.id not in named and not _is_map(decl):
                found[size.id] = WANTED["keys"]
    return found


def _is_map(decl: InputDecl) -> bool:
    return {"y", "x"} <= set(decl.axes)


def _output(mechanism: Mechanism) -> InputDecl:
    """The first output, as a tensor with batch axes."""
    name, decl = next(iter(mechanism.outputs.items()))
    return InputDecl(name, decl.axes, batch=mechanism.batch)


def _of_call(mechanism: Mechanism, call: Call, channels: bool) -> list[Pattern]:
    output = _output(mechanism)
    by_axes: dict[tuple[str, ...], list[str]] = {}
    for name in call.inputs:
        decl = mechanism.inputs[name]
        if decl.kind == "real" and decl.role in ("value", "key", "gate", "query"):
            axes = tuple(_positions(mechanism, decl, output.axes, channels))
            if axes:
                by_axes.setdefault(axes, []).append(name)
    of_values, of_queries = [], []
    for axes, names in by_axes.items():
        value = [name for name in names if mechanism.inputs[name].role == "value"]
        if value:
            one = _pattern(mechanism, call, value, axes, channels)
            of_values.append(one)
            more = _pattern(mechanism, call, names, axes, channels) if len(names) > len(value) else one
            of_values += [] if more.same(one) else [more]
        elif not channels and all(mechanism.inputs[name].role == "query" for name in names):
            one = _pattern(mechanism, call, names, axes, channels)
            off = one.strength * (1 - np.eye(*one.reads.shape))
            of_queries += [one] if off.any() else []
    return of_values + of_queries


def _positions(mechanism: Mechanism, decl: InputDecl, of_output: tuple[str, ...], channels: bool) -> list[str]:
    """The axes of a tensor along which its positions (or its channels) lie; empty: it has none."""
    if _is_map(decl):
        # A map: its pixels, and its level where there are several. Axes as long as one of the output's are channels.
        lengths = {mechanism.indices[axis] for axis in of_output if axis not in ("y", "x")}
        found = [axis for axis in decl.axes if axis in ("y", "x") or mechanism.indices[axis] not in lengths]
    else:
        token = next((axis for axis in ("i", "j") if axis in decl.axes[1:-1] or axis == decl.axes[:1][0]), None)
        found = [token] if token else list(decl.axes[-2:-1])
    if channels:
        return [axis for axis in decl.axes if axis not in found and axis not in mechanism.batch]
    return found


def _pattern(mechanism: Mechanism, call: Call, names: Sequence[str], axes: tuple[str, ...], channels: bool) -> Pattern:
    """Derivatives of random sums over each output position by the inputs `names`, whose positions are `axes`."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise NoTorchError("the atlas draws derivatives with PyTorch; pip install 'attnspec[torch]'") from None
    output = _output(mechanism)
    positions = tuple(_positions(mechanism, output, output.axes, channels))
    every = (*output.batch, *output.axes)
    rng = np.random.default_rng(0)
    tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in call.inputs.items()}
    for name, decl in mechanism.inputs.items():
        if name in tensors and decl.kind == "real":
            tensors[name] = tensors[name].to(torch.float64)
    leaves = [tensors[name].requires_grad_(True) for name in names]
    result = mechanism.evaluate(tensors, call.options, outputs=[output.name], xp=torch)[output.name]
    rows = Axis(output.name, positions, tuple(_length(mechanism, call, axis) for axis in positions))
    columns = Axis(", ".join(names), axes, tuple(_length(mechanism, call, axis) for axis in axes))
    front = [every.index(axis) for axis in positions]
    flat = result.permute(*front, *(a for a in range(len(every)) if a not in front)).reshape(rows.size, -1)
    weights = torch.as_tensor(rng.uniform(0.5, 1.5, size=flat.shape[1]))
    strength = np.zeros((rows.size, columns.size))
    for row in range(rows.size):
        total = (flat[row] * weights).sum()
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) if total.requires_grad else []
        for name, gradient in zip(names, grads):
            if gradient is not None:
                strength[row] += _by_position(mechanism.inputs[name], axes, gradient.abs().numpy())
    return Pattern(rows, columns, strength, tuple(names), call.options, call.given)


def _by_position(decl: InputDecl, axes: tuple[str, ...], size: Floats) -> Floats:
    every = (*decl.batch, *decl.axes)
    return np.asarray(size.sum(tuple(number for number, axis in enumerate(every) if axis not in axes)).reshape(-1))


def _length(mechanism: Mechanism, call: Call, axis: str) -> int:
    return int(static_value(mechanism.indices[axis], sizes=call.sizes, options=dict(call.options)) or 0)
