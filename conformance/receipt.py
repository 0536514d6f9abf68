"""The execution receipt: proof that the candidate's own function ran, and that it did not ask the oracle.

`Watch` observes one call: how often the candidate's code was entered, and whether anything of
`attnspec.spec`'s evaluators or of `attnspec.reference` ran meanwhile. It uses `sys.monitoring` (Python 3.12
and later: every call in every thread, nearly free) or `sys.setprofile` (3.11: this thread and threads started
meanwhile; after `budget` calls it stops watching, and the receipt says so). `guard_imports`, which the worker
installs before it imports the candidate, also wraps the oracle's entry points, so that calls from threads
that were there before are seen.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

CO_OPTIMIZED = 0x1  # set for functions, not for module and class bodies
EVALUATORS = frozenset({"evaluate", "gradients", "sympy_evaluate", "sigma"})
BUDGET, THOROUGH = 20_000, 200_000  # calls, where watching slows them down; a sample of the cases gets the second


@functools.cache
def _rooms() -> tuple[tuple[str, str], ...]:
    """(folder, room) of the two rooms that hold oracles; found without importing them."""
    found = []
    for room in ("attnspec.reference", "attnspec.spec"):
        spec = importlib.util.find_spec(room)
        if spec is not None and spec.submodule_search_locations:
            found += [(os.path.realpath(place) + os.sep, room) for place in spec.submodule_search_locations]
    return tuple(found)


@functools.cache
def _room_of(filename: str) -> str | None:
    if filename.endswith("__init__.py") or filename.startswith("<"):
        return None
    path = os.path.realpath(filename)
    return next((room for folder, room in _rooms() if path.startswith(folder)), None)


def oracle_name(code: CodeType) -> str | None:
    """The dotted name of a function that computes what the oracle computes, else None."""
    room = _room_of(code.co_filename)
    if room is None or not code.co_flags & CO_OPTIMIZED:
        return None
    if room == "attnspec.spec" and code.co_name not in EVALUATORS:
        return None
    return f"{room}.{Path(code.co_filename).stem}.{code.co_qualname}"


class Watch:
    """Context manager around one call of the candidate.

    Attributes:
        entered: how often the function's own code was entered; None for a function without Python code.
        oracle_calls: names of the oracle's functions that ran, each once, in order.
        complete: False when the budget ran out and the rest of the call was not watched.
    """

    def __init__(self, function: Callable[..., Any], budget: int | None = BUDGET) -> None:
        self.code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
        self.entered: int | None = None if self.code is None else 0
        self.oracle_calls: list[str] = []
        self.complete = True
        self.budget = budget
        self._left = budget or 0

    def saw(self, name: str) -> None:
        if name not in self.oracle_calls:
            self.oracle_calls.append(name)

    def __enter__(self) -> Watch:
        _current.append(self)
        if sys.version_info >= (3, 12):
            _monitor(self)
        else:
            self._before = (sys.getprofile(), threading.getprofile())
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        _current.remove(self)
        if sys.version_info >= (3, 12):
            _unmonitor()
        else:
            sys.setprofile(self._before[0])
            threading.setprofile(self._before[1])

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code is self.code:
            self.entered = (self.entered or 0) + 1
        else:
            name = oracle_name(code)
            if name is not None:
                self.saw(name)
        if self.budget is not None:
            self._left -= 1
            if self._left < 0:
                self.complete = False
                sys.setprofile(None)


_current: list[Watch] = []


if sys.version_info >= (3, 12):
    _TOOL = 4  # the ids 0, 1, 2 and 5 belong to debuggers, coverage, profilers and optimizers

    def _monitor(watch: Watch) -> None:
        monitoring = sys.monitoring
        if monitoring.get_tool(_TOOL) is None:
            monitoring.use_tool_id(_TOOL, "attnspec")

        def started(code: CodeType, offset: int) -> Any:
            if code is watch.code:
                watch.entered = (watch.entered or 0) + 1
                return None
            name = oracle_name(code)
            if name is None:
                return monitoring.DISABLE
            watch.saw(name)
            return None

        monitoring.register_callback(_TOOL, monitoring.events.PY_START, started)
        monitoring.restart_events()
        monitoring.set_events(_TOOL, monitoring.events.PY_START)

    def _unmonitor() -> None:
        sys.monitoring.set_events(_TOOL, 0)
        sys.monitoring.free_tool_id(_TOOL)


def guard_imports() -> None:
    """From now on, wrap the oracle's entry points in every module that is imported, before anyone can alias
    them."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(("attnspec.reference.", "attnspec.spec.")):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and not spec.submodule_search_locations:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        instrument(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def instrument(module: ModuleType) -> None:
    """Wrap the functions of one module of the oracle's rooms (and the methods of its classes)."""
    for key, value in list(vars(module).items()):
        if inspect.isfunction(value) and value.__module__ == module.__name__ and oracle_name(value.__code__):
            setattr(module, key, _recording(value))
        elif inspect.isclass(value) and value.__module__ == module.__name__:
            for name, method in list(vars(value).items()):
                if inspect.isfunction(method) and oracle_name(method.__code__):
                    setattr(value, name, _recording(method))


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    name = oracle_name(function.__code__) or function.__qualname__

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        for watch in _current:
            watch.saw(name)
        return function(*args, **kwargs)

    return recorded
