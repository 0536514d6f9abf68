"""Settings of cases: each option value that matters, with what it needs beside it, and pairs of settings.

A `Setting` is a bundle of option values and optional inputs. `alone` finds, for every option value and every optional
input, the smallest bundle in which the constraints allow it and in which it changes the result: that top-left alignment
needs a causal mask, that dropout needs its mask and that a page table needs pages is found by evaluating the equations
at a tiny size, not by a list. `pairs` merges compatible settings so that every two of them meet. Used by `cases`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnspec.conformance import shapes, values
from attnspec.spec.language import SpecError
from attnspec.spec.language.syntax import OptionDecl
from attnspec.spec.mechanism import Mechanism

PROBE_SIZE: dict[str, int] = {
    "batch": 2, "heads": 2, "kv_heads": 1, "queries": 11, "keys": 17, "feature": 4, "value_feature": 3
}  # fmt: skip
MATTERS = 1e-6


@dataclass(frozen=True)
class Setting:
    """Option values, optional inputs beyond the usual ones, and usual ones that are `absent`.

    `names` are those that it stands for.
    """

    names: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def within(self, known: frozenset[str]) -> bool:
        """Whether it uses only these inputs and options."""
        return set(self.options) <= known and set(self.inputs) <= known


PLAIN = Setting(())


def option_values(decl: OptionDecl, level: str, turn: int = 0) -> list[Any]:
    """Values of an option that are not its default, the most telling first.

    Args:
        turn: the option's number among the integer options: their first values differ, so that a mix-up shows.
    """
    found: list[Any]
    if decl.type == "bool":
        return [not decl.default]
    if decl.type == "enum":
        return [choice for choice in decl.choices if choice != decl.default]
    if decl.type == "int":
        found = [(3, 2, 5, 4)[turn % 4], 0, 8] if decl.nullable else [2]
        found += [1, 6, 100] if level == "exhaustive" else []
    elif decl.formula is not None:
        found = [0.3, -0.5, 0.0] + ([1.0, 2.5] if level == "exhaustive" else [])
    elif decl.nullable:
        found = [1.5] + ([0.5, 30.0] if level == "exhaustive" else [])
        found += [-0.5] + ([-2.0] if level == "exhaustive" else []) if decl.maximum == 0 else []
    else:
        found = [0.25]
    low = decl.minimum if decl.minimum is not None else -np.inf
    high = decl.maximum if decl.maximum is not None else np.inf
    allowed = [value for value in found if low <= value <= high and value != decl.default]
    return allowed or [value for value in (decl.minimum, decl.maximum) if value not in (None, decl.default)]


@shapes.per_mechanism
def alone(mechanism: Mechanism, level: str = "standard") -> tuple[Setting, ...]:
    """One setting for every option value, every optional input that is not usual, and the lack of those that are."""
    found: list[Setting] = []
    for name, decl in mechanism.inputs.items():
        if decl.optional and name not in mechanism.usual and not any(name in setting.inputs for setting in found):
            setting = _for_input(mechanism, name)
            if setting is not None:
                found.append(setting)
    for name, option in mechanism.options.items():
        for value in option_values(option, level, _turn(mechanism, name)):
            setting = _for_option(mechanism, name, value)
            if setting is not None:
                found.append(setting)
    for name in mechanism.usual:
        if not any(name in setting.absent for setting in found):
            setting = _without(mechanism, name)
            if setting is not None:
                found.append(setting)
    return tuple(found)


def _turn(mechanism: Mechanism, name: str) -> int:
    numbers = [other for other, decl in mechanism.options.items() if decl.type == "int"]
    return numbers.index(name) if name in numbers else 0


def _for_input(mechanism: Mechanism, name: str) -> Setting | None:
    """The fewest inputs beside this one that the constraints ask for; a lengths input where pages need one."""
    optional = [other for other, decl in mechanism.inputs.items() if decl.optional and other != name]
    optional = [other for other in optional if other not in mechanism.usual]
    for count in range(6):
        for others in itertools.combinations(optional, count):
            chosen = (name, *others)
            if _allowed(mechanism, {}, chosen):
                extra = _with_lengths(mechanism, chosen)
                ordered = tuple(entry for entry in mechanism.inputs if entry in (*chosen, *extra))
                return Setting(ordered, {}, ordered)
    return None


def _without(mechanism: Mechanism, name: str) -> Setting | None:
    """The fewest usual inputs that the constraints allow to lack together with this one."""
    others = [other for other in mechanism.usual if other != name]
    for count in range(len(others) + 1):
        for more in itertools.combinations(others, count):
            gone = tuple(entry for entry in mechanism.usual if entry in (name, *more))
            if _allowed(mechanism, {}, (), gone):
                return Setting(tuple(f"-{entry}" for entry in gone), absent=gone)
    return None


def _with_lengths(mechanism: Mechanism, chosen: Sequence[str]) -> tuple[str, ...]:
    """A page table is only put to the test with lengths that leave slots unused."""
    if not any(mechanism.inputs[name].role == "page_table" for name in chosen):
        return ()
    key = shapes.roles(mechanism).names.get("keys", "")
    lengths = [
        name for name, decl in mechanism.inputs.items() if decl.role == "length" and decl.domain.rstrip().endswith(key)
    ]
    return next(((name,) for name in lengths if _allowed(mechanism, {}, (*chosen, name))), ())


def _for_option(mechanism: Mechanism, name: str, value: Any) -> Setting | None:
    """The fewest other settings beside this value with which it changes the result; None: it never does."""
    for others in _companions(mechanism, name):
        options = {**others.options, name: value}
        if not _allowed(mechanism, options, others.inputs):
            continue
        rest = others.options
        if not _allowed(mechanism, rest, others.inputs):
            continue
        if _differ(mechanism, options, rest, others.inputs):
            ordered = {entry: options[entry] for entry in mechanism.options if entry in options}
            return Setting((name,), ordered, others.inputs)
    return None


def _companions(mechanism: Mechanism, name: str) -> Iterable[Setting]:
    yield PLAIN
    single = list(_single_companions(mechanism, name))
    yield from single
    for one, two in itertools.combinations(single, 2):
        if not set(one.options) & set(two.options):
            yield Setting((), {**one.options, **two.options}, (*one.inputs, *two.inputs))


def _single_companions(mechanism: Mechanism, name: str) -> Iterable[Setting]:
    for other, decl in mechanism.options.items():
        if other != name:
            found = option_values(decl, "standard", _turn(mechanism, other))
            yield from (Setting((), {other: value}) for value in (found if decl.type == "enum" else found[:1]))
    for other, declared in mechanism.inputs.items():
        setting = _for_input(mechanism, other) if declared.optional and other not in mechanism.usual else None
        if setting is not None:
            yield Setting((), {}, setting.inputs)


def _present(mechanism: Mechanism, inputs: Sequence[str]) -> tuple[str, ...]:
    from attnspec.conformance.case_id import present_inputs

    return present_inputs(mechanism, inputs, {})


def _allowed(
    mechanism: Mechanism, options: Mapping[str, Any], inputs: Sequence[str], absent: Sequence[str] = ()
) -> bool:
    from attnspec.conformance.case_id import present_inputs

    return _probe_sizes(mechanism, options, present_inputs(mechanism, inputs, options, absent)) is not None


def _probe_sizes(
    mechanism: Mechanism, options: Mapping[str, Any], present: Sequence[str]
) -> dict[str, int] | None:  # fmt: skip
    """Small sizes that the constraints allow; None: there are none."""
    for wanted in shapes.alternatives(PROBE_SIZE):
        sizes = shapes.sizes_of(mechanism, wanted, present)
        if shapes.admissible(mechanism, sizes, options, present):
            return sizes
    return None


def _differ(mechanism: Mechanism, options: Mapping[str, Any], rest: Mapping[str, Any], inputs: Sequence[str]) -> bool:
    present = _present(mechanism, inputs)
    sizes = next(
        (
            found for found in (_probe_sizes(mechanism, each, present) for each in ({**rest, **options}, rest))
            if found is not None and all(shapes.admissible(mechanism, found, each, present) for each in (options, rest))
        ),
        None,
    )  # fmt: skip
    if sizes is None:
        return False
    arrays = values.draw(
        mechanism, shapes.roles(mechanism), sizes=shapes.derived(mechanism, sizes), options=options, present=present,
        broadcast={}, values="normal", dtype="fp32", seed=0,
    )  # fmt: skip
    try:
        one, two = (mechanism.evaluate(arrays, chosen) for chosen in (options, rest))
    except SpecError:
        return False
    return any(not np.allclose(one[name], two[name], rtol=MATTERS, atol=MATTERS, equal_nan=True) for name in one)


def pairs(mechanism: Mechanism, settings: Sequence[Setting], width: int, most: int) -> list[Setting]:
    """Merged settings in which every two compatible settings meet at least once (greedily; at most `most` of them).

    Args:
        width: how many settings one merged setting may hold.
    """
    open_pairs = {
        (one, two)
        for one, two in itertools.combinations(range(len(settings)), 2)
        if merged(mechanism, [settings[one], settings[two]]) is not None
    }
    found: list[Setting] = []
    while open_pairs and len(found) < most:
        first = min(open_pairs)
        chosen = list(first)
        together = merged(mechanism, [settings[entry] for entry in chosen])
        while len(chosen) < width:
            gains = []
            for other in range(len(settings)):
                if other in chosen:
                    continue
                gain = sum((min(other, entry), max(other, entry)) in open_pairs for entry in chosen)
                if gain:
                    gains.append((-gain, other))
            added = False
            for _, other in sorted(gains):
                wider = merged(mechanism, [settings[entry] for entry in (*chosen, other)])
                if wider is not None:
                    chosen.append(other)
                    together, added = wider, True
                    break
            if not added:
                break
        open_pairs -= set(itertools.combinations(sorted(chosen), 2))
        if together is not None:
            found.append(together)
    return found


def merged(mechanism: Mechanism, settings: Sequence[Setting]) -> Setting | None:
    """The settings together; None where they contradict each other or the constraints forbid it."""
    options: dict[str, Any] = {}
    for setting in settings:
        for name, value in setting.options.items():
            if options.get(name, value) != value or (name in options and type(options[name]) is not type(value)):
                return None
            options[name] = value
    names = tuple(dict.fromkeys(name for setting in settings for name in setting.names))
    if len(names) < len({setting.names for setting in settings}):
        return None
    inputs = tuple(name for name in mechanism.inputs if any(name in setting.inputs for setting in settings))
    absent = tuple(name for name in mechanism.usual if any(name in setting.absent for setting in settings))
    allowed = not set(absent) & set(inputs) and _allowed(mechanism, options, inputs, absent)
    return Setting(names, options, inputs, absent) if allowed else None
