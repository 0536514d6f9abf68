"""From a mechanism's names to a function's parameters, and from what it returns to the mechanism's outputs.

`bind` matches by name, ignoring case, with the aliases of `aliases`; the worker calls through the resulting
`Binding`. A required parameter that stands for nothing known is a `CandidateError`. An input or option that
the function does not take is named with its reason in the signature; it is never dropped in silence:
`missing` says why a case cannot be posed to this candidate.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnspec.conformance.aliases import ALIASES, ENABLE_GQA, MASK_OR_BIAS, SPECIAL, WINDOW
from attnspec.conformance.candidate import Candidate, CandidateError
from attnspec.conformance.interface import Interface, OptionFace
from attnspec.conformance.types import CandidateSignature

UNSET = inspect.Parameter.empty
CANONICAL = "bhid"


@dataclass(frozen=True)
class Slot:
    """One parameter of the function and what goes into it.

    `target` is the name of an input or option, or one of the special targets; `default` is the parameter's
    own.
    """

    parameter: str
    target: str
    default: Any
    positional_only: bool

    @property
    def required(self) -> bool:
        return self.default is UNSET


@dataclass(frozen=True)
class Binding:
    """A candidate, the mechanism's interface, and which parameter takes what."""

    candidate: Candidate
    interface: Interface
    slots: tuple[Slot, ...]
    signature: CandidateSignature

    def axes_order(self, name: str) -> tuple[int, ...]:
        """The permutation that takes tensor `name` from the mechanism's axes to the candidate's layout."""
        return _axes_order(self.candidate, self.interface, name)

    def arguments(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], resolved: Mapping[str, Any], merge: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of a call.

        Args:
            inputs: arrays of the candidate's framework by the mechanism's names, in the candidate's layout.
            options: the options that the case sets. Others keep the function's own default where that default
                means what the mechanism's default means, and are passed as `resolved` otherwise.
            resolved: every option with the mechanism's default filled in.
            merge: function (mask, bias) -> bias with -inf where the mask is False, for a parameter that takes
                either.
        """
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for slot in self.slots:
            value = self._value(slot, inputs, options, resolved, merge)
            if slot.positional_only:
                args.append(slot.default if value is UNSET else value)
            elif value is not UNSET:
                kwargs[slot.parameter] = value
        return args, kwargs | dict(self.candidate.fixed)

    def _value(
        self,
        slot: Slot,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        resolved: Mapping[str, Any],
        merge: Any,
    ) -> Any:
        target = slot.target
        if target in self.interface.inputs:
            return inputs.get(target, None if slot.required else UNSET)
        if target == MASK_OR_BIAS:
            mask, bias = inputs.get("mask"), inputs.get("bias")
            if mask is not None and bias is not None:
                return merge(mask, bias)
            given = mask if mask is not None else bias
            return given if given is not None else (None if slot.required else UNSET)
        if target == WINDOW:
            return self._window(slot, options, resolved)
        if target == ENABLE_GQA:
            heads = {name: inputs[name].shape[self.axes_order(name).index(1)] for name in ("Q", "K") if name in inputs}
            grouped = len(set(heads.values())) > 1
            return True if grouped else (False if slot.required else UNSET)
        if target not in self.signature.options:
            # A parameter of dropout without a mask: randomness inside the kernel cannot be judged, so it is
            # off.
            return resolved.get(target, 0.0) if slot.required else UNSET
        face = self.interface.options[target]
        if target in options:
            return options[target]
        return UNSET if not slot.required and _same_default(slot.default, face) else resolved.get(target, face.default)

    def _window(self, slot: Slot, options: Mapping[str, Any], resolved: Mapping[str, Any]) -> Any:
        sides = [options.get(side, resolved.get(side)) for side in ("window_left", "window_right")]
        is_open = sides == [None, None]
        if is_open and not slot.required and slot.default in (None, (-1, -1), (None, None), [-1, -1], [None, None]):
            return UNSET
        by_none = isinstance(slot.default, (tuple, list)) and None in slot.default
        return tuple(side if side is not None else (None if by_none else -1) for side in sides)


def bind(candidate: Candidate, interface: Interface) -> Binding:
    """Match the function's parameters.

    Raises:
        CandidateError: no readable signature, a required parameter that stands for nothing known, two
            parameters for one name, or no parameter for an input that the mechanism requires.
    """
    if candidate.mechanism not in (None, interface.mechanism):
        raise CandidateError(f"{candidate.name}: is described for {candidate.mechanism}, not for {interface.mechanism}")
    try:
        parameters = inspect.signature(candidate.function).parameters
    except (TypeError, ValueError):
        raise CandidateError(
            f"{candidate.name}: has no readable signature; describe a Python function that calls it"
        ) from None
    targets = _targets(interface)
    slots: list[Slot] = []
    unknown: list[str] = []
    spare: list[str] = []
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in candidate.fixed:
            continue
        target = _target(name, candidate, interface, targets)
        if target is None or (target == WINDOW and _takes_one_number(parameter)):
            (unknown if parameter.default is UNSET else spare).append(name)
            continue
        slots.append(Slot(name, target, parameter.default, parameter.kind is parameter.POSITIONAL_ONLY))
    _check(candidate, interface, slots, unknown)
    stray = sorted(set(candidate.names) - set(parameters))
    if stray:
        raise CandidateError(f"{candidate.name}: names maps {stray[0]!r}, which is no parameter of the function")
    for tensor in (*interface.inputs, *interface.outputs):
        _axes_order(candidate, interface, tensor)
    return Binding(candidate, interface, tuple(slots), _signature(candidate, interface, slots, spare))


def missing(
    signature: CandidateSignature, interface: Interface, inputs: frozenset[str], options: Mapping[str, Any]
) -> str | None:
    """Why a case with these inputs and options cannot be posed to the candidate; None: it can be."""
    for name in interface.inputs:
        if name in inputs and name not in signature.inputs:
            return f"{name}: {signature.not_taken.get(name, 'not taken')}"
    for name, value in options.items():
        reason = signature.not_taken.get(f"{name}={value}")
        if reason:
            return f"{name}={value}: {reason}"
        face = interface.options.get(name)
        if name not in signature.options and face is not None:
            stands = signature.declares.get(name, face.default)
            if value != stands:
                return f"{name}={value}: {signature.not_taken.get(name, 'not taken')}"
    for name in sorted(signature.required - inputs):
        return f"without {name}: the function requires it"
    return None


def _targets(interface: Interface) -> dict[str, str]:
    """Every lower-case name that a parameter may have, with what it stands for."""
    own = [*interface.inputs, *interface.options]
    table = {name.lower(): name for name in own}
    special = {
        MASK_OR_BIAS: {"mask", "bias"} <= set(interface.inputs),
        WINDOW: {"window_left", "window_right"} <= set(interface.options),
        ENABLE_GQA: {"Q", "K"} <= set(interface.inputs),
    }
    available = {name for name in SPECIAL if special[name]} | set(own)
    for alias, name in ALIASES.items():
        if name in available:
            table.setdefault(alias, name)
    for name in SPECIAL:
        if special[name]:
            table.setdefault(name, name)
    return table


def _target(parameter: str, candidate: Candidate, interface: Interface, targets: Mapping[str, str]) -> str | None:
    if parameter not in candidate.names:
        return targets.get(parameter.lower())
    name = candidate.names[parameter]
    if name not in interface.inputs and name not in interface.options and name not in targets.values():
        known = ", ".join((*interface.inputs, *interface.options, *SPECIAL))
        raise CandidateError(f"{candidate.name}: names maps {parameter!r} to {name!r}; known: {known}")
    return name


def _takes_one_number(parameter: inspect.Parameter) -> bool:
    """A window given as one number: of which side, and with or without the query itself, nobody can tell."""
    is_number = isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
    return is_number or parameter.annotation in (int, "int", "int | None", "Optional[int]")


def _check(candidate: Candidate, interface: Interface, slots: list[Slot], unknown: list[str]) -> None:
    if unknown:
        known = ", ".join((*interface.inputs, *interface.options))
        raise CandidateError(
            f"{candidate.name}: required parameter{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} "
            f"cannot be matched to {interface.mechanism} (inputs and options: {known}); rename, "
            "or state names={parameter: name} in @candidate"
        )
    seen: dict[str, str] = {}
    for slot in slots:
        covers = {MASK_OR_BIAS: ("mask", "bias"), WINDOW: ("window_left", "window_right")}.get(
            slot.target, (slot.target,)
        )
        for name in covers:
            if name in seen:
                raise CandidateError(
                    f"{candidate.name}: parameters {seen[name]} and {slot.parameter} both stand for {name}"
                )
            seen[name] = slot.parameter
    for name, face in interface.inputs.items():
        if not face.optional and name not in seen:
            aliases = ", ".join(alias for alias, target in ALIASES.items() if target == name)
            known_as = f" (also known as {aliases})" if aliases else ""
            raise CandidateError(f"{candidate.name}: takes no parameter for the required input {name}{known_as}")


def _signature(candidate: Candidate, interface: Interface, slots: list[Slot], spare: list[str]) -> CandidateSignature:
    taken = {slot.target for slot in slots}
    if MASK_OR_BIAS in taken:
        taken |= {"mask", "bias"}
    if WINDOW in taken:
        taken |= {"window_left", "window_right"}
    if "dropout_p" in taken and "dropout_mask" not in taken:
        taken.discard("dropout_p")
    not_taken: dict[str, str] = {}
    for name in (*interface.inputs, *interface.options):
        if name not in taken:
            not_taken[name] = _why_not(name, candidate, interface)
    if isinstance(candidate.refuses, Mapping):
        not_taken |= candidate.refuses
    plain = {key for key in not_taken if "=" not in key}
    differentiable = tuple(name for name, face in interface.inputs.items() if face.differentiable and name in taken)
    if candidate.differentiable is False:
        differentiable = ()
    elif isinstance(candidate.differentiable, tuple):
        differentiable = tuple(name for name in differentiable if name in candidate.differentiable)
    if candidate.framework == "numpy" and candidate.backward is None:
        differentiable = ()
    outputs = candidate.outputs
    if outputs is not None:
        stray = [name for name in outputs if name not in interface.outputs and name != "_"]
        if stray:
            known = ", ".join(interface.outputs)
            raise CandidateError(f"{candidate.name}: outputs names {stray[0]!r}; the mechanism's are {known}")
    notes = [f"parameter {name} is left at its default" for name in spare]
    return CandidateSignature(
        name=candidate.name,
        mechanism=interface.mechanism,
        inputs=frozenset(name for name in interface.inputs if name in taken and name not in plain),
        options=frozenset(name for name in interface.options if name in taken and name not in plain),
        not_taken=not_taken,
        dtypes=candidate.dtypes,
        devices=candidate.devices,
        framework=candidate.framework,
        declares=dict(candidate.declares),
        outputs=None if outputs is None else tuple(name for name in outputs if name != "_"),
        differentiable=differentiable,
        required=frozenset(
            slot.target
            for slot in slots
            if slot.required and slot.target in interface.inputs and interface.inputs[slot.target].optional
        ),
        rounding=candidate.rounding,
        form=candidate.form,
        layout=candidate.layout,
        source=candidate.source(),
        version=candidate.version_text(),
        notes=tuple(notes),
    )


def _why_not(name: str, candidate: Candidate, interface: Interface) -> str:
    if name in candidate.declares:
        return f"fixed to {candidate.declares[name]!r} as declared"
    if name == "dropout_p":
        return "dropout is judged with an explicit dropout_mask only, which the function does not take"
    if name in interface.options:
        return (
            f"no such parameter; always {interface.options[name].default!r}"
            if not (interface.options[name].computed)
            else "no such parameter; always the mechanism's default"
        )
    return "no such parameter"


def _same_default(default: Any, face: OptionFace) -> bool:
    """Whether a parameter's own default means the mechanism's default, so that leaving it out is a fair test
    of it."""
    if face.computed:
        return default is None
    if face.default is None:
        return default is None or (not isinstance(default, bool) and default in (0, -1))
    return default is None or (default == face.default and isinstance(default, bool) == isinstance(face.default, bool))


def _axes_order(candidate: Candidate, interface: Interface, name: str) -> tuple[int, ...]:
    face = interface.inputs.get(name)
    axes = face.axes if face is not None else interface.outputs[name]
    stated = candidate.layouts.get(name)
    if stated is None:
        plain = face is not None and face.role not in ("query", "key", "value")
        if plain or len(axes) != len(CANONICAL) or (face is not None and "b" not in axes):
            return tuple(range(len(axes)))
        stated = candidate.layout
    for letters in (CANONICAL[: len(axes)], "".join(axes)):
        if sorted(stated) == sorted(letters):
            return tuple(letters.index(letter) for letter in stated)
    raise CandidateError(f"{candidate.name}: layout {stated!r} of {name} is no permutation of {''.join(axes)!r}")
