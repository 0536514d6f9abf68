"""What a kernel's author states about a kernel.

`@candidate` attaches a `Candidate` description to a function without wrapping it; `resolve` finds the
candidate behind a name on the command line. Used by the adapters, the worker and the command line. A
description that makes no sense is a `CandidateError` with one line that says what was stated and what was
expected (exit code 2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

ATTRIBUTE = "__attnspec_candidates__"
FRAMEWORKS = ("torch", "numpy", "jax")
DTYPES = ("fp32", "fp16", "bf16", "fp64")
DEVICES = ("cpu", "cuda")


class CandidateError(ValueError):
    """A candidate that cannot be judged at all: not found, not importable, not callable, or not matching. One
    line."""


@dataclass(frozen=True)
class Candidate:
    """A function and everything that its author states about it.

    Attributes:
        function: what is called; it is never wrapped.
        name: how the candidate is called in reports and reproduced from a command line.
        mechanism: the mechanism that it implements; None: the caller says.
        framework: "torch", "numpy" or "jax": the kind of array that it takes and returns.
        layout: order of the axes batch, head, position, feature, as a permutation of "bhid".
        layouts: exceptions by tensor name, each a permutation of "bhid" cut to the tensor's axes or of its
            own axes.
        dtypes, devices: what it supports.
        declares: named semantics that differ from the mechanism's own, by name.
        backward: an explicit backward function; without one the framework differentiates.
        differentiable: True, False, the names of the inputs that have a gradient, or None: found out by
            trying.
        outputs: names of what it returns, in order; "_" for something that is not judged. None: the
            mechanism's order.
        output_dtypes: dtype of an output where it is not the dtype of the inputs.
        input_dtypes: dtype of an input where it is not the dtype of the case ("int32" for integer inputs).
        rounding, form: which rounding model and numerical form of the mechanism it follows; None: the
            defaults.
        refuses: reasons by name of an input, option, or "option=value" that it does not support; or a
            function from a `Case` to a reason (None: supported).
        names: the mechanism's name (or "window", "mask_or_bias") by parameter name, for names that are not
            known.
        fixed: arguments that are passed on every call as they are.
        guard_outputs: False where the candidate cannot run while its allocations are watched (tracing
            compilers).
        short_name: the name of a built-in adapter.
        for_function: the library function that the adapter stands for, as "module:function".
        version: text, or a function that returns it, naming the library's version.
    """

    function: Callable[..., Any]
    name: str
    mechanism: str | None = None
    framework: str = "torch"
    layout: str = "bhid"
    layouts: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    devices: tuple[str, ...] = DEVICES
    declares: Mapping[str, Any] = field(default_factory=dict)
    backward: Callable[..., Any] | None = None
    differentiable: bool | tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    output_dtypes: Mapping[str, str] = field(default_factory=dict)
    input_dtypes: Mapping[str, str] = field(default_factory=dict)
    rounding: str | None = None
    form: str | None = None
    refuses: Mapping[str, str] | Callable[[Any], str | None] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    guard_outputs: bool = True
    short_name: str | None = None
    for_function: str | None = None
    version: str | Callable[[], str] | None = None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise CandidateError(f"{self.name}: {problem}")

    def source(self) -> str:
        """`file:line` of the function where it is Python, its qualified name otherwise."""
        inner = inspect.unwrap(self.function)
        code = getattr(inner, "__code__", None)
        if code is not None:
            return f"{code.co_filename}:{code.co_firstlineno}"
        module = getattr(inner, "__module__", None) or type(inner).__module__
        return f"{module}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"

    def version_text(self) -> str:
        """The stated version; empty without one, and a failing version function is named instead of
        raised."""
        if callable(self.version):
            try:
                return str(self.version())
            except Exception as error:
                return f"unknown ({type(error).__name__}: {error})"
        return self.version or ""


def candidate(
    *,
    mechanism: str | None = None,
    framework: str = "torch",
    layout: str = "bhid",
    layouts: Mapping[str, str] | None = None,
    dtypes: Sequence[str] = ("fp32", "fp16", "bf16"),
    devices: Sequence[str] = DEVICES,
    declares: Mapping[str, Any] | None = None,
    backward: Callable[..., Any] | None = None,
    differentiable: bool | Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    output_dtypes: Mapping[str, str] | None = None,
    input_dtypes: Mapping[str, str] | None = None,
    rounding: str | None = None,
    form: str | None = None,
    refuses: Mapping[str, str] | Callable[[Any], str | None] | None = None,
    names: Mapping[str, str] | None = None,
    fixed: Mapping[str, Any] | None = None,
    guard_outputs: bool = True,
    name: str | None = None,
    short_name: str | None = None,
    for_function: str | None = None,
    version: str | Callable[[], str] | None = None,
) -> Callable[[F], F]:
    """Describe a function to the suite: `@attnspec.candidate(mechanism="softmax_attention", layout="bihd")`.

    The function itself comes back, so decorating changes nothing for its callers. `Candidate` explains the
    arguments. A function may be described once per mechanism.

    Raises:
        CandidateError: an argument that makes no sense; the message names the function and the argument.
    """

    def attach(function: F) -> F:
        description = Candidate(
            function=function,
            name=name or short_name or default_name(function),
            mechanism=mechanism,
            framework=framework,
            layout=layout,
            layouts=dict(layouts or {}),
            dtypes=tuple(dtypes),
            devices=tuple(devices),
            declares=dict(declares or {}),
            backward=backward,
            differentiable=_names_or_flag(differentiable),
            outputs=None if outputs is None else tuple(outputs),
            output_dtypes=dict(output_dtypes or {}),
            input_dtypes=dict(input_dtypes or {}),
            rounding=rounding,
            form=form,
            refuses=refuses,
            names=dict(names or {}),
            fixed=dict(fixed or {}),
            guard_outputs=guard_outputs,
            short_name=short_name,
            for_function=for_function,
            version=version,
        )
        try:
            setattr(function, ATTRIBUTE, (*getattr(function, ATTRIBUTE, ()), description))
        except (AttributeError, TypeError):
            raise CandidateError(
                f"{description.name}: a {type(function).__name__} cannot be described by @candidate; "
                "describe a Python function that calls it"
            ) from None
        return function

    return attach


def described(function: Any, mechanism: str | None = None) -> Candidate | None:
    """The description that `@candidate` attached for this mechanism (or for any, where it names none)."""
    found: tuple[Candidate, ...] = getattr(function, ATTRIBUTE, ())
    for description in reversed(found):
        if mechanism is None or description.mechanism in (None, mechanism):
            return description
    return None


def resolve(text: str, mechanism: str | None = None) -> Candidate:
    """Find the candidate behind a name; `finding.resolve` says how.

    Raises:
        CandidateError: nothing there, not importable, not callable, or described for other mechanisms only.
    """
    from attnspec.conformance import finding

    return finding.resolve(text, mechanism)


def default_name(function: Any) -> str:
    """`module:qualified.name`, the name of a function that was given none."""
    module = getattr(function, "__module__", None) or "?"
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _names_or_flag(value: bool | Sequence[str] | None) -> bool | tuple[str, ...] | None:
    return value if value is None or isinstance(value, bool) else tuple(value)


def _problem(description: Candidate) -> str | None:
    if description.framework not in FRAMEWORKS:
        return f"framework {description.framework!r} is unknown; expected one of {', '.join(FRAMEWORKS)}"
    if sorted(description.layout) != sorted("bhid"):
        return f"layout {description.layout!r} is no permutation of 'bhid' (batch, head, position, feature)"
    if not description.dtypes:
        return f"dtypes is empty; expected some of {', '.join(DTYPES)}"
    for label, given, known in (
        ("dtypes", description.dtypes, DTYPES),
        ("devices", description.devices, DEVICES),
        ("output_dtypes", tuple(description.output_dtypes.values()), DTYPES),
    ):
        stray = [entry for entry in given if entry not in known]
        if stray:
            return f"{label} names {stray[0]!r}; expected some of {', '.join(known)}"
    backward: object = description.backward
    if backward is not None and not callable(backward):
        return f"backward is a {type(backward).__name__}, expected a function"
    return None
