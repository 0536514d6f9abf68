"""What a kernel's author states about a kernel, and how a name on the command line becomes a function.

`@candidate` attaches a `Candidate` description to a function without wrapping it; `resolve` finds the
function behind `module:function`, `path/to/file.py:function`, an adapter's short name, or a library function
that an adapter stands for. Used by the adapters, the worker and the command line. Whatever cannot be found,
imported or called is a `CandidateError` with one line that says what was looked for and what was there (exit
code 2).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
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
            name=name or short_name or _default_name(function),
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
    """Find the candidate behind a name.

    Args:
        text: an adapter's short name, `module:function`, `path/to/file.py:function`, or `path/to/file.py`
            alone where the file describes exactly one function with `@candidate`.
        mechanism: chooses among several descriptions of one function.

    Raises:
        CandidateError: nothing there, not importable, not callable, or described for other mechanisms only.
    """
    if not text or text != text.strip():
        raise CandidateError(
            f"candidate {text!r}: expected module:function, file.py:function or an adapter's name"
        )
    adapters = built_in()
    if text in adapters.candidates:
        return adapters.candidates[text]
    where, colon, path = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
    if not colon:
        if text.endswith(".py"):
            return _only_described(_from_file(text), text, mechanism)
        raise _unknown(text, adapters)
    stands_for = adapters.for_function.get(text)
    if stands_for is not None:
        return stands_for
    module = _from_file(where) if where.endswith(".py") else _from_module(where, text)
    function = _attribute(module, path, text)
    for described_function, adapter in adapters.for_function.items():
        if _same_object(described_function, function):
            return adapter
    return of(function, text, mechanism)


def of(function: Any, name: str, mechanism: str | None = None) -> Candidate:
    """The `Candidate` of a function: its own description, or the defaults with this name."""
    if not callable(function):
        raise CandidateError(f"{name}: is a {type(function).__name__}, expected a function")
    if isinstance(function, type):
        raise CandidateError(f"{name}: is a class, expected a function")
    description = described(function, mechanism)
    if description is not None:
        keep = description.short_name or (description.name != _default_name(function) and description.name)
        return description if keep else dataclasses.replace(description, name=name)
    others = sorted({str(entry.mechanism) for entry in getattr(function, ATTRIBUTE, ())})
    if others:
        raise CandidateError(f"{name}: is described for {', '.join(others)}, not for {mechanism}")
    return Candidate(function=function, name=name)


@dataclass(frozen=True)
class BuiltIn:
    """The adapters that come with the package, and those that could not be read, with the reason."""

    candidates: Mapping[str, Candidate]
    for_function: Mapping[str, Candidate]
    broken: Mapping[str, str]


@functools.cache
def built_in() -> BuiltIn:
    """Every described function with a short name in the modules of `attnspec.conformance.adapters`."""
    from attnspec.conformance import adapters

    found: dict[str, Candidate] = {}
    stands_for: dict[str, Candidate] = {}
    broken: dict[str, str] = {}
    for info in sorted(pkgutil.iter_modules(adapters.__path__), key=lambda entry: entry.name):
        name = f"{adapters.__name__}.{info.name}"
        try:
            module = importlib.import_module(name)
        except Exception as error:
            broken[info.name] = f"{type(error).__name__}: {_first_line(error)}"
            continue
        for description in _descriptions(module):
            if description.short_name:
                found.setdefault(description.short_name, description)
            if description.for_function:
                stands_for.setdefault(description.for_function, description)
    return BuiltIn(found, stands_for, broken)


def _descriptions(module: ModuleType) -> Iterable[Candidate]:
    for value in list(vars(module).values()):
        yield from getattr(value, ATTRIBUTE, ()) if callable(value) and not isinstance(value, type) else ()


def _unknown(text: str, adapters: BuiltIn) -> CandidateError:
    if text in adapters.broken:
        return CandidateError(f"adapter {text!r} cannot be read: {adapters.broken[text]}")
    known = ", ".join(sorted(adapters.candidates)) or "none"
    return CandidateError(
        f"candidate {text!r}: expected module:function, file.py:function or an adapter's name "
        f"(adapters: {known})"
    )


def _from_module(name: str, text: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if not all(part.isidentifier() for part in name.split(".")):
        raise CandidateError(f"candidate {text!r}: {name!r} is neither a module's name nor a .py file")
    return _importing(f"module {name!r}", lambda: importlib.import_module(name))


def _from_file(text: str) -> ModuleType:
    path = Path(text).expanduser()
    if not path.is_file():
        raise CandidateError(f"candidate {text!r}: no such file (looked in {Path.cwd()})")
    path = path.resolve()
    name = f"_attnspec_candidate_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CandidateError(f"candidate {text!r}: Python cannot load this file")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def execute() -> ModuleType:
        # As for a script: the file's own folder comes first, so that it can import its neighbours.
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        sys.modules[name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    return _importing(f"file {text!r}", execute)


def _importing(what: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise CandidateError(f"cannot import {what}: {_first_line(error)}") from error
    except SystemExit as error:
        raise CandidateError(f"cannot import {what}: it called sys.exit({error.code!r})") from error
    except SyntaxError as error:
        raise CandidateError(f"cannot import {what}: line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise CandidateError(f"cannot import {what}: {type(error).__name__}: {_first_line(error)}") from error


def _attribute(module: ModuleType, path: str, text: str) -> Any:
    value: Any = module
    seen = text.rpartition(":")[0]
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            near = ", ".join(_close(part, vars(value) if hasattr(value, "__dict__") else {}))
            hint = f" (there is: {near})" if near else ""
            raise CandidateError(f"candidate {text!r}: {seen} has no {part!r}{hint}") from None
        seen += f".{part}"
    return value


def _close(name: str, names: Iterable[str]) -> list[str]:
    import difflib

    public = [entry for entry in names if not entry.startswith("_")]
    return difflib.get_close_matches(name, public, n=3, cutoff=0.5)


def _only_described(module: ModuleType, text: str, mechanism: str | None) -> Candidate:
    own = [
        (key, value)
        for key, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", None) == module.__name__
        and described(value, mechanism)
    ]
    if len(own) == 1:
        return of(own[0][1], f"{text}:{own[0][0]}", mechanism)
    listed = ", ".join(key for key, _ in own) or "none"
    raise CandidateError(
        f"candidate {text!r}: say which function, as {text}:function (described here: {listed})"
    )


def _same_object(text: str, function: Any) -> bool:
    """Whether `module:function` names this very object; a module that is not loaded cannot hold it."""
    where, _, path = text.rpartition(":")
    value: Any = sys.modules.get(where)
    for part in path.split("."):
        value = getattr(value, part, None)
    return value is not None and value is function


def _default_name(function: Any) -> str:
    module = getattr(function, "__module__", None) or "?"
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _names_or_flag(value: bool | Sequence[str] | None) -> bool | tuple[str, ...] | None:
    return value if value is None or isinstance(value, bool) else tuple(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


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
    if description.backward is not None and not callable(description.backward):
        return f"backward is a {type(description.backward).__name__}, expected a function"
    return None
