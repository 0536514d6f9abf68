"""How a name on the command line becomes a function.

`resolve` finds the candidate behind `module:function`, `path/to/file.py:function`, an adapter's short name,
or a library function that an adapter stands for. Adapters are discovered: every module of
`conformance.adapters` whose functions are described with a `short_name`. Whatever cannot be found, imported
or called is a `CandidateError` with one line that says what was looked for and what was there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from attnspec.conformance.candidate import ATTRIBUTE, Candidate, CandidateError, default_name, described


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
        raise CandidateError(f"candidate {text!r}: expected module:function, file.py:function or an adapter's name")
    adapters = built_in()
    if text in adapters.candidates:
        return adapters.candidates[text]
    where, colon, path = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
    if not colon:
        if text.endswith(".py"):
            return _only_described(load_file(text), text, mechanism)
        raise _unknown(text, adapters)
    stands_for = adapters.for_function.get(text)
    if stands_for is not None:
        return stands_for
    module = load_file(where) if where.endswith(".py") else _from_module(where, text)
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
        keep = description.short_name or (description.name != default_name(function) and description.name)
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
        f"candidate {text!r}: expected module:function, file.py:function or an adapter's name (adapters: {known})"
    )


def _from_module(name: str, text: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if not all(part.isidentifier() for part in name.split(".")):
        raise CandidateError(f"candidate {text!r}: {name!r} is neither a module's name nor a .py file")
    return _importing(f"module {name!r}", lambda: importlib.import_module(name))


def load_file(text: str) -> ModuleType:
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
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and described(value, mechanism)
    ]
    if len(own) == 1:
        return of(own[0][1], f"{text}:{own[0][0]}", mechanism)
    listed = ", ".join(key for key, _ in own) or "none"
    raise CandidateError(f"candidate {text!r}: say which function, as {text}:function (described here: {listed})")


def _same_object(text: str, function: Any) -> bool:
    """Whether `module:function` names this very object; a module that is not loaded cannot hold it."""
    where, _, path = text.rpartition(":")
    value: Any = sys.modules.get(where)
    for part in path.split("."):
        value = getattr(value, part, None)
    return value is not None and value is function


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"
