"""Optimized implementations in Triton: thin mechanisms here, the kernels they launch in `impls.engines`.

A mechanism's kernel is the function of its name in any module of this package (`attnspec.impls.softmax` has
`softmax_attention`); `find` looks it up, so that a new implementation is a new file. `attnspec.impls.aot` compiles
every kernel variant ahead of time, without a GPU. Importing this package imports nothing; the modules need PyTorch
and Triton.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def find(name: str) -> Callable[..., Any]:
    """The Triton implementation of the mechanism `name`.

    Raises:
        LookupError: there is none.
        ImportError: PyTorch or Triton is missing.
    """
    modules = [module for module, _ in written(name)]
    if not modules:
        raise LookupError(f"no Triton implementation of the mechanism {name!r}")
    return getattr(import_module(f"{__name__}.{modules[0]}"), name)  # type: ignore[no-any-return]


def written(name: str) -> Iterator[tuple[str, bool]]:
    """Modules with a function of the mechanism's name, and whether it is differentiable. Nothing is imported."""
    for module, functions, backward in _sources():
        if name in functions:
            yield module, backward


@cache
def _sources() -> tuple[tuple[str, frozenset[str], bool], ...]:
    found = []
    for path in sorted(Path(next(iter(__path__))).glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        functions = frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))
        classes = [node for node in body if isinstance(node, ast.ClassDef)]
        methods = {item.name for node in classes for item in node.body if isinstance(item, ast.FunctionDef)}
        found.append((path.stem, functions, "backward" in methods))
    return tuple(found)
