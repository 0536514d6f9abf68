"""Case ids: readable, complete, and the same on every machine.

    softmax_attention/options/causal=true,window_left=3,+bias:bh/B2.H4.Hk2.N19.M23.D16.E8/normal/contiguous/bf16/forward/s0

mechanism / group[.check] / setting / sizes / values / layout[:tensor] / dtype / direction / seed. The setting lists the
options that are set and, with `+`, the optional inputs that are given beyond the usual ones, with the axes along which
they have length 1, and with `-` the usual ones that are absent; `plain` stands for none. `make` builds a case, `parse`
reads an id back, `renamed` gives a changed case its id. A text that is no id is a `CaseError` of one line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attnspec.conformance import shapes
from attnspec.conformance.types import Case, Direction, Level
from attnspec.spec.mechanism import Mechanism, load

PARTS = 9
DTYPES = ("fp32", "fp16", "bf16", "fp64")


class CaseError(ValueError):
    """A text that is no case id, or a case that the mechanism does not have. One line."""


def make(
    mechanism: Mechanism,
    group: str,
    *,
    sizes: Mapping[str, int],
    options: Mapping[str, Any] | None = None,
    inputs: Iterable[str] = (),
    absent: Iterable[str] = (),
    broadcast: Mapping[str, str] | None = None,
    values: str = "normal",
    layout: str = "contiguous",
    dtype: str = "fp32",
    direction: Direction = "forward",
    check: str = "tolerance",
    level: Level = "standard",
    seed: int = 0,
) -> Case:
    """A case with its id.

    Args:
        sizes: by class or name; the rest is filled in (see `shapes.sizes_of`).
        inputs: optional inputs that are given beyond the usual ones (naming a usual one changes nothing).
        absent: usual inputs that are not given, though the constraints would allow them.

    Raises:
        CaseError: the mechanism's constraints do not allow it.
    """
    present = present_inputs(mechanism, inputs, options or {}, absent)
    full = shapes.sizes_of(mechanism, sizes, present)
    broken = shapes.broken_constraint(mechanism, full, options or {}, present)
    if broken is not None:
        raise CaseError(f"{mechanism.name}: {broken}")
    chosen = {name: (options or {})[name] for name in mechanism.options if name in (options or {})}
    single = {
        name: "".join(axes for axes in mechanism.inputs[name].broadcast if axes in (broadcast or {}).get(name, ""))
        for name in present
        if (broadcast or {}).get(name)
    }
    case = Case(
        id="",
        mechanism=mechanism.name,
        group=group,
        level=level,
        sizes=full,
        options=chosen,
        inputs=tuple(name for name in present if mechanism.inputs[name].optional),
        values=values,
        layout=layout,
        dtype=dtype,
        direction=direction,
        check=check,
        seed=seed,
        rows=rows_of(mechanism, group, full, seed) if direction == "forward" else None,
        params=({"broadcast": single} if single else {}) | ({"absent": tuple(absent)} if absent else {}),
    )
    return dataclasses.replace(case, id=text(mechanism, case))


def present_inputs(
    mechanism: Mechanism, extra: Iterable[str], options: Mapping[str, Any], absent: Iterable[str] = ()
) -> tuple[str, ...]:
    """All inputs of a case in the file's order: the required, the usual where the constraints allow them, the extra;
    none of those that are to be absent.
    """
    listed = set(extra)
    gone = set(absent)
    if stray := sorted(gone - set(mechanism.usual)):
        known = ", ".join(mechanism.usual) or "none"
        raise CaseError(f"{mechanism.name}: {stray[0]!r} is no usual input; usual: {known}")
    stray = sorted(listed - set(mechanism.inputs))
    if stray:
        raise CaseError(f"{mechanism.name}: unknown input {stray[0]!r}; known: {', '.join(mechanism.inputs)}")
    required = {name for name, decl in mechanism.inputs.items() if not decl.optional}

    def ordered(chosen: set[str]) -> tuple[str, ...]:
        return tuple(name for name in mechanism.inputs if name in chosen)

    usual = ordered((required | listed | set(mechanism.usual)) - gone)
    bare = ordered(required | (listed - set(mechanism.usual)))
    for chosen in (usual, bare):
        sizes = shapes.sizes_of(mechanism, shapes.TINY, chosen)
        if shapes.admissible(mechanism, sizes, options, chosen):
            return chosen
    return usual


def rows_of(mechanism: Mechanism, group: str, sizes: Mapping[str, int], seed: int) -> dict[str, tuple[int, ...]] | None:
    """The sampled query rows of a long (or timed) case: both ends, tile edges, the middle, and some at random."""
    parts = shapes.roles(mechanism)
    count = sizes.get(parts.names.get("queries", ""), 0)
    if not group.startswith(("long", "bench")) or count <= 24:
        return None
    import numpy as np

    rng = np.random.default_rng([seed, count])
    edges = {0, 1, 15, 16, 63, 64, 127, 128, count // 2, count - 2, count - 1}
    some = {int(value) for value in rng.integers(0, count, 5)}
    return {parts.query_index: tuple(sorted(row for row in edges | some if 0 <= row < count))}


def text(mechanism: Mechanism, case: Case) -> str:
    """The id of a case."""
    usual = {*mechanism.usual}
    single = case.params.get("broadcast", {})
    setting = [f"{name}={_shown(value)}" for name, value in case.options.items()]
    setting += [
        f"+{name}" + (f":{single[name]}" if single.get(name) else "") for name in case.inputs if name not in usual
    ]
    setting += [f"-{name}" for name in mechanism.usual if name in case.params.get("absent", ())]
    group = case.group if case.check == "tolerance" else f"{case.group}.{case.check}"
    sizes = ".".join(f"{name}{value}" for name, value in case.sizes.items())
    return "/".join(
        (
            case.mechanism, group, ",".join(setting) or "plain", sizes, case.values, case.layout, case.dtype,
            case.direction, f"s{case.seed}",
        )
    )  # fmt: skip


def renamed(case: Case, mechanism: Mechanism | None = None) -> Case | None:
    """The case with the id, rows and inputs that follow from its other fields; None where there is no such case."""
    spec = mechanism or load(case.mechanism)
    names = [name for name in case.inputs if name in spec.inputs]
    absent = case.params.get("absent", ())
    try:
        return make(
            spec, case.group, sizes=case.sizes, options=case.options, inputs=names, absent=absent,
            broadcast=case.params.get("broadcast"), values=case.values, layout=case.layout, dtype=case.dtype,
            direction=case.direction, check=case.check, level=case.level, seed=case.seed,
        )  # fmt: skip
    except CaseError:
        return None


def parse(identifier: str, mechanism: Mechanism | None = None) -> Case:
    """The case behind an id.

    Raises:
        CaseError: the text is no id of a case; the message names the part that is wrong.
    """
    parts = identifier.strip().split("/")
    if len(parts) != PARTS:
        raise CaseError(
            f"{identifier!r} is no case id: expected {PARTS} parts "
            f"(mechanism/group/setting/sizes/values/layout/dtype/direction/seed), got {len(parts)}"
        )
    name, group, setting, sizes, values, layout, dtype, direction, seed = parts
    spec = mechanism or load(name)
    if spec.name != name:
        raise CaseError(f"case id {identifier!r} is of {name}, not of {spec.name}")
    if dtype not in DTYPES:
        raise CaseError(f"case id: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if direction not in ("forward", "backward"):
        raise CaseError(f"case id: unknown direction {direction!r}; known: forward, backward")
    if not re.fullmatch(r"s\d+", seed):
        raise CaseError(f"case id: the seed is {seed!r}, expected s and a number")
    options, inputs, absent, broadcast = _setting(spec, setting)
    group, _, check = group.partition(".")
    return make(
        spec, group, sizes=_sizes(spec, sizes), options=options, inputs=inputs, absent=absent, broadcast=broadcast,
        values=values, layout=layout, dtype=dtype, direction="forward" if direction == "forward" else "backward",
        check=check or "tolerance", seed=int(seed[1:]),
    )  # fmt: skip


def _setting(mechanism: Mechanism, setting: str) -> tuple[dict[str, Any], list[str], list[str], dict[str, str]]:
    options: dict[str, Any] = {}
    inputs: list[str] = []
    absent: list[str] = []
    broadcast: dict[str, str] = {}
    for entry in setting.split(",") if setting != "plain" else []:
        if entry.startswith("+"):
            name, _, single = entry[1:].partition(":")
            if name not in mechanism.inputs:
                raise CaseError(f"case id: unknown input {name!r} of {mechanism.name}")
            inputs.append(name)
            if single:
                broadcast[name] = single
            continue
        if entry.startswith("-"):
            absent.append(entry[1:])
            continue
        name, equals, value = entry.partition("=")
        if not equals or name not in mechanism.options:
            raise CaseError(f"case id: {entry!r} in the setting is no option of {mechanism.name}")
        options[name] = _read(mechanism, name, value)
    return options, inputs, absent, broadcast


def _sizes(mechanism: Mechanism, sizes: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in sizes.split("."):
        match = re.fullmatch(r"([A-Za-z_]+)(\d+)", entry)
        if match is None or match.group(1) not in mechanism.sizes:
            raise CaseError(f"case id: {entry!r} is no size of {mechanism.name} (known: {', '.join(mechanism.sizes)})")
        found[match.group(1)] = int(match.group(2))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _read(mechanism: Mechanism, name: str, value: str) -> Any:
    kind = mechanism.options[name].type
    try:
        if value == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[value]
        if kind == "enum":
            return value
        return int(value) if kind == "int" else float(value)
    except (KeyError, ValueError):
        raise CaseError(f"case id: {name}={value} is no value of type {kind}") from None
